"""What of a student is trusted as a guide: the labels that it finds on patches whose labels are exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A label that the student finds with a smaller Dice does not guide.
_KNOWN = 0.5


def trust_in(synthetic: np.ndarray) -> np.ndarray:
    """Weight of each label of a student as a guide for registration.

    On a synthetic patch the label is exact, so that only the student can be wrong. Whether it is right on the real
    images too shows in the registrations that it guides, see `nnunet_oneshot.registration.pair.quality.is_kept`.

    Args:
        synthetic: Dice of each foreground label (or region) on held-out synthetic patches, (K,), 0 to 1; not a number
            for a label that is absent from all of them.

    Returns:
        (K,): that Dice, rounded to two decimals, or 0 where it is below 0.5.
    """
    known = np.nan_to_num(synthetic)
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
