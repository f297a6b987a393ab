"""What a student's segmentation of synthetic and of real patches tells about the labels that registration carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SETTLED = 0.5


@dataclass(frozen=True)
class Agreement:
    """How well a student's segmentations match the warped label, at the same places of both kinds of image.

    On a synthetic patch the warped label is exact, so that only the student can be wrong; on the real patch it is
    aligned with, the registration can be wrong as well.

    Attributes:
        synthetic: Dice of each foreground label (or region) on synthetic patches, (K,), 0 to 1; not a number for a
            label that none of them shows.
        real: The same on the real patches.
    """

    synthetic: np.ndarray
    real: np.ndarray

    def trust(self) -> np.ndarray:
        """How far each label of the student may lead a registration, (K,), 0 to 1.

        It is the share of the disagreement on real patches that the student's own errors, known from the synthetic
        ones, do not explain: ``(synthetic - real) / (1 - real)``, to two decimals.
        """
        gap = (self.synthetic - self.real) / np.maximum(1 - self.real, 1e-6)
        return np.round(np.clip(np.nan_to_num(gap), 0, 1), 2)

    def settled(self) -> float:
        """Share of the labels on which student and registration agree more than they differ, 0 to 1."""
        shown = self.real[~np.isnan(self.real)]
        return float(np.mean(shown >= _SETTLED)) if len(shown) else 0.0


def pooled_dice(counts: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """Dice of each label over all patches together; not a number for a label that no target shows.

    Args:
        counts: Results of nnU-Net's ``validation_step``: ``tp_hard``, ``fp_hard`` and ``fn_hard``, (K,) each.

    Returns:
        (K,).
    """
    tp, fp, fn = (
        np.sum([c[name] for c in counts], axis=0, dtype=np.float64) for name in ("tp_hard", "fp_hard", "fn_hard")
    )
    return np.where(tp + fn > 0, 2 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan)
