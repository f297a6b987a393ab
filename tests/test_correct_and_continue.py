"""From one label to a few through the commands: suggest, predict, mend, preprocess with the same plans, train on."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_data import read_image, write_image

from nnunet_oneshot.cli import main

PLANS = "nnUNetOneShotCPUPlans"
TRAINER = "OneShotSynthesisTrainer"


@pytest.fixture
def command(monkeypatch):
    """A function that runs one of nnU-Net's commands, trainings with two iterations an epoch."""
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point
    from nnunetv2.run.run_training import run_training_entry

    from nnunet_oneshot.environment import TRAINER_FOLDER
    from nnunet_oneshot.trainers.base import OneShotTrainer

    original = OneShotTrainer.initialize

    def initialize(self):
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1
        original(self)

    monkeypatch.setattr(OneShotTrainer, "initialize", initialize)
    for name in ("set_num_threads", "set_num_interop_threads"):
        monkeypatch.setattr(torch, name, lambda number: None)
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    entries = {"nnUNetv2_train": run_training_entry, "nnUNetv2_predict": predict_entry_point}

    def run(name, *arguments):
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments), "-device", "cpu"])
        entries[name]()

    return run


@pytest.fixture
def train(command, monkeypatch):
    """A function that trains fold all of a dataset, with a learning rate, and gives the model's folder."""

    def run(dataset, length, learning_rate, *arguments):
        settings = {"registration": {"refine_iterations": [3, 3, 2]}, "initial_lr": learning_rate}
        monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(settings))
        trainer = f"{TRAINER}_{length}"
        command("nnUNetv2_train", dataset.id, "3d_fullres", "all", "-tr", trainer, "-p", PLANS, *arguments)
        return dataset.results / f"{trainer}__{PLANS}__3d_fullres"

    return run


def weights(model):
    """All but those of the output layers, which nnU-Net's `-pretrained_weights` leaves out."""
    saved = torch.load(model / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    return torch.cat([value.flatten().float() for name, value in saved.items() if ".seg_layers." not in name])


def fuse(dataset, model, case, tmp_path):
    """Label propagation with the student's help segments the image like both."""
    images, out = tmp_path / "images", tmp_path / "fused"
    images.mkdir()
    shutil.copy(dataset.image(case), images)
    command = ["propagate", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS, "-f", "all", "-i", str(images)]
    assert main([*command, "-o", str(out), "--student", str(model)]) == 1
    assert not out.exists()
    assert main([*command, "-o", str(out), "--student", str(model), "--method", "corrected"]) == 0
    report = json.loads((out / "propagation.json").read_text())
    assert report["student"] == str(model) and set(report["trust"][case]) == {"1", "2"}
    assert set(np.unique(read_image(out / f"{case}.nii.gz"))) == {0, 1, 2}


def test_a_mended_prediction_becomes_an_atlas_and_training_goes_on(prepared_dataset, command, train, tmp_path, capsys):
    dataset = prepared_dataset(labelled=("case_00",), n_cases=4)
    model = train(dataset, "1epoch", 0.01)
    out = tmp_path / "next"
    options = ["-c", "3d_fullres", "-p", PLANS, "-f", "all", "--student", str(model), "-np", "1"]
    assert main(["suggest-atlas", "-d", str(dataset.id), "--next", "-o", str(out), *options]) == 0
    suggested = json.loads((out / "next_ranking.json").read_text())
    case = suggested["ranking"][0]["case"]
    assert {entry["case"] for entry in suggested["ranking"]} == {"case_01", "case_02", "case_03"}
    assert all(0 <= entry["agreement"] <= 1 for entry in suggested["ranking"])
    assert set(suggested["agreement"][case]) <= {"left", "right"} and suggested["student"] == str(model)
    fuse(dataset, model, case, tmp_path)

    predictions = tmp_path / "predictions"
    of_model = ["-d", dataset.name, "-tr", f"{TRAINER}_1epoch", "-p", PLANS, "-c", "3d_fullres", "-f", "all"]
    folders = ["-i", dataset.raw / "imagesTr", "-o", predictions]
    command("nnUNetv2_predict", *of_model, *folders, "-npp", 0, "-nps", 0)
    mended = read_image(predictions / f"{case}.nii.gz")
    mended[:] = np.digitize(read_image(dataset.image(case)), [70, 130])
    write_image(dataset.label(case), mended)

    plans = (dataset.preprocessed / f"{PLANS}.json").read_text()
    assert main(["preprocess", "-d", str(dataset.id), "-p", PLANS, "-c", "3d_fullres", "--no_pbar"]) == 0
    assert f"{case} got labels since the atlas was chosen" in capsys.readouterr().out
    assert (dataset.preprocessed / f"{PLANS}.json").read_text() == plans
    # At this learning rate weights stay where they begin.
    untrained = train(dataset, "5epochs", 1e-9)
    assert not torch.allclose(weights(untrained), weights(model), atol=1e-4)
    shutil.rmtree(untrained)
    final = model / "fold_all" / "checkpoint_final.pth"
    second = train(dataset, "5epochs", 1e-9, "-pretrained_weights", final)
    assert torch.allclose(weights(second), weights(model), atol=1e-4)
    log = "".join(path.read_text() for path in (second / "fold_all").glob("training_log_*.txt"))
    assert f"Atlases: case_00, {case} (every labelled training case" in log
    assert final.is_file() and second != model
