"""The house: who imports whom, where things lie, and that workflow and map say the same as the tree."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "nnunet_oneshot"
PACKAGES = sorted(path.parent for path in LIBRARY.rglob("__init__.py"))
BESIDE = ("nnunet_oneshot.trainers", "nnunet_oneshot.planners")
MAY_IMPORT_BESIDE = {"nnunet_oneshot/cli.py", "nnunet_oneshot/ext_trainer/nnunet_oneshot_trainers.py"}
TOP_LEVEL = {
    ".ci",
    ".github",
    ".gitignore",
    ".pre-commit-config.yaml",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "docs",
    "nnunet_oneshot",
    "planners",
    "pyproject.toml",
    "mkdocs.yml",
    "setup.cfg",
    "setup.py",
    "tests",
    "trainers",
}
MAX_LINES, MAX_PARAMETERS = 50, 8
# Longer, or with more parameters, for the reason given.
ALLOWED_FUNCTIONS = {
    "nnunet_oneshot/evaluation/benchmark.py:run_benchmark": "one parameter for each option of `benchmark`",
    "nnunet_oneshot/evaluation/propagation.py:propagate": "one parameter for each option of `propagate`",
    "nnunet_oneshot/export.py:export_model": "one parameter for each option of `export`",
    "nnunet_oneshot/registration/dataset/command.py:register": "one parameter for each option of `register`",
    "nnunet_oneshot/registration/pair/registrar.py:register_arrays": "the entrance for callers with arrays alone: "
    "two volumes, and by name what may be known of them",
}


def read(path):
    return path.read_text(encoding="utf-8")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def parsed(*folders):
    """Name and syntax tree of every Python file in the folders."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield relative(path), ast.parse(read(path))


def imported(name, tree):
    """Dotted names that a file imports, at its top or inside a function."""
    package = name.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_beside(name):
    return any(name == package or name.startswith(f"{package}.") for package in BESIDE)


def layers():
    """Modules of each level in ``pyproject.toml``, from the top."""
    (found,) = re.findall(r"^layers = (\[.*?^\])", read(ROOT / "pyproject.toml"), re.DOTALL | re.MULTILINE)
    return [[module.strip() for module in layer.split("|")] for layer in ast.literal_eval(found)]


def test_only_the_entrances_import_trainers_and_planners():
    found = {name for name, tree in parsed("nnunet_oneshot") if any(map(is_beside, imported(name, tree)))}
    assert found == MAY_IMPORT_BESIDE


@pytest.mark.parametrize(
    "code",
    [
        "import nnunet_oneshot.trainers.base",
        "from nnunet_oneshot import planners",
        "from nnunet_oneshot.trainers import *",
        "def inside():\n    from ..trainers.base import OneShotTrainer",
        "if TYPE_CHECKING:\n    from nnunet_oneshot.planners.cpu_planner import OneShotCPUPlanner",
    ],
)
def test_an_import_of_trainers_or_planners_is_seen(code):
    assert any(map(is_beside, imported("nnunet_oneshot/data/raw.py", ast.parse(code))))


@pytest.mark.parametrize("package", PACKAGES, ids=relative)
def test_every_package_is_installed_and_introduced(package):
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert ".".join(package.relative_to(ROOT).parts) in parser["options"]["packages"].split()
    assert ast.get_docstring(ast.parse(read(package / "__init__.py")))


def test_tests_lie_as_what_they_test():
    tested = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    rooms = {package.relative_to(LIBRARY).as_posix() for package in PACKAGES}
    assert tested <= rooms | {"trainers", "planners"}


def test_the_workflow_runs_the_readme_command_on_three_systems():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(read(ROOT / ".github" / "workflows" / "tests.yml"))
    job = workflow["jobs"]["tests"]
    assert set(job["strategy"]["matrix"]["os"]) == {"ubuntu-latest", "macos-latest", "windows-latest"}
    assert set(job["strategy"]["matrix"]["python"]) == {"3.10", "3.11", "3.12", "3.13"}
    (script,) = (step["run"] for step in job["steps"] if "README.md" in step.get("run", ""))
    (extraction,) = (line for line in read(ROOT / ".ci" / "run").splitlines() if line.startswith("command_line="))
    assert extraction in script.splitlines()
    assert script.splitlines()[-1] == 'eval "$command_line"'
    assert {"lint-imports", "mypy"} <= {step.get("run") for step in workflow["jobs"]["checks"]["steps"]}


def test_the_map_names_every_room_at_its_level():
    rows = re.findall(r"^\| (.+?) \|", read(ROOT / "CONTRIBUTING.md"), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    groups = {"", "registration"}  # packages that only hold other packages
    missing = {package.relative_to(LIBRARY).as_posix().strip(".") for package in PACKAGES} - groups - names
    assert not missing
    assert {"/trainers", "/planners", "ext_trainer"} <= names
    levels = {int(row.split(":")[0]): set(re.findall(r"`([\w/]+)`", row)) for row in rows if re.match(r"\d+: ", row)}
    ours = [{module.removeprefix("nnunet_oneshot.").replace(".", "/") for module in layer} for layer in layers()]
    assert levels == dict(enumerate(reversed(ours), start=1))


def test_every_room_has_a_level():
    found = {module for layer in layers() for module in layer}
    modules = {path.stem for path in LIBRARY.glob("*.py")} - {"__init__"}
    packages = {".".join(package.relative_to(LIBRARY).parts) for package in PACKAGES} - {"", "registration"}
    assert found == {f"nnunet_oneshot.{name}" for name in modules | packages}


def test_nothing_else_lies_at_the_top():
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a clone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        (None, None, None),
        ("data/raw.py", "import nnunet_oneshot.registration.pair.registrar", "The rooms of the house"),
        ("errors.py", "def late():\n    import nnunet_oneshot.io", "The rooms of the house"),
        ("registration/pair/warp.py", "import nnunetv2", "A pair of volumes"),
        ("distillation/hints.py", "import nnunet_oneshot.registration.pair.warp", "Losses and teacher"),
    ],
    ids=["as it is", "sideways", "upwards", "nnU-Net in a pair", "registration in a loss"],
)
def test_contracts_hold_and_break(tmp_path, file, line, broken):
    pytest.importorskip("importlinter")
    shutil.copytree(LIBRARY, tmp_path / "nnunet_oneshot", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file is not None:
        with open(tmp_path / "nnunet_oneshot" / file, "a", encoding="utf-8") as stream:
            stream.write(f"\n\n{line}\n")
    python_path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", "pyproject.toml", "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": python_path, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    output = done.stdout + done.stderr
    if broken is None:
        assert done.returncode == 0, output
        assert "BROKEN" not in output
    else:
        assert done.returncode != 0, output
        assert re.search(rf"{broken}.* BROKEN", output), output


def lines(function):
    """Lines of a function, its docstring not counted."""
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        count -= function.body[0].end_lineno - function.body[0].lineno + 1
    return count


def parameters(function):
    """Number of parameters, without ``self`` or ``cls``."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(one.arg not in ("self", "cls") for one in named) + bool(arguments.vararg) + bool(arguments.kwarg)


def test_functions_are_short_and_take_few_parameters():
    too_large = {}
    for name, tree in parsed("nnunet_oneshot", "trainers", "planners"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = lines(node), parameters(node)
                if size[0] > MAX_LINES or size[1] > MAX_PARAMETERS:
                    too_large[f"{name}:{node.name}"] = size
    unexplained = {name: size for name, size in too_large.items() if name not in ALLOWED_FUNCTIONS}
    assert not unexplained, "(lines, parameters): split it, or give its reason in ALLOWED_FUNCTIONS"
    assert set(ALLOWED_FUNCTIONS) <= set(too_large), "a reason that is no longer needed"
