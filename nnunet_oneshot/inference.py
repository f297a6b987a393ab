"""nnU-Net's predictor, set up for trained models whose trainers this package provides."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.checkpoints import load_data
from nnunet_oneshot.data.description import check_description
from nnunet_oneshot.data.plans import check_plans
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.io import atomic_folder, load_json_checked, writing

CHECKPOINT = "checkpoint_final.pth"
# Values of all outputs that are turned into probabilities at a time.
_PART = 2**24


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and ``dataset.json`` of a trained model's folder, checked before nnU-Net makes anything of them.

    Raises:
        OneShotError: One is missing or of another shape.
    """
    plans, description = folder / "plans.json", folder / "dataset.json"
    return (
        check_plans(load_json_checked(plans, "the model's plans", dict), plans),
        check_description(load_json_checked(description, "the model's dataset description", dict), description),
    )


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


def likeliest(probabilities: Iterable[np.ndarray]) -> np.ndarray:
    """Place of the largest of several volumes at every voxel, of equal ones the first: (X, Y, Z) int64.

    Args:
        probabilities: (X, Y, Z) each. One after the other is looked at: ``argmax`` would copy all, which of many labels
            of a large image takes gigabytes.
    """
    first, *others = probabilities
    most, found = first.astype(np.float32), np.zeros(first.shape, np.int64)
    for place, own in enumerate(others, start=1):
        found[own > most] = place
        np.maximum(most, own, out=most)
    return found


def likeliest_heads(foreground: np.ndarray) -> np.ndarray:
    """The likeliest of exclusive labels at every voxel; the background has what they leave.

    Args:
        foreground: (K, X, Y, Z), as `foreground_probabilities` gives them for labels.

    Returns:
        (X, Y, Z): 0 for background, else the place of the label in the first axis, from 1.
    """
    background = np.maximum(1 - foreground.sum(axis=0, dtype=np.float32), 0)
    return likeliest([background, *foreground])


def predict_for_next_stage(
    predictor, prepared: PreparedDataset, following: PreparedDataset, cases: Sequence[str], folder: Path
) -> None:
    """Writes the segmentations that the second stage of a cascade sees, as nnU-Net's validation writes them.

    Args:
        predictor: nnU-Net's, with the network of the first stage.
        prepared: What this network segments.
        following: The dataset as the second stage has it; the segmentations get the grid of its images.
        cases: Cases of both.
        folder: Where the segmentations go; an existing folder is replaced once all are there.

    Raises:
        OneShotError: A case cannot be read, or the folder cannot be written.
    """
    from nnunetv2.inference.export_prediction import resample_and_save

    with writing(folder), atomic_folder(folder) as working:
        for case in cases:
            image = torch.from_numpy(prepared.network_input(case))
            resample_and_save(
                predictor.predict_sliding_window_return_logits(image).cpu(),
                list(following.shape(case)),
                str(working / case),
                prepared.plans_manager,
                prepared.configuration_manager,
                prepared.properties(case),
                prepared.dataset_json,
                torch.get_num_threads(),
                type(following.cases),
            )


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

    # On a processor nnU-Net tells of its own default as of a mistake.
    with contextlib.redirect_stdout(io.StringIO()):
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

    Raises:
        OneShotError: Plans or description of the model are missing or of another shape, or a checkpoint is damaged.
    """
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    device = torch.device(device)
    read_model(folder)
    # nnU-Net would run the code that a checkpoint names.
    for fold in folds:
        load_data(folder / f"fold_{fold}" / CHECKPOINT)
    # nnU-Net tells on the console where it looks for classes; here that is of no interest.
    with _variable(VARIABLE, ext_trainer_value(os.environ.get(VARIABLE))), contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type != "cpu", allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds, CHECKPOINT)
    predictor.network.to(predictor.device)
    return predictor
