"""An exported model is found and predicts without this package, and nothing that exists is overwritten."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tiny_networks import configuration

from nnunet_oneshot.cli import main

PLANS, CONFIGURATION, TRAINER = "tinyPlans", "3d_fullres", "CustomTrainerForExport"
ARCHITECTURE = configuration(3, features=(4, 8)).configuration["architecture"]


def resampling(is_seg):
    return {"is_seg": is_seg, "order": 1, "order_z": 0, "force_separate_z": None}


def tiny_plans():
    configuration = {
        "data_identifier": "tinyPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [8, 8, 8],
        "median_image_size_in_voxels": [8.0, 8.0, 8.0],
        "spacing": [1.0, 1.0, 2.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling(False),
        "resampling_fn_seg_kwargs": resampling(True),
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling(False),
        "architecture": ARCHITECTURE,
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset901_Tiny",
        "plans_name": PLANS,
        "original_median_spacing_after_transp": [1.0, 1.0, 2.0],
        "original_median_shape_after_transp": [8, 8, 8],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "OneShotPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "oneshot": {"version": 1},
    }


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A model of a trainer that only a folder in nnUNet_extTrainer knows; returns its folder in nnUNet_results."""
    torch.set_num_threads(1)
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "custom_trainer_for_export.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        f"class {TRAINER}(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    folder = tmp_path / "results" / "Dataset901_Tiny" / f"{TRAINER}__{PLANS}__{CONFIGURATION}"
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    for fold in (0, 1):
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.manual_seed(fold)
        network = get_network_from_plans(
            ARCHITECTURE["network_class_name"],
            ARCHITECTURE["arch_kwargs"],
            ARCHITECTURE["_kw_requires_import"],
            1,
            2,
            deep_supervision=True,
        )
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": {"large": torch.zeros(1000)},
            "teacher": {"weights": torch.zeros(10)},
            "current_epoch": 5,
            "trainer_name": TRAINER,
            "init_args": {"plans": tiny_plans(), "configuration": CONFIGURATION, "fold": fold},
            "inference_allowed_mirroring_axes": (1, 2),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(tiny_plans()))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def export(*arguments, out):
    options = ["export", "-d", "901", "-c", CONFIGURATION, "-p", PLANS, "-tr", TRAINER, "-o", str(out)]
    return main([*options, *map(str, arguments)])


def test_checkpoints_name_the_stock_trainer_and_hold_nothing_of_ours(trained, tmp_path, capsys):
    assert export(out=tmp_path / "model") == 0
    assert "agree" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["dataset.json", "fold_0", "fold_1", "plans.json"]
    checkpoint = torch.load(tmp_path / "model" / "fold_1" / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint["init_args"]["configuration"] == CONFIGURATION
    assert checkpoint["inference_allowed_mirroring_axes"] == (1, 2)
    assert "teacher" not in checkpoint and "optimizer_state" not in checkpoint
    assert (tmp_path / "model" / "plans.json").read_text() == (trained / "plans.json").read_text()


def test_stock_command_predicts_without_this_package(trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    array = np.random.default_rng(0).normal(size=(9, 10, 8)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(images / "case_0000.nii.gz"))
    assert export("-f", "0", "-i", images, out=tmp_path / "model") == 0
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "nnunet_oneshot.py").write_text("raise ImportError('not installed')\n")
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_extTrainer"}
    environment["PYTHONPATH"] = str(blocked)
    command = [str(Path(sys.executable).parent / "nnUNetv2_predict_from_modelfolder"), "-f", "0", "-device", "cpu"]
    command += ["-i", str(images), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "model"), "-npp", "1", "-nps", "1"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert sitk.ReadImage(str(tmp_path / "out" / "case.nii.gz")).GetSize() == (8, 10, 9)


def test_zip_holds_what_nnunet_installs(trained, tmp_path):
    assert export("-f", "1", out=tmp_path / "model.zip") == 0
    names = zipfile.ZipFile(tmp_path / "model.zip").namelist()
    stem = f"Dataset901_Tiny/nnUNetTrainer__{PLANS}__{CONFIGURATION}"
    assert sorted(names) == [f"{stem}/dataset.json", f"{stem}/fold_1/checkpoint_final.pth", f"{stem}/plans.json"]


def test_existing_folder_receives_a_named_model_once(trained, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    assert export("-f", "0", out=tmp_path / "models") == 0
    model = tmp_path / "models" / f"nnUNetTrainer__{PLANS}__{CONFIGURATION}"
    before = (model / "fold_0" / "checkpoint_final.pth").stat().st_mtime_ns
    assert export("-f", "0", out=tmp_path / "models") == 1
    assert "exists already" in capsys.readouterr().err
    assert (model / "fold_0" / "checkpoint_final.pth").stat().st_mtime_ns == before
    assert [p.name for p in (tmp_path / "models").iterdir()] == [model.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-tr", "NoSuchTrainer"], "no trained model NoSuchTrainer"),
        (["-f", "3"], "no finished training"),
        (["-d", "902"], "was not found"),
        (["-i", "empty"], "holds no images"),
    ],
)
def test_what_does_not_exist_is_named(trained, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert export(*change, out=tmp_path / "model") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".partial*"))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(trained, tmp_path, capsys):
    path = trained / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(path), "logging": Harmful(tmp_path / "ran")}, path)
    assert export("-f", "0", out=tmp_path / "model") == 1
    assert "checkpoint_final.pth holds more than numbers and weights" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model").exists()


@pytest.mark.parametrize("option", ["-tr", "-p", "-c"])
def test_names_are_no_paths(trained, tmp_path, capsys, option):
    assert export(option, f"../{trained.name}", out=tmp_path / "model") == 1
    assert f"of {option} cannot be used as the name of a file" in capsys.readouterr().err


def test_damaged_checkpoint_is_named_and_nothing_is_written(trained, tmp_path, capsys):
    path = trained / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])
    assert export("-f", "0", out=tmp_path / "model") == 1
    assert "fold_0" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
