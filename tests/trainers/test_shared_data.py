"""Preprocessed data that cannot be written to, as on shared clusters."""

import json
import os
import sys

import pytest

from nnunet_oneshot.cli import main

PLANS = "nnUNetOneShotCPUPlans"
_READ_ONLY: list[str] = []
_CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _refuse(event: str, arguments: tuple) -> None:
    """Raises what an operating system does, which stops nothing that the superuser does."""
    if not _READ_ONLY or event not in ("open", "os.mkdir", "os.rename", "os.remove"):
        return
    if event == "open" and not (arguments[2] or 0) & _CREATES:
        return
    for path in arguments[:2] if event == "os.rename" else arguments[:1]:
        if isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(_READ_ONLY[0] + os.sep):
            raise PermissionError(13, "Permission denied", str(path))


sys.addaudithook(_refuse)


@pytest.fixture
def shared(prepare, monkeypatch):
    """A preprocessed dataset that nothing can be written to; None of the files of this package is in it yet."""
    dataset = prepare()
    for name in ("splits_final.json", "oneshot_atlas.json"):
        (dataset.preprocessed / name).unlink(missing_ok=True)
    settings = {"registration": {"refine_iterations": [3, 3, 2]}}
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(settings))
    monkeypatch.setattr(sys.modules[__name__], "_READ_ONLY", [str(dataset.preprocessed.parent)])
    return dataset


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture
def trains(monkeypatch):
    import torch
    from nnunetv2.run.run_training import run_training

    from nnunet_oneshot.environment import TRAINER_FOLDER
    from nnunet_oneshot.trainers.base import OneShotTrainer

    original = OneShotTrainer.initialize

    def initialize(self):
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 1
        original(self)

    monkeypatch.setattr(OneShotTrainer, "initialize", initialize)
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    name = "OneShotDistillTrainer_1epoch"
    return lambda dataset, fold: run_training(
        str(dataset.id), "3d_fullres", fold, name, PLANS, device=torch.device("cpu")
    )


def test_a_folder_of_the_users_takes_what_is_added(shared, trains, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("nnUNet_oneshot_cache", str(cache))
    before = listing(shared.preprocessed)
    own = ["-d", str(shared.id), "-p", PLANS, "-c", "3d_fullres"]
    assert main(["register", *own, "-f", "0", "-np", "1"]) == 0
    assert main(["propagate", *own, "-f", "0", "-o", str(tmp_path / "propagated")]) == 0
    kept = cache / shared.name
    registrations = listing(kept / "oneshot_registrations")
    trains(shared, 0)
    assert listing(shared.preprocessed) == before
    assert {"splits_final.json", "oneshot_atlas.json"} <= {path.name for path in kept.iterdir()}
    # The training found what `register` had made.
    assert listing(kept / "oneshot_registrations") == registrations
    assert list(shared.results.glob("OneShotDistillTrainer_1epoch__*/fold_0/checkpoint_final.pth"))


def test_files_of_the_shared_folder_come_first(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_oneshot_cache", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules[__name__], "_READ_ONLY", [])
    train, val = shared.cases[:3], shared.cases[3:]
    (shared.preprocessed / "splits_final.json").write_text(json.dumps([{"train": train, "val": val}]))
    atlas = {"atlases": [train[1]], "chosen_by": "program", "how": "by hand"}
    (shared.preprocessed / "oneshot_atlas.json").write_text(json.dumps(atlas))
    own = ["-d", str(shared.id), "-p", PLANS, "-c", "3d_fullres", "-np", "1", "--no_figures"]
    assert main(["register", *own, "-f", "0"]) == 0
    assert f"atlas {train[1]}" in capsys.readouterr().out
    # A fold beyond the file that lacks the atlas would note its own choice in the file.
    before = (shared.preprocessed / "oneshot_atlas.json").read_text()
    splits = [{"train": train, "val": val}, {"train": [train[0], *val], "val": train[1:]}]
    (shared.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    assert main(["register", *own, "-f", "1"]) == 0
    assert (shared.preprocessed / "oneshot_atlas.json").read_text() == before


@pytest.mark.parametrize("missing", [True, False])
def test_without_it_a_sentence_names_it(missing, shared, trains, capsys, monkeypatch):
    from nnunet_oneshot.errors import OneShotError

    if not missing:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "_READ_ONLY", [])
            split = [{"train": shared.cases[:3], "val": shared.cases[3:]}]
            (shared.preprocessed / "splits_final.json").write_text(json.dumps(split))
            (shared.preprocessed / "oneshot_atlas.json").write_text(json.dumps({"atlases": shared.cases[:1]}))
    named = "splits_final.json" if missing else "oneshot_registrations"
    assert main(["register", "-d", str(shared.id), "-p", PLANS, "-c", "3d_fullres", "-f", "0", "-np", "1"]) == 1
    told = capsys.readouterr().err
    assert named in told and "nnUNet_oneshot_cache" in told
    with pytest.raises(OneShotError, match="nnUNet_oneshot_cache"):
        trains(shared, 0)
