"""What student and registration agree on, and what follows from it: closed-form values."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_oneshot.self_training.agreement import Agreement, pooled_dice


def agreement(synthetic, real):
    return Agreement(np.array(synthetic), np.array(real))


def test_trust_is_the_disagreement_that_the_students_errors_do_not_explain():
    found = agreement([0.9, 0.8, 0.0, 0.6, 1.0, np.nan], [0.6, 0.8, 0.0, 0.7, 1.0, np.nan]).trust()
    assert found.tolist() == pytest.approx([0.75, 0, 0, 0, 0, 0])


@pytest.mark.xfail(strict=True, reason="what real images look like is taken for the registration's error")
def test_a_student_that_fails_on_real_images_alone_does_not_lead():
    """Registrations are perfect; the student loses 0.95 on real images, which look different from the atlas."""
    assert agreement([0.95, 0.95], [0.0, 0.3]).trust().max() < 0.1


def test_a_good_student_leads_where_registrations_are_poor():
    """The student has 0.95 on both kinds of image; carried labels agree with it by 0.1 alone."""
    assert agreement([0.95, 0.95], [0.1, 0.05]).trust().min() > 0.9


def test_labels_are_settled_where_more_is_agreed_on_than_not():
    assert agreement([0.9] * 5, [0.49, 0.5, 0.9, 0.0, np.nan]).settled() == 0.5
    assert agreement([np.nan], [np.nan]).settled() == 0


def test_dice_is_that_of_all_patches_together():
    counts = [
        {"tp_hard": np.array([4.0, 0, 0]), "fp_hard": np.array([2.0, 3, 0]), "fn_hard": np.array([0.0, 0, 5])},
        {"tp_hard": np.array([0.0, 0, 0]), "fp_hard": np.array([0.0, 0, 0]), "fn_hard": np.array([6.0, 0, 0])},
    ]
    assert pooled_dice(counts).tolist() == pytest.approx([0.5, np.nan, 0], nan_ok=True)
