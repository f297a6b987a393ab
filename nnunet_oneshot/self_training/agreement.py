"""Which labels of a student are trusted to guide registration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A label with a smaller Dice does not guide.
_KNOWN = 0.5


def trust_in(synthetic: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Weight of each label of a student as a guide for registration.

    On a synthetic patch the label is exact, so that only the student can be wrong. On the real patch aligned with it,
    student or registration can. A guide moves borders between the two; where they hardly meet, one of them is wrong
    altogether, and nothing tells which. A label then has no weight.

    Args:
        synthetic: Dice of each foreground label (or region) of the student with the warped label on held-out synthetic
            patches, (K,), 0 to 1; not a number for a label that is absent from all of them.
        real: The same on the real patches.

    Returns:
        (K,): the smaller of both, rounded to two decimals, or 0 where it is below 0.5.
    """
    known = np.nan_to_num(np.minimum(synthetic, real))
    return np.round(np.where(known >= _KNOWN, known, 0.0), 2)


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
