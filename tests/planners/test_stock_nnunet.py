"""Plans and data of a partly labelled data set in nnU-Net's own trainer and predictor."""

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.fingerprint import lent_fingerprint


def test_stock_trainer_and_predictor_run_on_our_plans(tiny_dataset, monkeypatch):
    torch.set_num_threads(1)
    labels = {"background": 0, "left": 1, "right": 2, "ignore": 3}
    dataset = tiny_dataset(4, labels=labels)
    plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    assert main(plan) == 0
    trainer = get_trainer_from_args(
        str(dataset.id), "3d_fullres", 0, "nnUNetTrainer", "nnUNetOneShotCPUPlans", device=torch.device("cpu")
    )
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    with lent_fingerprint(dataset.preprocessed):
        trainer.run_training()
    assert not (dataset.preprocessed / "dataset_fingerprint.json").exists()

    model = dataset.results / "nnUNetTrainer__nnUNetOneShotCPUPlans__3d_fullres"
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    out = dataset.raw.parent.parent / "predictions"
    out.mkdir()
    predictor.predict_from_files_sequential([[str(dataset.image("case_02"))]], [str(out / "case_02")])
    assert (out / "case_02.nii.gz").is_file()
