"""What this package overrides of nnU-Net is as it was when the overrides were written."""

import inspect
from importlib.metadata import version

import pytest
import upstream_hooks

HOOKS = upstream_hooks.hooks()
# Why the parameters of these differ from nnU-Net's.
OTHER_PARAMETERS = {
    "OneShotDataLoader.__init__": "only this package makes it",
    "OneShotPlannerMixin.get_plans_for_configuration": "the others are handed on by position",
}


def test_hooks_of_the_installed_release_are_known():
    """A failure here after a new release of nnU-Net says which hooks to look at."""
    known = upstream_hooks.accepted()
    changed = [
        f"{key} (overridden by {', '.join(hook.overrides) or 'nobody, but relied on'})"
        for key, hook in HOOKS.items()
        if hook.digest not in known.get(key, [])
    ]
    gone = sorted(set(known) - set(HOOKS))
    assert not changed and not gone, (
        f"nnunetv2 {version('nnunetv2')} has other hooks than this package was written for.\n"
        f"Changed: {changed}\nNo longer there or no longer overridden: {gone}\n"
        f"Compare their sources with those of the release before, mend the overrides where needed, run the tests of "
        f"the trainers, and accept the sources: python tests/upstream_hooks.py"
    )


@pytest.mark.parametrize("key", [key for key in HOOKS if HOOKS[key].overrides])
def test_overrides_take_what_nnunet_gives(key):
    wanted = list(inspect.signature(HOOKS[key].method).parameters)
    for cls, own in HOOKS[key].overrides.items():
        parameters = inspect.signature(own).parameters
        takes_any = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= {
            p.kind for p in parameters.values()
        }
        if not takes_any and f"{cls}.{own.__name__}" not in OTHER_PARAMETERS:
            assert list(parameters) == wanted, f"{cls}.{own.__name__}"


def test_a_change_upstream_is_noticed(monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    def train_step(self, batch: dict) -> dict:
        return {"loss": 0.0}

    monkeypatch.setattr(nnUNetTrainer, "train_step", train_step)
    monkeypatch.setitem(globals(), "HOOKS", upstream_hooks.hooks())
    with pytest.raises(AssertionError, match="train_step .overridden by OneShotDistillTrainer, OneShotTrainer"):
        test_hooks_of_the_installed_release_are_known()


def test_the_trainers_loader_logger_and_planner_are_among_them():
    names = {key.rpartition(":")[2] for key in HOOKS}
    assert {
        "nnUNetTrainer.initialize",
        "nnUNetTrainer.do_split",
        "nnUNetDataLoader.generate_train_batch",
        "LocalLogger.plot_progress_png",
        "ExperimentPlanner.plan_experiment",
    } <= names
