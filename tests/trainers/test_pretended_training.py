"""Training steps, trust and prediction on a pretended GPU: every tensor lies where it should."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pretended_gpu import OnGpu, PretendedGpu

from nnunet_oneshot.registration.pair.functional import constants
from nnunet_oneshot.self_training.guide import StudentInTraining

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which tests/test_cuda.py runs")

TRAINERS = ["OneShotAtlasTrainer", "OneShotPropagationTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer"]


@pytest.fixture
def trainer_on(prepare, make_trainer, stubs, monkeypatch):
    """A function that gives a trainer with its networks on a device, and its loaders."""
    monkeypatch.setenv("nnUNet_compile", "f")

    def make(name, device):
        trainer = make_trainer(prepare(), name)
        trainer.device = torch.device(device)
        trainer.initialize()
        return trainer, *trainer.get_dataloaders()

    return make


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_of_each_trainer(name, trainer_on):
    constants.cache_clear()
    with PretendedGpu() as gpu:
        trainer, patches, progress = trainer_on(name, "cuda:0")
        assert all(isinstance(p, OnGpu) for p in trainer.network.parameters())
        batch = next(patches)
        if "from_real" in batch:
            batch["from_real"][:] = torch.arange(len(batch["from_real"])) == 0
        before = [p.detach().clone() for p in trainer.network.parameters()]
        trainer.on_train_epoch_start()
        losses = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in losses.values())
        assert any(
            not torch.equal(a.cpu(), b.detach().cpu())
            for a, b in zip(before, trainer.network.parameters(), strict=True)
        )
        gpu.waits.clear()
        trainer.validation_step(next(progress))
    constants.cache_clear()


def test_a_student_guides(trainer_on, monkeypatch):
    constants.cache_clear()
    with PretendedGpu():
        trainer, _, progress = trainer_on("OneShotDistillTrainer", "cuda:0")
        monkeypatch.setattr("nnunet_oneshot.trainers.distill._COMPARED_PATCHES", (2, 2))
        trust = trainer._compare(copy.copy(progress))
        assert all(found.shape == (2,) for found in trust)
        student = StudentInTraining(
            trainer.distiller.averaged.module,
            trainer.prepared,
            mirror_axes=(0, 1),
            device=trainer.device,
            precision="auto",
            trust=np.ones(2),
        )
        # nnU-Net fills its sliding window from a thread, which the pretended GPU does not reach.
        patch = torch.rand(1, 1, *trainer.configuration_manager.patch_size).to(trainer.device)
        with torch.no_grad():
            logits = student._predictor._internal_maybe_mirror_and_predict(patch)
        assert isinstance(logits, OnGpu) and logits.shape == (1, 3, *patch.shape[2:])
        assert len(student.digest) == 64
    constants.cache_clear()
