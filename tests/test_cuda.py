"""What a GPU changes: mixed precision, compiled features, and registrations that are computed there."""

import json

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

PLANS = "nnUNetOneShotPlans"
ITERATIONS = 12


@pytest.fixture
def dataset(tiny_dataset):
    from nnunet_oneshot.data.options import Options
    from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess
    from nnunet_oneshot.planners import OneShotPlanner

    dataset = tiny_dataset(n_cases=8, shape=(36, 40, 44), labelled="all")
    plan_and_preprocess(dataset.id, OneShotPlanner, Options(configurations=("3d_fullres",), progress=False))
    return dataset


@pytest.fixture
def train(monkeypatch):
    """A function that trains as ``nnUNetv2_train`` does, with short epochs; gives the folder of the fold."""
    from nnunetv2.run.run_training import run_training

    from nnunet_oneshot.environment import TRAINER_FOLDER
    from nnunet_oneshot.trainers.base import OneShotTrainer

    original = OneShotTrainer.initialize

    def initialize(self):
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = ITERATIONS, 2, 1
        original(self)

    monkeypatch.setattr(OneShotTrainer, "initialize", initialize)
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))

    def run(dataset, name, device="cuda", **options):
        run_training(str(dataset.id), "3d_fullres", 0, name, PLANS, device=torch.device(device), **options)
        return dataset.results / f"{name}__{PLANS}__3d_fullres" / "fold_0"

    return run


def score(folder):
    return json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"]


def losses(folder):
    return torch.load(folder / "checkpoint_final.pth", weights_only=False)["logging"]["train_losses"]


@pytest.mark.parametrize("compiled", ["f", pytest.param("t", marks=pytest.mark.slow)])
def test_student_with_hint_rounds_and_real_patches_learns(compiled, dataset, train, monkeypatch):
    from nnunet_oneshot.registration.dataset.cache import FOLDER
    from nnunet_oneshot.trainers import OneShotDistillTrainer

    monkeypatch.setenv("nnUNet_compile", compiled)
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    shares, scales = [], []
    original = OneShotDistillTrainer.on_train_epoch_end

    def note(self, outputs):
        shares.append(self.real_share)
        scales.append(self.grad_scaler.get_scale())
        original(self, outputs)

    monkeypatch.setattr(OneShotDistillTrainer, "on_train_epoch_end", note)
    folder = train(dataset, "OneShotDistillTrainer_5epochs")
    found = losses(folder)
    assert np.isfinite(found).all() and found[-1] < found[0]
    assert shares[0] == 0 and len(shares) == 5
    # The scale of float16 would shrink towards 0 if gradients kept overflowing.
    assert min(scales) > 1000
    assert len(list((folder / FOLDER).rglob("*.npz"))) >= 5
    assert score(folder) > 0.3


def test_resumes(dataset, train, monkeypatch):
    from nnunet_oneshot.trainers import OneShotDistillTrainer

    original = OneShotDistillTrainer.on_train_epoch_start

    def interrupt(self):
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(OneShotDistillTrainer, "on_train_epoch_start", interrupt)
        train(dataset, "OneShotDistillTrainer_5epochs")
    folder = train(dataset, "OneShotDistillTrainer_5epochs", continue_training=True)
    assert len(losses(folder)) == 5 and np.isfinite(losses(folder)).all()
    assert not (folder / "checkpoint_latest_teacher.pth").exists()


def test_a_model_of_the_gpu_predicts_alike_on_the_processor(dataset, train, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    folder = train(dataset, "OneShotSynthesisTrainer_1epoch")
    outputs = []
    image = np.random.default_rng(0).normal(size=(1, 36, 40, 44)).astype(np.float32)
    for device in ("cuda", "cpu"):
        predictor = nnUNetPredictor(device=torch.device(device), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder.parent), (0,), "checkpoint_final.pth")
        outputs.append(predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).float().cpu())
    difference = (outputs[0] - outputs[1]).abs().max()
    assert difference < 0.05 * outputs[1].abs().max()


def test_registration_is_that_of_the_processor():
    from nnunet_oneshot.demo.phantoms import SPACING, make_phantom
    from nnunet_oneshot.registration.pair.registrar import register_arrays
    from nnunet_oneshot.registration.pair.warp import atlas_coordinates

    atlas, case = (make_phantom(np.random.default_rng(seed))[0][None].astype(np.float32) for seed in range(2))
    places = []
    for device in ("cuda", "cpu"):
        pair = register_arrays(
            atlas,
            case,
            atlas_spacing=(SPACING,) * 3,
            case_spacing=(SPACING,) * 3,
            device=device,
        )
        places.append(atlas_coordinates(pair))
    distance = (places[0] - places[1]).norm(dim=0)
    assert distance.median() < 0.05 and distance.quantile(0.99) < 0.5


def test_corrected_labels_are_those_of_the_processor():
    from nnunet_oneshot.self_training.posterior import posterior_labels

    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 1, 24, 28, 20, dtype=torch.long)
    labels[:, :, 6:14, 8:20, 5:12] = 1
    labels[:, :, 14:18, 8:20, 5:12] = 2
    image = labels.roll(1, 2).float() + 0.3 * torch.randn(labels.shape, generator=generator)
    found = [
        posterior_labels(image.to(device), labels.to(device), blur=1.0, strength=0.6).cpu()
        for device in ("cuda", "cpu")
    ]
    assert not torch.equal(found[1], labels)
    assert (found[0] != found[1]).float().mean() < 0.001
