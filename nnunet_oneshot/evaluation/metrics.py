"""Overlap and surface distances of segmentations, with stated conventions for empty labels.

Conventions, used everywhere in this package:
    reference and prediction empty: there is nothing to find; every metric is NaN and is left out of averages.
    exactly one of them empty: Dice 0, NSD 0, HD95 the length of the image's diagonal in mm.
A label that is not found therefore counts with the worst value; it never drops out of an average.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.data.verify import whole_labels
from nnunet_oneshot.errors import OneShotError


@dataclass(frozen=True)
class LabelScores:
    """Scores of one label of one case.

    Attributes:
        dice: 0 to 1.
        hd95: Larger of the two directions' 95th percentile of the surface distance, mm.
        nsd: Share of both surfaces that lies within the tolerance of the other, 0 to 1.
    """

    dice: float
    hd95: float
    nsd: float


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice of two masks of one shape; NaN when both are empty."""
    total = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    if total == 0:
        return math.nan
    return 2 * int(np.count_nonzero(np.logical_and(prediction, reference))) / total


def score_label(
    prediction: np.ndarray, reference: np.ndarray, *, spacing: Sequence[float], tolerance: float = 2.0
) -> LabelScores:
    """Dice, HD95 and normalised surface Dice of two masks.

    Surfaces are the masks' border voxels (MONAI's definition: a voxel outside the image counts as background, so a
    structure that touches the border has a surface there).

    Args:
        prediction: (X, Y) or (X, Y, Z) bool. Leading axes of length 1 are dropped, so a 2D image that is stored with
            one slice is scored in 2D.
        reference: The same shape.
        spacing: Voxel edges in mm, one an axis, array axis order.
        tolerance: Of the NSD, mm.

    Returns:
        See the module's conventions for empty masks.

    Raises:
        ValueError: The shapes or the number of spacings do not agree.
    """
    prediction, reference = np.asarray(prediction, dtype=bool), np.asarray(reference, dtype=bool)
    if prediction.shape != reference.shape or len(spacing) != reference.ndim:
        raise ValueError(
            f"prediction {prediction.shape}, reference {reference.shape} and spacing {tuple(spacing)} must agree in "
            f"shape and number of axes."
        )
    edges = [float(s) for s in spacing]
    while reference.ndim > 2 and reference.shape[0] == 1:
        prediction, reference, edges = prediction[0], reference[0], edges[1:]
    diagonal = math.sqrt(sum((n * s) ** 2 for n, s in zip(reference.shape, edges, strict=True)))
    found, present = bool(prediction.any()), bool(reference.any())
    if not found and not present:
        return LabelScores(math.nan, math.nan, math.nan)
    if found != present:
        return LabelScores(0.0, diagonal, 0.0)
    prediction, reference = _cropped(prediction, reference)
    return LabelScores(dice(prediction, reference), *_surface_scores(prediction, reference, edges, tolerance))


def score_segmentation(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    labels: Mapping[str, int | Sequence[int]],
    spacing: Sequence[float],
    tolerance: float = 2.0,
    ignore_label: int | None = None,
) -> dict[str, LabelScores]:
    """Scores of every label or region of one case.

    Args:
        prediction: Label map (X, Y) or (X, Y, Z).
        reference: The same shape.
        labels: Name to label value, or to the label values of a region.
        spacing: Voxel edges in mm, array axis order.
        tolerance: Of the NSD, mm.
        ignore_label: Voxels of the reference with this value are left out of everything.

    Raises:
        OneShotError: The reference holds values that are no whole numbers; those within 1e-3 of one count as that.
    """
    prediction, reference = whole_labels(prediction), whole_labels(reference)
    broken = reference[reference != np.rint(reference)] if reference.dtype.kind == "f" else reference[:0]
    if broken.size:
        raise OneShotError(
            f"A label to be scored against holds values such as {round(float(broken.flat[0]), 4)}, which are no whole "
            f"numbers and no label: correct the files in labelsTr and run `nnunet_oneshot plan_and_preprocess` again."
        )
    counted = np.ones(reference.shape, dtype=bool) if ignore_label is None else reference != ignore_label
    scores = {}
    for name, values in labels.items():
        members = np.atleast_1d(values)
        found, present = (np.isin(segmentation, members) & counted for segmentation in (prediction, reference))
        scores[name] = score_label(found, present, spacing=spacing, tolerance=tolerance)
    return scores


def _surface_scores(
    prediction: np.ndarray, reference: np.ndarray, spacing: list[float], tolerance: float
) -> tuple[float, float]:
    """HD95 (mm) and NSD of two masks that are not empty."""
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    found, present = (torch.from_numpy(np.ascontiguousarray(m))[None, None].float() for m in (prediction, reference))
    with warnings.catch_warnings():
        # MONAI warns about arguments it passes to itself.
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(found, present, percentile=95, include_background=True, spacing=spacing)
        nsd = compute_surface_dice(
            found, present, class_thresholds=[tolerance], include_background=True, spacing=spacing
        )
    return float(hd95), float(nsd)


def _cropped(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks within their common bounding box, with one voxel of background on every side."""
    either = prediction | reference
    sides = []
    for axis in range(either.ndim):
        places = np.flatnonzero(either.any(axis=tuple(a for a in range(either.ndim) if a != axis)))
        sides.append(slice(places[0], places[-1] + 1))
    box = tuple(sides)
    return np.pad(prediction[box], 1), np.pad(reference[box], 1)
