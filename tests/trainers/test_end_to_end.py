"""nnU-Net's own command for training, from preprocessed cases to scores, with real registrations and loaders."""

import json
import zipfile

import numpy as np
import pytest
import torch

CONFIGURATIONS = ["3d_fullres", "2d"]
NAMES = ["OneShotAtlasTrainer", "OneShotPropagationTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer"]
PLANS = "nnUNetOneShotCPUPlans"


@pytest.fixture(autouse=True)
def _quick_registration(monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [3, 3, 2]}}))


def train(dataset, name, configuration="3d_fullres", fold=0, **options):
    from nnunetv2.run.run_training import run_training

    run_training(str(dataset.id), configuration, fold, name, PLANS, device=torch.device("cpu"), **options)
    return dataset.results / f"{name}__{PLANS}__{configuration}" / f"fold_{fold}"


def logs(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("training_log_*.txt")))


def weights(folder, file="checkpoint_final.pth"):
    saved = torch.load(folder / file, weights_only=False)["network_weights"]
    return torch.cat([value.flatten().float() for value in saved.values()])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_each_trainer_runs_on_one_label(name, configuration, prepare, short):
    dataset = prepare(configuration, labelled=("case_00",), shape=(18, 20, 24))
    folder = train(dataset, f"{name}_1epoch", configuration)
    assert torch.isfinite(weights(folder)).all()
    assert "there is nothing to score" in logs(folder)
    assert "Atlas: case_00" in logs(folder)


@pytest.mark.parametrize("fold", [0, "all"])
def test_a_model_with_nothing_to_score_is_exported_by_nnunet(fold, prepare, short, tmp_path, monkeypatch):
    from nnunetv2.model_sharing import model_export

    dataset = prepare(labelled=("case_00",))
    train(dataset, "OneShotSynthesisTrainer_1epoch", fold=fold)
    monkeypatch.setattr(model_export, "nnUNet_results", str(dataset.results.parent))
    target = tmp_path / "model.zip"
    model_export.export_pretrained_model(
        dataset.name, str(target), ("3d_fullres",), "OneShotSynthesisTrainer_1epoch", PLANS, (fold,)
    )
    with zipfile.ZipFile(target) as archive:
        assert any(name.endswith("checkpoint_final.pth") for name in archive.namelist())


def test_2d_images(prepare, short):
    dataset = prepare("2d", labelled=("case_00",), shape=(32, 36), ending=".png", channels=("grey",))
    folder = train(dataset, "OneShotDistillTrainer_5epochs", "2d")
    assert torch.isfinite(weights(folder)).all()


def test_several_channels_and_several_atlases(prepare, short):
    dataset = prepare(labelled=("case_00", "case_01", "case_02"), channels=("T1", "T2"))
    folder = train(dataset, "OneShotDistillTrainer_5epochs")
    assert torch.isfinite(weights(folder)).all()
    assert "Atlases: " in logs(folder)


def test_two_cases_are_enough(prepare, short):
    dataset = prepare(labelled=("case_00",), n_cases=2)
    folder = train(dataset, "OneShotDistillTrainer_1epoch")
    assert "it has no validation case" in logs(folder)


def test_regions_and_ignore_label(prepare, short):
    labels = {"background": 0, "both": [1, 2], "right": [2], "ignore": 3}
    dataset = prepare(labelled=("case_00",), labels=labels, regions_class_order=[1, 2])
    folder = train(dataset, "OneShotDistillTrainer_5epochs")
    assert torch.isfinite(weights(folder)).all()


def test_validation_scores_and_exports_probabilities(prepare, short):
    dataset = prepare()
    folder = train(dataset, "OneShotDistillTrainer_1epoch", export_validation_probabilities=True)
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2"}
    assert len(list((folder / "validation").glob("*.npz"))) == len(summary["metric_per_case"]) == 2
    (folder / "validation" / "summary.json").unlink()
    train(dataset, "OneShotDistillTrainer_1epoch", only_run_validation=True)
    assert json.loads((folder / "validation" / "summary.json").read_text())["mean"] == summary["mean"]


def test_interrupted_run_is_resumed(prepare, short, monkeypatch):
    from nnunet_oneshot.trainers import OneShotDistillTrainer

    dataset = prepare(labelled=("case_00",))
    original = OneShotDistillTrainer.on_train_epoch_start

    def interrupt(self):
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(OneShotDistillTrainer, "on_train_epoch_start", interrupt)
        train(dataset, "OneShotDistillTrainer_5epochs")
    folder = dataset.results / f"OneShotDistillTrainer_5epochs__{PLANS}__3d_fullres" / "fold_0"
    assert {"checkpoint_latest.pth", "checkpoint_latest_teacher.pth"} <= {file.name for file in folder.iterdir()}
    train(dataset, "OneShotDistillTrainer_5epochs", continue_training=True)
    assert not (folder / "checkpoint_latest.pth").exists()
    assert not (folder / "checkpoint_latest_teacher.pth").exists()
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert final["current_epoch"] == 5
    assert len(final["logging"]["train_losses"]) == 5
    assert not list(folder.glob("*_teacher*"))


@pytest.mark.parametrize("processes", ["0", "2"])
def test_labels_other_than_the_atlas_do_not_reach_the_weights(processes, prepare, short, monkeypatch, tmp_path):
    """Everything that the atlas's label is not is replaced by noise, and the weights stay the same."""
    import shutil

    import blosc2

    from nnunet_oneshot.data.atlas import save_choice

    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    dataset = prepare()
    save_choice(str(dataset.preprocessed), ["case_00"], by_user=True, how="named")
    # Long enough for the rounds in which the student guides the registration.
    name = "OneShotDistillTrainer_5epochs"
    trained = []
    for _ in range(2):
        trained.append(weights(train(dataset, name, fold=1)))
        shutil.rmtree(dataset.results)
        for path in dataset.preprocessed.glob(f"{PLANS}_3d_fullres/*_seg.b2nd"):
            if not path.name.startswith("case_00"):
                shape = blosc2.open(str(path))[:].shape
                noise = np.random.default_rng(0).integers(0, 3, shape).astype(np.int8)
                path.unlink()
                blosc2.asarray(noise, urlpath=str(path))
    assert torch.equal(*trained)


def test_checkpoints_hold_no_teacher_and_predict_with_stock_nnunet(prepare, short, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    dataset = prepare(labelled=("case_00",))
    folder = train(dataset, "OneShotDistillTrainer_1epoch")
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=True, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), (0,), "checkpoint_final.pth")
    image = np.random.default_rng(0).uniform(size=(1, 16, 18, 14)).astype(np.float32)
    labels = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    assert labels.shape == (16, 18, 14)


def test_dataset_planned_by_stock_nnunet(tiny_dataset, short, monkeypatch):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )
    from nnunetv2.run.run_training import run_training

    dataset = tiny_dataset(labelled="all", n_cases=6)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner cannot do with 0
    extract_fingerprints([dataset.id], num_processes=1)
    plan_experiments([dataset.id])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    preprocess([dataset.id], configurations=("3d_fullres",), num_processes=(1,))
    name = "OneShotSynthesisTrainer_1epoch"
    run_training(str(dataset.id), "3d_fullres", "all", name, device=torch.device("cpu"))
    folder = dataset.results / f"{name}__nnUNetPlans__3d_fullres" / "fold_all"
    assert torch.isfinite(weights(folder)).all()
    assert "their intensity statistics come from the labels of all cases" in logs(folder)
    # Chosen once for all folds, from the training part of the first.
    assert "medoid of 4 training images, no label seen" in logs(folder)


@pytest.mark.parametrize("name", ["OneShotDistillTrainer_5epochs", "OneShotSupervisedTrainer_1epoch"])
def test_partly_labelled_atlases_and_no_other_image(name, prepare, short):
    dataset = prepare(n_cases=3)
    content = json.loads((dataset.preprocessed / "dataset.json").read_text())
    content["oneshot"] = {"partial": {"case_00": ["left"], "case_01": ["right"], "case_02": ["left"]}}
    (dataset.preprocessed / "dataset.json").write_text(json.dumps(content))
    (dataset.preprocessed / "oneshot_atlas.json").unlink()
    folder = train(dataset, name, fold="all")
    assert torch.isfinite(weights(folder)).all()
    assert "Partly labelled atlases" in logs(folder) or "reads the labels of all 3 labelled cases" in logs(folder)
