"""Wheel, source distribution and editable install: the trainers are found from each."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIND_TRAINER = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
trainer = recursive_find_trainer_class_by_name("OneShotDistillTrainer")
assert pickle.loads(pickle.dumps(trainer)) is trainer
print(trainer.__module__, __import__("nnunet_oneshot").__file__)
"""


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
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
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
    assert len(tops) == 2 and "nnunet_oneshot" in tops


@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_trainers_are_found_from(kind, source, distributions, tmp_path):
    python = make_environment(tmp_path / "environment")
    target = {"wheel": [str(distributions[1])], "sdist": [str(distributions[0])], "editable": ["-e", str(source)]}[kind]
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*install, *target], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    variables = {key: value for key, value in os.environ.items() if key not in ("nnUNet_extTrainer", "PYTHONPATH")}
    command = python.parent / ("nnunet_oneshot.exe" if os.name == "nt" else "nnunet_oneshot")
    line = subprocess.run([str(command), "env"], check=True, capture_output=True, text=True, env=variables).stdout
    variables["nnUNet_extTrainer"] = line.strip().partition("=")[2].strip("'")
    found = subprocess.run(
        [str(python), "-c", FIND_TRAINER], capture_output=True, text=True, env=variables, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    module, file = found.stdout.splitlines()[-1].split()
    assert module.startswith("nnunet_oneshot.trainers")
    assert Path(file).is_relative_to(source if kind == "editable" else tmp_path)


def make_environment(folder):
    """A virtual environment that sees this one's packages, but not an editable install of this project.

    Folders named in a .pth file are added to the path without their own .pth files being run.
    """
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    own = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # Older Pythons put an old setuptools into new environments, which would hide this one's.
    subprocess.run([str(python), "-m", "pip", "uninstall", "--yes", "setuptools"], check=True, capture_output=True)
    paths = sysconfig.get_paths()
    (Path(own) / "outer.pth").write_text("\n".join(dict.fromkeys([paths["purelib"], paths["platlib"]])))
    return python
