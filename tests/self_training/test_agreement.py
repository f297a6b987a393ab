"""Which labels of a student are trusted: closed-form values."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_oneshot.self_training.agreement import pooled_dice, trust_in


def test_a_label_guides_by_the_smaller_dice_and_not_where_that_is_small():
    synthetic, real = np.array([0.9, 0.8, 0.9, 0.49, 0.95, np.nan]), np.array([0.501, 0.9, 0.49, 0.9, 0.0, np.nan])
    assert trust_in(synthetic, real).tolist() == pytest.approx([0.5, 0.8, 0, 0, 0, 0])


def test_dice_is_that_of_all_patches_together():
    counts = [
        {"tp_hard": np.array([4.0, 0, 0]), "fp_hard": np.array([2.0, 3, 0]), "fn_hard": np.array([0.0, 0, 5])},
        {"tp_hard": np.array([0.0, 0, 0]), "fp_hard": np.array([0.0, 0, 0]), "fn_hard": np.array([6.0, 0, 0])},
    ]
    assert pooled_dice(counts).tolist() == pytest.approx([0.5, np.nan, 0], nan_ok=True)
