"""The page that lists nnU-Net's features names tests and commands that exist."""

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reference" / "nnunet_features.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| feature")]
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_named_tests_exist(file, name):
    path = ROOT / file
    assert path.is_file() and re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_row_has_a_state_and_a_refusal_a_test():
    for row in ROWS:
        _, feature, state, shown, _ = (cell.strip() for cell in re.split(r"(?<!\\)\|", row))
        assert feature and state
        assert shown or not state.startswith("refused"), feature


def test_options_of_nnunets_training_are_listed():
    import inspect

    from nnunetv2.run.run_training import run_training_entry

    options = set(re.findall(r"add_argument\('(--?\w+)'", inspect.getsource(run_training_entry)))
    assert options - set(re.findall(r"`(--?\w+)", PAGE)) == set()


def test_commands_are_those_of_nnunet():
    commands = {entry.name for entry in distribution("nnunetv2").entry_points}
    assert set(re.findall(r"nnUNetv2_\w+", PAGE)) <= commands
