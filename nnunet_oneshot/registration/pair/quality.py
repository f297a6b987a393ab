"""Which registrations to trust, judged without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_oneshot.registration.pair.registration import Registration

# Robust standard deviations below the median at which a pair counts as failed.
_OUTLIER = 3.5


def telling_similarity(quality: Mapping[str, Any]) -> float:
    """The similarity after registration that says most about propagated labels: around them, where that is known."""
    return quality.get("similarity_at_labels", quality["similarity_after"])


def outlier_scores(registrations: Sequence[Registration]) -> np.ndarray:
    """How far each pair's `telling_similarity` lies from the median of its atlas's pairs.

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


def draw_weights(registrations: Sequence[Registration]) -> np.ndarray:
    """Weight of each pair in sampling and in the hint: 1, or 0 for outliers; 1 for all where all would be 0.

    Returns:
        (N,) float64.
    """
    weights = (outlier_scores(registrations) > -_OUTLIER).astype(float)
    return weights if weights.any() else np.ones(len(weights))
