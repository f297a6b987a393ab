"""Whole images through nnU-Net's sliding window on a pretended GPU, as this package calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from pretended_gpu import PretendedGpu

from nnunet_oneshot.data.previous_stage import NEXT_STAGE
from nnunet_oneshot.inference import build_predictor, foreground_probabilities
from nnunet_oneshot.registration.dataset.agreement import StudentRun, agreement_with_registration
from nnunet_oneshot.registration.pair.functional import constants

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which tests/test_cuda.py runs")

PLANS, CONFIGURATION, NAME = "nnUNetOneShotCPUPlans", "3d_fullres", "OneShotSynthesisTrainer"
REGIONS = {"background": 0, "both": [1, 2], "right": 2}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [3, 3, 2]}}))
    constants.cache_clear()
    with PretendedGpu() as pretended:
        yield pretended
    constants.cache_clear()


@pytest.fixture(autouse=True)
def fails_where_it_is(monkeypatch):
    """nnU-Net would gather results on the processor where anything fails on the GPU."""
    predict = nnUNetPredictor._internal_predict_sliding_window_return_logits

    def told(*args) -> torch.Tensor:
        try:
            return predict(*args)
        except RuntimeError as error:
            raise AssertionError("it fails on the GPU") from error

    monkeypatch.setattr(nnUNetPredictor, "_internal_predict_sliding_window_return_logits", told)


@pytest.mark.parametrize("regions", [False, True])
def test_the_sliding_window_predicts_alike(regions, prepare, make_trainer, gpu):
    dataset = prepare(**({"labels": REGIONS, "regions_class_order": [1, 2]} if regions else {}))
    found, waits = [], []
    for device in ("cpu", "cuda:0"):
        trainer = make_trainer(dataset, NAME)
        trainer.device = torch.device(device)
        trainer.initialize()
        trainer.set_deep_supervision_enabled(False)
        predictor = build_predictor(trainer.network, trainer.prepared, mirror_axes=(0, 2), device=trainer.device)
        patch = trainer.configuration_manager.patch_size
        image = np.random.default_rng(0).standard_normal((1, *[size + 5 for size in patch])).astype(np.float32)
        gpu.waits.clear()
        found.append(foreground_probabilities(predictor, image))
        waits.append(gpu.waits.total())
    assert found[0].shape == (2, *image.shape[1:]) and np.ptp(found[0]) > 0
    np.testing.assert_allclose(*found, atol=2e-3)
    assert waits[0] == 0


def test_a_student_agrees_with_registrations_alike(prepare, make_trainer):
    dataset = prepare(labelled=("case_00",))
    trainer = make_trainer(dataset, NAME)
    trainer.initialize()
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (folder.parent / f"{name}.json").write_text(json.dumps(content))
    found = []
    for device in ("cpu", "cuda:0"):
        run = StudentRun(folder.parent, dataset.name, PLANS, CONFIGURATION, "0", device)
        (agreement,) = agreement_with_registration(run, dataset.cases[-1:], 1, lambda _: None).values()
        found.append(agreement)
        shutil.rmtree(dataset.preprocessed / "oneshot_registrations")
    assert found[0].labels and found[1].labels == pytest.approx(found[0].labels, abs=0.02)


def test_a_first_stage_segments_for_the_second_alike(cascade, make_trainer):
    dataset = cascade()
    found = []
    for device in ("cpu", "cuda:0"):
        trainer = make_trainer(dataset, NAME, configuration="3d_lowres")
        trainer.device = torch.device(device)
        trainer.initialize()
        trainer.inference_allowed_mirroring_axes = (0, 1)
        trainer.segment_for_next_stages(trainer.prepared, dataset.cases[:2])
        folder = Path(trainer.output_folder) / NEXT_STAGE / "3d_cascade_fullres"
        found.append([blosc2.open(str(folder / f"{case}.b2nd"))[:] for case in dataset.cases[:2]])
    for first, second in zip(*found, strict=True):
        assert first.any() and (first != second).mean() < 0.01
