"""Both stages of a cascade: what the first leaves to the second, and what the second makes of it."""

import json
import shutil
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_data import read_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.errors import OneShotError

PLANS, FIRST, SECOND = "nnUNetOneShotCPUPlans", "3d_lowres", "3d_cascade_fullres"


@pytest.fixture(autouse=True)
def _quick_registration(monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [3, 3, 2]}}))


def model(dataset, name, configuration):
    return dataset.results / f"{name}__{PLANS}__{configuration}"


def left_to_second_stage(dataset, name, fold=0):
    return model(dataset, name, FIRST) / f"fold_{fold}" / "predicted_next_stage" / SECOND


def pretend_first_stage(dataset, name, fold=0):
    """Segmentations as a first stage would leave them."""
    folder = left_to_second_stage(dataset, name, fold)
    folder.mkdir(parents=True)
    for case in dataset.cases:
        shape = blosc2.open(str(dataset.preprocessed / f"{PLANS}_3d_fullres" / f"{case}.b2nd")).shape[1:]
        made = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
        blosc2.asarray(made, urlpath=str(folder / f"{case}.b2nd"))
    return folder


def train(dataset, name, configuration, fold=0, **options):
    from nnunetv2.run.run_training import run_training

    run_training(str(dataset.id), configuration, fold, name, PLANS, device=torch.device("cpu"), **options)
    return model(dataset, name, configuration) / f"fold_{fold}"


def weights(folder):
    return torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]


def log_of(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("training_log_*.txt")))


def predict(dataset, name, configuration, out, *options):
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    arguments = ["-i", dataset.raw / "imagesTr", "-o", out, "-d", dataset.id, "-c", configuration, "-tr", name]
    arguments += ["-p", PLANS, "-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0, *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nnUNetv2_predict", *map(str, arguments)])
        predict_entry_point()
    return out


def test_both_stages_are_trained_and_predict(cascade, short, tmp_path):
    dataset, name = cascade(), "OneShotSynthesisTrainer_1epoch"
    train(dataset, name, FIRST)
    left = left_to_second_stage(dataset, name)
    assert sorted(path.name for path in left.iterdir()) == [f"{case}.b2nd" for case in dataset.cases]
    folder = train(dataset, name, SECOND)
    entrance = next(value for value in weights(folder).values() if value.ndim == 5)
    assert entrance.shape[1] == 1 + 2
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    first = predict(dataset, name, FIRST, tmp_path / "first")
    second = predict(dataset, name, SECOND, tmp_path / "second", "-prev_stage_predictions", first)
    assert read_image(second / "case_00.nii.gz").shape == read_image(dataset.image("case_00")).shape
    export = ["export", "-d", str(dataset.id), "-c", SECOND, "-tr", name, "-p", PLANS, "-o", str(tmp_path / "model")]
    assert main(export) == 0


@pytest.mark.parametrize("name", ["OneShotAtlasTrainer_1epoch", "OneShotPropagationTrainer_1epoch"])
def test_other_trainers_learn_from_one_label(name, cascade, short):
    dataset = cascade(labelled=("case_00",))
    pretend_first_stage(dataset, name)
    folder = train(dataset, name, SECOND)
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_the_student_segments_whole_cases_for_a_round(cascade, short, monkeypatch):
    import nnunet_oneshot.trainers.distill as module

    dataset, name = cascade(labelled=("case_00",), n_cases=3), "OneShotDistillTrainer_5epochs"
    pretend_first_stage(dataset, name)
    monkeypatch.setattr(module, "trust_in", lambda synthetic, real: np.ones(len(synthetic)))
    monkeypatch.setattr(module, "_COMPARED_PATCHES", (2, 2))
    folder = train(dataset, name, SECOND)
    assert "Registration is guided by the segmentations of the averaged student" in log_of(folder)
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_regions_and_ignore_label(cascade, short):
    labels = {"background": 0, "both": [1, 2], "right": [2], "ignore": 3}
    dataset = cascade(labelled=("case_00",), labels=labels, regions_class_order=[1, 2])
    name = "OneShotDistillTrainer_1epoch"
    train(dataset, name, FIRST)
    left = left_to_second_stage(dataset, name)
    assert set(np.unique(blosc2.open(str(left / "case_03.b2nd"))[:])) <= {0, 1, 2}
    assert all(torch.isfinite(value).all() for value in weights(train(dataset, name, SECOND)).values())


def test_the_first_stage_leaves_what_nnunet_would(cascade, make_trainer):
    dataset, name = cascade(), "OneShotSynthesisTrainer_1epoch"
    trainer = make_trainer(dataset, name, configuration=FIRST)
    trainer.initialize()
    trainer.perform_actual_validation()
    trainer.configuration_manager.configuration["next_stage"] = SECOND
    nnUNetTrainer.perform_actual_validation(trainer)
    stock = model(dataset, name, FIRST) / "predicted_next_stage" / SECOND
    validation = trainer.do_split()[1]
    assert sorted(path.stem for path in stock.iterdir()) == validation
    for case in validation:
        ours, theirs = (blosc2.open(str(f / f"{case}.b2nd")) for f in (left_to_second_stage(dataset, name), stock))
        assert ours.dtype == theirs.dtype and np.array_equal(ours[:], theirs[:])


def test_all_cases_are_one_fold_and_validation_writes_again(cascade, short):
    dataset, name = cascade(labelled=("case_00",)), "OneShotAtlasTrainer_1epoch"
    folder = train(dataset, name, FIRST, fold="all")
    left = left_to_second_stage(dataset, name, "all")
    assert len(list(left.iterdir())) == len(dataset.cases)
    shutil.rmtree(left)
    train(dataset, name, FIRST, fold="all", only_run_validation=True)
    assert len(list(left.iterdir())) == len(dataset.cases)
    assert {path.name for path in (folder / "predicted_next_stage").iterdir()} == {SECOND}


def test_a_second_stage_that_is_not_preprocessed_is_named(cascade, make_trainer, short):
    dataset = cascade(labelled=("case_00",))
    shutil.rmtree(dataset.preprocessed / f"{PLANS}_3d_fullres")
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer", configuration=FIRST)
    trainer.initialize()
    trainer.perform_actual_validation()
    log = log_of(model(dataset, "OneShotSynthesisTrainer", FIRST) / "fold_0")
    assert "Nothing is segmented for configuration 3d_cascade_fullres" in log
    assert "configuration 3d_fullres has not been preprocessed" in log


def test_missing_segmentations_are_named_with_what_makes_them(cascade, make_trainer):
    dataset, name = cascade(), "OneShotSynthesisTrainer_1epoch"
    folder = pretend_first_stage(dataset, name, fold=1)
    (folder / "case_03.b2nd").unlink()
    command = f"`nnUNetv2_train {dataset.name} {FIRST} 1 -tr {name} -p {PLANS}`"
    with pytest.raises(OneShotError, match=f"{folder} holds no .* of case_03;.* {command}.*add --val"):
        make_trainer(dataset, name, configuration=SECOND, fold=1).initialize()
    with pytest.raises(OneShotError, match="of case_00, case_01, .* and 1 more;"):
        make_trainer(dataset, name, configuration=SECOND, fold=0).initialize()


def test_segmentations_of_other_images_are_refused(cascade, make_trainer):
    dataset, name = cascade(), "OneShotSynthesisTrainer_1epoch"
    path = pretend_first_stage(dataset, name) / "case_02.b2nd"
    path.unlink()
    blosc2.asarray(np.zeros((3, 4, 5), np.uint8), urlpath=str(path))
    with pytest.raises(OneShotError, match=r"of case_02 .* has \(3, 4, 5\) voxels, its preprocessed image"):
        make_trainer(dataset, name, configuration=SECOND).initialize()


def test_a_benchmark_of_the_second_stage_is_refused(cascade, tmp_path, capsys):
    dataset = cascade(labelled=("case_00",))
    command = ["benchmark", "-d", str(dataset.id), "-c", SECOND, "-p", PLANS, "-o", str(tmp_path / "out")]
    assert main(command) == 1
    assert f"compare methods with -c {FIRST}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_batches_hold_the_first_stage_and_the_teacher_the_image_alone(cascade, make_trainer, short):
    dataset, name = cascade(channels=("T1", "T2")), "OneShotDistillTrainer_1epoch"
    pretend_first_stage(dataset, name)
    trainer = make_trainer(dataset, name, configuration=SECOND)
    trainer.initialize()
    assert trainer.coarseness == (2.0, 2.0, 2.0)
    trainer.dataloader_train, progress = trainer.get_dataloaders()
    batch = next(trainer.dataloader_train)
    assert (batch["data"].shape[1], batch["real"].shape[1], batch["previous"].shape[1]) == (4, 2, 1)
    assert trainer._with_previous(next(progress))["real"].shape[1] == 4
    student, teacher = ([p.shape for p in net.parameters()] for net in (trainer.network, trainer.distiller.teacher))
    assert (student[0][1], teacher[0][1]) == (4, 2)
    case = dataset.cases[0]
    shown = trainer.prepared.network_input(case)
    assert np.array_equal(shown[:2], trainer.prepared.image(case))
    assert np.array_equal(shown[3], trainer.prepared.previous.open(case)[:] == 2)
    assert len(replace(trainer.prepared, previous=None).network_input(case)) == 2
