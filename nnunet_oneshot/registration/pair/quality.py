"""Estimates without labels which registrations to trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_oneshot.registration.pair.registration import Registration

# A pair counts as failed if it lies this many robust standard deviations below the median.
_OUTLIER = 3.5
# A pair is ambiguous if a map that leads elsewhere makes the images alike but for less than this share.
_AMBIGUOUS = 0.03
# How often an ambiguous pair is drawn, compared with the others.
_AMBIGUOUS_WEIGHT = 0.5

# A guided registration is kept if images are at least this many times as alike as without the guide.
_KEPT = 0.95


def telling_similarity(quality: Mapping[str, Any]) -> float:
    """The similarity after registration that best predicts label quality: around the labels, if available."""
    return quality.get("similarity_at_labels", quality["similarity_after"])


def outlier_scores(registrations: Sequence[Registration]) -> np.ndarray:
    """Robust z-score of each pair's `telling_similarity` among the pairs of its atlas.

    Args:
        registrations: Pairs of any number of atlases.

    Returns:
        (N,) robust z-scores (distance from the median over 1.4826 times the median absolute deviation); negative is
        worse than the median.
    """
    values = np.array([telling_similarity(registration.quality) for registration in registrations], float)
    names = np.array([registration.atlas for registration in registrations])
    scores = np.zeros(len(values))
    for name in set(names.tolist()):
        mine = names == name
        centre = np.median(values[mine])
        spread = 1.4826 * np.median(np.abs(values[mine] - centre))
        scores[mine] = (values[mine] - centre) / max(spread, 1e-3)
    return scores


def is_ambiguous(quality: Mapping[str, Any]) -> bool:
    """Whether images alone hardly tell the affine map from one that leads elsewhere, such as a vertebra further."""
    return quality.get("rival_margin", 1.0) < _AMBIGUOUS


def is_kept(first: Mapping[str, Any], guided: Mapping[str, Any]) -> bool:
    """Whether a registration that a student guided takes the place of the first: if images are about as alike.

    A guide that knows the structures moves borders by a voxel or two, which changes the similarity little. One that is
    wrong pulls them onto others.

    Args:
        first: Quality of the registration by images alone.
        guided: Quality of the guided one.
    """
    return telling_similarity(guided) >= _KEPT * telling_similarity(first)


def draw_weights(registrations: Sequence[Registration]) -> np.ndarray:
    """Weight of each pair in sampling and in the hint: 1, less if it is ambiguous, and 0 for outliers.

    If all are outliers, none counts as one.

    Returns:
        (N,) float64.
    """
    kept = outlier_scores(registrations) > -_OUTLIER
    ambiguous = np.array([is_ambiguous(registration.quality) for registration in registrations], bool)
    weights = np.where(ambiguous, _AMBIGUOUS_WEIGHT, 1.0)
    return np.where(kept, weights, 0.0) if kept.any() else weights
