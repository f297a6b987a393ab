"""nnU-Net's predictor, set up for trained models whose trainers this package provides."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from nnunet_oneshot.environment import VARIABLE, ext_trainer_value

CHECKPOINT = "checkpoint_final.pth"


def load_predictor(folder: Path, folds: Sequence[str], device: str | torch.device):
    """nnU-Net's predictor of the finished folds of a trained model.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION`` of nnU-Net's results.
        folds: Their networks are averaged.
        device: Where the network runs.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    device = torch.device(device)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ext_trainer_value(before)
    try:
        # nnU-Net tells on the console where it looks for classes; here that is of no interest.
        with contextlib.redirect_stdout(io.StringIO()):
            predictor = nnUNetPredictor(
                device=device, perform_everything_on_device=device.type != "cpu", allow_tqdm=False
            )
            predictor.initialize_from_trained_model_folder(str(folder), folds, CHECKPOINT)
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
    predictor.network.to(predictor.device)
    return predictor
