"""Judges registered labels by a student's segmentations of synthetic and of real patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SETTLED = 0.5


@dataclass(frozen=True)
class Agreement:
    """How well a student's segmentations match the warped label on aligned synthetic and real patches.

    On a synthetic patch the warped label is exact, so only the student can be wrong. On the aligned real patch, the
    registration can be wrong too.

    Attributes:
        synthetic: Dice of each foreground label (or region) on synthetic patches, (K,), 0 to 1; not a number for a
            label that is absent from all of them.
        real: The same on the real patches.
    """

    synthetic: np.ndarray
    real: np.ndarray

    def trust(self) -> np.ndarray:
        """Weight of each label of the student as a guide for registration, (K,), 0 to 1.

        The share of the disagreement on real patches that the student's own errors, measured on synthetic patches, do
        not explain: ``(synthetic - real) / (1 - real)``, rounded to two decimals.
        """
        gap = (self.synthetic - self.real) / np.maximum(1 - self.real, 1e-6)
        return np.round(np.clip(np.nan_to_num(gap), 0, 1), 2)

    def settled(self) -> float:
        """Share of the labels with a Dice between student and registration of at least 0.5, 0 to 1."""
        shown = self.real[~np.isnan(self.real)]
        return float(np.mean(shown >= _SETTLED)) if len(shown) else 0.0


def pooled_dice(counts: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Dice of each label, pooled over all patches; not a number for a label that is absent from all targets.

    Args:
        counts: Results of nnU-Net's ``validation_step``: ``tp_hard``, ``fp_hard`` and ``fn_hard``, (K,) each.

    Returns:
        (K,).
    """
    tp, fp, fn = (
        np.sum([c[name] for c in counts], axis=0, dtype=np.float64) for name in ("tp_hard", "fp_hard", "fn_hard")
    )
    return np.where(tp + fn > 0, 2 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan)
