"""The steps as functions: those that the commands call, each under its command's name."""

import inspect
import subprocess
import sys

import pytest

from nnunet_oneshot import api
from nnunet_oneshot.cli import build_parser

SUBPARSERS = next(action for action in build_parser()._actions if hasattr(action, "choices") and action.choices)
# `preprocess` is planning without a planner.
NAMES = {"import": "import_scans", "preprocess": "plan_and_preprocess"}


@pytest.mark.parametrize("command", SUBPARSERS.choices)
def test_a_command_calls_the_function_of_its_name(command):
    name = NAMES.get(command, command.replace("-", "_"))
    step = getattr(api, name)
    handler = inspect.getsource(SUBPARSERS.choices[command].get_default("run"))
    assert f"from {step.__module__} import {step.__name__}" in handler
    hints = inspect.signature(step)
    assert "return" in step.__annotations__ and all(p.annotation is not p.empty for p in hints.parameters.values())


def test_nothing_heavy_is_loaded_before_a_step_is_asked_for():
    code = "import sys; from nnunet_oneshot import api; assert 'torch' not in sys.modules; api.env"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_is_no_step_is_no_attribute():
    assert set(api.__all__) <= set(dir(api))
    with pytest.raises(AttributeError, match="nothing"):
        _ = api.nothing


def test_steps_run_from_python(tiny_dataset, capsys):
    from nnunet_oneshot.planners import OneShotCPUPlanner

    dataset = tiny_dataset(3, labelled=("case_00",))
    api.plan_and_preprocess(
        str(dataset.id),
        OneShotCPUPlanner,
        api.Options(configurations=("3d_fullres",), num_processes=(1,), progress=False),
    )
    assert (dataset.preprocessed / "nnUNetOneShotCPUPlans.json").is_file()
    assert "Preprocessed 3 cases" in capsys.readouterr().out
