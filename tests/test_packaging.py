"""Wheel, source distribution and editable install: the trainers are found from each."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIND_TRAINER = """
import multiprocessing, pickle, sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
trainer = recursive_find_trainer_class_by_name("OneShotDistillTrainer")
assert pickle.loads(pickle.dumps(trainer)) is trainer
if sys.argv[1] == "wheel":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(getattr, (trainer, "__name__")) == "OneShotDistillTrainer"
print(trainer.__module__, __import__("nnunet_oneshot").__file__)
"""
VARIABLE = "nnUNet_extTrainer"
SHOW_VARIABLE = f"import os, sys; print(os.environ.get('{VARIABLE}'), 'nnunet_oneshot' in sys.modules)"


def packages():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser["options"]["packages"].split()


def test_every_package_of_the_tree_is_installed():
    inside = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("nnunet_oneshot/**/__init__.py")}
    assert set(packages()) == inside | {"nnunet_oneshot.trainers", "nnunet_oneshot.planners"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the files that make up the project, so that building leaves nothing behind in the tree."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("nnunet_oneshot", "trainers", "planners"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory):
    """Paths of a source distribution and of the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    code = "import os, sys; from setuptools import build_meta as b; out = sys.argv[1]; s = b.build_sdist(out); print(s)"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out / "unpacked")
    (unpacked,) = (out / "unpacked").iterdir()
    code = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=unpacked, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_packages_trainer_module_and_licence(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    for package in packages():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert "nnunet_oneshot/ext_trainer/nnunet_oneshot_trainers.py" in names
    assert "nnunet_oneshot/py.typed" in names
    templates = {
        f"nnunet_oneshot/report/templates/{path.name}" for path in ROOT.glob("nnunet_oneshot/report/templates/*")
    }
    assert templates and templates <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    folders = ["nnunet_oneshot", "nnunet_oneshot-0.data", "nnunet_oneshot-0.dist-info"]
    assert sorted(re.sub(r"-[\d.]+\.d", "-0.d", top) for top in tops) == folders
    assert [name.partition("/")[2] for name in names if ".data/" in name] == ["purelib/nnunet_oneshot.pth"]


# The wheel above is built from the source distribution: installing that one too shows little more.
@pytest.mark.parametrize("kind", ["wheel", pytest.param("sdist", marks=pytest.mark.slow), "editable"])
def test_installing_is_enough_for_trainers_to_be_found_from(kind, source, distributions, tmp_path):
    python = make_environment(tmp_path / "environment")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    target = {"wheel": [str(distributions[1])], "sdist": [str(distributions[0])], "editable": ["-e", str(source)]}[kind]
    run([*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", *target], tmp_path)
    module, file = run([str(python), "-c", FIND_TRAINER, kind], tmp_path).splitlines()[-1].split()
    assert module.startswith("nnunet_oneshot.trainers")
    assert Path(file).is_relative_to(source if kind == "editable" else tmp_path)

    folder = str(Path(file).resolve().parent / "ext_trainer")
    show = [str(python), "-c", SHOW_VARIABLE]
    # The package itself is not imported: a tree in which a program starts goes before what is installed.
    assert run(show, tmp_path).split() == [folder, "False"]
    both = os.pathsep.join(["/other", folder])
    assert run(show, tmp_path, **{VARIABLE: "/other"}).split()[0] == both
    assert run(show, tmp_path, **{VARIABLE: both}).split()[0] == both
    command = python.parent / ("nnunet_oneshot.exe" if os.name == "nt" else "nnunet_oneshot")
    assert run([str(command), "env"], tmp_path) == f"export {VARIABLE}={shlex.quote(folder)}\n"

    run([*pip, "uninstall", "--quiet", "--yes", "nnunet_oneshot"], tmp_path)
    assert run(show, tmp_path).split() == ["None", "False"]
    assert not list((tmp_path / "environment").rglob("*nnunet_oneshot*"))


def test_the_line_run_at_the_start_of_python_is_silent_where_nothing_is_installed(tmp_path):
    line = (ROOT / "nnunet_oneshot" / "ext_trainer" / "nnunet_oneshot.pth").read_text()
    assert line.startswith("import ") and line.count("\n") == 1
    (tmp_path / "alone.pth").write_text(line)
    code = f"import site; site.addsitedir({str(tmp_path)!r}); {SHOW_VARIABLE}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], env=clean(), capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["None", "False"], "")


def clean(**variables):
    """This process's environment without what makes this project, and its trainers, known."""
    return {key: value for key, value in os.environ.items() if key not in (VARIABLE, "PYTHONPATH")} | variables


def run(command, folder, **variables):
    """What a command prints, without whatever makes this project known here."""
    done = subprocess.run(command, env=clean(**variables), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    return done.stdout


def make_environment(folder):
    """A virtual environment that sees this one's packages, but not an editable install of this project.

    Folders named in a .pth file are added to the path without their own .pth files being run.
    """
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    packages = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (Path(own) / "outer.pth").write_text("\n".join(packages))
    return python
