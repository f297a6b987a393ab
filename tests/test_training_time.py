"""How long a training will take: the figures of a few iterations, the sentences, and that nothing else is touched."""

import os
import random

import numpy as np
import pytest
import torch

from nnunet_oneshot import training_time
from nnunet_oneshot.cli import main
from nnunet_oneshot.environment import TRAINER_FOLDER

PLANS = "nnUNetOneShotCPUPlans"
ESTIMATE = training_time.training_time


@pytest.fixture
def in_earnest(monkeypatch):
    """The module with its function, which the other tests go without."""
    monkeypatch.setattr(training_time, "training_time", ESTIMATE)
    return training_time


def times(**changes):
    """Iterations of 1 s, with a teacher 3 s, after two slow ones."""
    steps = [[9.0, 9.0, 1.0], [9.0, 9.0, 0.0]] + [[0.0, 1.0, 0.0]] * 3 + [[0.0, 3.0, 1.0]]
    known = {"device": "2 processor cores", "batch": 2, "workers": 1, "interval": 10, "per_epoch": [250, 50]}
    return {**known, "training": steps, "validation": [[5.0, 5.0, 0.0], [0.1, 0.1, 0.0], [0.1, 0.1, 0.0]], **changes}


def test_the_teacher_counts_by_its_share_and_the_first_iterations_not_at_all():
    iteration, wait, epoch = training_time.epoch_seconds(times(end=3.0))
    assert iteration == pytest.approx(0.9 * 1 + 0.1 * 3)
    assert wait == 0
    assert epoch == pytest.approx(250 * 1.2 + 50 * 0.2 + 3)


def test_without_teacher_or_with_one_step_alone_there_is_a_time_too():
    assert training_time.epoch_seconds(times(interval=0))[0] == pytest.approx(1)
    first = times(training=[[0.5, 4.0, 1.0]])
    assert training_time.epoch_seconds({**first, "validation": []})[0] == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (0.2, "Into a night of 10 h fits OneShotDistillTrainer_500epochs (6.9 h)"),
        (100.0, "Into a night of 10 h fits OneShotDistillTrainer_1epoch "),
        (1000.0, "Not even OneShotDistillTrainer_1epoch fits"),
        (0.001, "All of it fits into a night"),
    ],
)
def test_the_longest_training_of_a_night_is_named(step, told):
    found = times(training=[[0.0, step, 0.0]] * 3, validation=[[0.0, 0.0, 0.0]], interval=0)
    text = training_time._sentences(found)
    assert told in text and "come on top" in text and "bottleneck" not in text


def test_slow_patches_are_told_with_their_number():
    text = training_time._sentences(times(training=[[1.0, 1.0, 0.0]] * 3, interval=0))
    assert "Patches are the bottleneck: 1 a second" in text and "nnUNet_n_proc_DA" in text


def test_a_dataset_is_timed_and_nothing_of_it_or_of_this_process_changes(prepared_dataset, in_earnest):
    dataset = prepared_dataset(n_cases=4, shape=(20, 24, 20), labelled=["case_00"])
    folders = (dataset.raw, dataset.preprocessed.parent, dataset.results.parent)
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    environment = dict(os.environ)
    text = in_earnest.training_time(dataset.id, PLANS, "3d_fullres")
    assert "s an iteration, the teacher's part in one of 10 counted in" in text, text
    assert "OneShotDistillTrainer (1000 epochs) would take about" in text and "OneShotDistillTrainer_20epochs" in text
    assert {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")} == before
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert dict(os.environ) == environment


def test_a_plan_for_a_gpu_is_not_timed_on_a_processor(prepared_dataset, monkeypatch, tmp_path):
    dataset = prepared_dataset(n_cases=4, labelled=["case_00"])
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(training_time, "_MOST_VOXELS", 10)
    folder = tmp_path / "out"
    folder.mkdir()
    training_time._measure(str(dataset.id), PLANS, "3d_fullres", folder)
    found = training_time.load_json_checked(folder / "times.json", "times", {"reason": str})
    assert "are for a GPU, of which torch finds none" in found["reason"] and "training" not in found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TimeoutError(), "one step takes longer than 60 s"),
        (training_time.OneShotError("ended\nMemoryError: no room"), "ended early (MemoryError: no room)"),
        (OSError("no more processes"), "no more processes"),
    ],
)
def test_what_fails_is_a_sentence(in_earnest, monkeypatch, error, told):

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(in_earnest, "run_command", fails)
    assert told in in_earnest.training_time(1, "plans", "3d_fullres")


def test_planning_tells_it_unless_asked_not_to(tiny_dataset, monkeypatch, capsys):
    dataset = tiny_dataset()
    asked = []
    monkeypatch.setattr(training_time, "training_time", lambda *named: asked.append(named) or "It takes long.")
    plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "--no_pbar"]
    assert main([*plan, "-c", "2d", "3d_fullres", "-np", "1"]) == 0
    assert "It takes long." in capsys.readouterr().out
    assert asked == [(str(dataset.id), PLANS, "3d_fullres")]
    assert main([*plan, "-c", "3d_fullres", "--no_estimate"]) == main([*plan, "--no_pp"]) == 0
    assert len(asked) == 1
