"""Plans and data of a partly labelled data set in nnU-Net's own trainer and predictor."""

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.fingerprint import lent_fingerprint
from nnunet_oneshot.data.plans import FOR_OUR_TRAINERS

PLANS = "nnUNetOneShotCPUPlans"


def plan(dataset):
    return main(
        ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    )


def stock_trainer(dataset):
    return get_trainer_from_args(str(dataset.id), "3d_fullres", 0, "nnUNetTrainer", PLANS, device=torch.device("cpu"))


def test_whoever_starts_a_stock_trainer_reads_what_the_plans_are_for(tiny_dataset, capsys):
    torch.set_num_threads(1)
    dataset = tiny_dataset(4)
    assert plan(dataset) == 0
    assert f"Note: {FOR_OUR_TRAINERS}\n" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="dataset_fingerprint.json"):
        stock_trainer(dataset).run_training()
    # The last words of the last thing it prints before it stops, and in its log.
    assert capsys.readouterr().out.rstrip(" \n}'\"").endswith(FOR_OUR_TRAINERS)
    (log,) = dataset.results.rglob("training_log_*.txt")
    assert FOR_OUR_TRAINERS in log.read_text()


def test_where_all_cases_are_labelled_planning_says_nothing_of_trainers(tiny_dataset, capsys):
    assert plan(tiny_dataset(3, labelled="all")) == 0
    assert FOR_OUR_TRAINERS not in capsys.readouterr().out


def test_stock_trainer_and_predictor_run_on_our_plans(tiny_dataset, monkeypatch):
    torch.set_num_threads(1)
    labels = {"background": 0, "left": 1, "right": 2, "ignore": 3}
    dataset = tiny_dataset(4, labels=labels)
    assert plan(dataset) == 0
    trainer = stock_trainer(dataset)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    with lent_fingerprint(dataset.preprocessed):
        trainer.run_training()
    assert not (dataset.preprocessed / "dataset_fingerprint.json").exists()

    model = dataset.results / f"nnUNetTrainer__{PLANS}__3d_fullres"
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    out = dataset.raw.parent.parent / "predictions"
    out.mkdir()
    predictor.predict_from_files_sequential([[str(dataset.image("case_02"))]], [str(out / "case_02")])
    assert (out / "case_02.nii.gz").is_file()
