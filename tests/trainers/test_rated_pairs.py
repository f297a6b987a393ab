"""Registrations that are rated bad make no patch: neither synthetic nor real, before and after rounds."""

import json

import pytest

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset.ratings import FORMAT, RATINGS_FILE


@pytest.fixture(autouse=True)
def _quick_registration(monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [2]}}))


def rate_bad(dataset, cases):
    name = "nnUNetOneShotCPUPlans_3d_fullres"
    entries = [{"registrations": name, "atlas": "case_00", "case": case, "rating": "bad"} for case in cases]
    content = {"format": FORMAT, "version": 1, "dataset": dataset.name, "ratings": entries}
    (dataset.preprocessed / RATINGS_FILE).write_text(json.dumps(content))


def built(make_trainer, dataset):
    trainer = make_trainer(dataset, "OneShotDistillTrainer_5epochs")
    trainer.initialize()
    return trainer, *trainer.get_dataloaders()


def test_loaders_never_draw_a_bad_pair_and_the_log_tells_it(prepare, make_trainer, short, capsys):
    dataset = prepare(labelled=("case_00",))
    trainer, patches, progress = built(make_trainer, dataset)
    unlabelled, watched = trainer.roles.unlabelled, trainer.roles.progress
    assert len(unlabelled) > 1 and {case for _, case in patches.data_loader._loader.pairs} == set(unlabelled)
    rate_bad(dataset, [unlabelled[0]])
    capsys.readouterr()
    trainer, patches, progress = built(make_trainer, dataset)
    assert {case for _, case in patches.data_loader._loader.pairs} == set(unlabelled[1:])
    assert {case for _, case in progress.data_loader._loader.pairs} == set(watched)
    drawn = {(from_real, key) for _ in range(8) for from_real, key in _keys(next(patches))}
    assert {key for _, key in drawn} <= set(unlabelled[1:]) and {real for real, _ in drawn} == {False, True}
    assert unlabelled[0] not in trainer._round_cases
    assert f"rated bad in {dataset.preprocessed / RATINGS_FILE}: {unlabelled[0]}." in capsys.readouterr().out


def _keys(batch):
    return zip(batch["from_real"].tolist(), batch["keys"], strict=True)


def test_progress_is_watched_on_training_cases_where_no_other_is_left(prepare, make_trainer, short, capsys):
    dataset = prepare(labelled=("case_00",))
    trainer = make_trainer(dataset, "OneShotDistillTrainer_5epochs")
    assert trainer.roles.held_out
    rate_bad(dataset, trainer.roles.progress)
    trainer, _, progress = built(make_trainer, dataset)
    assert {case for _, case in progress.data_loader._loader.pairs} <= set(trainer.roles.unlabelled)
    assert not trainer.roles.held_out
    assert "progress is watched on training cases" in capsys.readouterr().out


def test_a_training_without_any_pair_left_is_refused(prepare, make_trainer, short):
    dataset = prepare(labelled=("case_00",))
    trainer = make_trainer(dataset, "OneShotDistillTrainer_5epochs")
    rate_bad(dataset, trainer.roles.unlabelled)
    with pytest.raises(OneShotError, match="nothing to make patches from"):
        built(make_trainer, dataset)
