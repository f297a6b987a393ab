"""nnU-Net's predictor, set up for trained models whose trainers this package provides."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from nnunet_oneshot.checkpoints import load_data
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.environment import VARIABLE, ext_trainer_value

CHECKPOINT = "checkpoint_final.pth"
# Values of all outputs that are turned into probabilities at a time.
_PART = 2**24


def foreground_probabilities(predictor, image: np.ndarray) -> np.ndarray:
    """Probability of every foreground label, or region, at every voxel, by nnU-Net's sliding window.

    Args:
        predictor: nnU-Net's, with a network.
        image: (C, X, Y, Z), preprocessed.

    Returns:
        (K, X, Y, Z) float16, in which nnU-Net keeps its outputs.
    """
    heads = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(np.ascontiguousarray(image)))
    # In place and in parts: of many labels of a large image, each copy takes gigabytes.
    with torch.inference_mode():
        for part in heads.split(max(1, _PART // heads[:, 0].numel()), dim=1):
            part.copy_(predictor.label_manager.apply_inference_nonlin(part.float()))
    return heads.numpy() if predictor.label_manager.has_regions else heads[1:].numpy()


def build_predictor(
    network: torch.nn.Module,
    prepared: PreparedDataset,
    *,
    mirror_axes: Sequence[int] | None,
    device: torch.device,
):
    """nnU-Net's predictor around a network in memory.

    Args:
        network: Without deep supervision, on ``device``.
        prepared: The dataset that the network is for.
        mirror_axes: Axes of the patch that may be mirrored, or None.
        device: Where the network runs.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type != "cpu", allow_tqdm=False)
    # A network in memory serves a few images; compiling it costs more than it saves.
    with _variable("nnUNet_compile", None):
        predictor.manual_initialization(
            network,
            prepared.plans_manager,
            prepared.configuration_manager,
            [network.state_dict()],
            prepared.dataset_json,
            "",
            mirror_axes,
        )
    return predictor


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """Sets an environment variable, or unsets it for None, for as long as the block lasts."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def load_predictor(folder: Path, folds: Sequence[str], device: str | torch.device):
    """nnU-Net's predictor of the finished folds of a trained model.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION`` of nnU-Net's results.
        folds: Their networks are averaged.
        device: Where the network runs.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    device = torch.device(device)
    # nnU-Net would run the code that a checkpoint names.
    for fold in folds:
        load_data(folder / f"fold_{fold}" / CHECKPOINT)
    # nnU-Net tells on the console where it looks for classes; here that is of no interest.
    with _variable(VARIABLE, ext_trainer_value(os.environ.get(VARIABLE))), contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type != "cpu", allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds, CHECKPOINT)
    predictor.network.to(predictor.device)
    return predictor
