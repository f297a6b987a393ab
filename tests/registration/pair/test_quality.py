"""Pairs are flagged by how far they fall below the others of their atlas."""

import numpy as np

from nnunet_oneshot.registration.pair.quality import (
    draw_weights,
    is_ambiguous,
    is_kept,
    outlier_scores,
    telling_similarity,
)
from nnunet_oneshot.registration.pair.registration import Registration


def pair(similarity, atlas="a", **quality):
    shape = (4, 4, 4)
    velocity = np.zeros((3, 2, 2, 2), np.float32)
    return Registration(atlas, "case", np.eye(4), velocity, shape, shape, {"similarity_after": similarity, **quality})


def test_scores_are_robust_deviations_from_the_median():
    scores = outlier_scores([pair(s) for s in (0.5, 0.6, 0.7, 0.8, 0.9)])
    assert np.allclose(scores, (np.array([0.5, 0.6, 0.7, 0.8, 0.9]) - 0.7) / (1.4826 * 0.1))


def test_each_atlas_is_judged_by_its_own_pairs():
    scores = outlier_scores([*(pair(s) for s in (0.8, 0.9, 1.0)), *(pair(s, "b") for s in (0.1, 0.2, 0.3))])
    assert np.allclose(scores[:3], scores[3:])


def test_a_failed_pair_is_not_drawn_and_the_others_are():
    weights = draw_weights([*(pair(s) for s in (0.70, 0.71, 0.69, 0.72, 0.68)), pair(0.2)])
    assert weights.tolist() == [1, 1, 1, 1, 1, 0]


def test_a_pair_far_above_the_others_is_drawn():
    assert draw_weights([*(pair(s) for s in (0.30, 0.31, 0.29)), pair(0.9)]).tolist() == [1, 1, 1, 1]


def test_similarity_at_the_labels_counts_where_it_is_known():
    assert telling_similarity(pair(0.9, similarity_at_labels=0.4).quality) == 0.4
    assert telling_similarity(pair(0.9).quality) == 0.9


def test_an_ambiguous_pair_is_drawn_less_but_still_drawn():
    pairs = [pair(0.70, rival_margin=0.2), pair(0.71, rival_margin=0.01), pair(0.69)]
    assert draw_weights(pairs).tolist() == [1, 0.5, 1]
    assert [is_ambiguous(one.quality) for one in pairs] == [False, True, False]


def test_a_guided_registration_is_kept_where_images_stay_about_as_alike():
    first = {"similarity_after": 0.9, "similarity_at_labels": 0.6}
    kept = [is_kept(first, {"similarity_after": 0.5, "similarity_at_labels": s}) for s in (0.7, 0.58, 0.56, 0.3)]
    assert kept == [True, True, False, False]
    # Without a figure for the labels, that of the whole image counts.
    assert [is_kept({"similarity_after": 0.6}, {"similarity_after": s}) for s in (0.58, 0.5)] == [True, False]
