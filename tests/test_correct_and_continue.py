"""From one label to a few through the commands: suggest, predict, mend, preprocess with the same plans, train on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import read_image, write_image

from nnunet_oneshot.cli import main

PLANS = "nnUNetOneShotCPUPlans"
TRAINER = "OneShotSynthesisTrainer"
SHORT = """
import sys
from nnunet_oneshot.trainers.base import OneShotTrainer
original = OneShotTrainer.initialize
def initialize(self):
    self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1
    original(self)
OneShotTrainer.initialize = initialize
from nnunetv2.run.run_training import run_training_entry
run_training_entry()
"""


def train(dataset, length, *arguments):
    """nnU-Net's command, with two iterations an epoch."""
    command = [str(dataset.id), "3d_fullres", "all", "-tr", f"{TRAINER}_{length}", "-p", PLANS, "-device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", SHORT, *command, *arguments], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dataset.results / f"{TRAINER}_{length}__{PLANS}__3d_fullres", done.stdout


def weights(model):
    saved = torch.load(model / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    return torch.cat([value.flatten().float() for value in saved.values()])


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


@pytest.fixture
def student(prepared_dataset, monkeypatch):
    """A tiny dataset of one label, and a student trained on it."""
    from nnunet_oneshot.environment import TRAINER_FOLDER

    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    settings = {"registration": {"refine_iterations": [3, 3, 2]}, "initial_lr": 1e-9}
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(settings))
    dataset = prepared_dataset(labelled=("case_00",), n_cases=4)
    return dataset, train(dataset, "1epoch")[0]


def test_a_mended_prediction_becomes_an_atlas_and_training_goes_on(student, tmp_path, capsys):
    dataset, model = student
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
    predict = ["-d", dataset.name, "-tr", f"{TRAINER}_1epoch", "-p", PLANS, "-c", "3d_fullres", "-f", "all"]
    predict += ["-i", str(dataset.raw / "imagesTr"), "-o", str(predictions), "-device", "cpu", "-npp", "1", "-nps", "1"]
    code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as run; run()"
    subprocess.run([sys.executable, "-c", code, *predict], check=True, capture_output=True, env=os.environ)
    mended = read_image(predictions / f"{case}.nii.gz").astype(np.uint8)
    image = read_image(dataset.image(case))
    mended[:] = np.digitize(image, [70, 130])
    write_image(dataset.label(case), mended)

    plans = (dataset.preprocessed / f"{PLANS}.json").read_text()
    assert main(["preprocess", "-d", str(dataset.id), "-p", PLANS, "-c", "3d_fullres", "--no_pbar"]) == 0
    assert f"{case} got labels since the atlas was chosen" in capsys.readouterr().out
    assert (dataset.preprocessed / f"{PLANS}.json").read_text() == plans
    final = model / "fold_all" / "checkpoint_final.pth"
    second, output = train(dataset, "5epochs", "-pretrained_weights", str(final))
    assert f"Atlases: case_00, {case} (every labelled training case)" in output
    # At this learning rate the weights stay where they began: at the student's.
    assert torch.allclose(weights(second), weights(model), atol=1e-5)
    assert Path(final).is_file() and second != model
