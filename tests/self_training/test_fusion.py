"""Fusion of a student with carried labels: closed forms, and the posterior whose largest value is taken elsewhere."""

import tracemalloc

import numpy as np
import pytest
import torch

from nnunet_oneshot.self_training.fusion import fused_probabilities
from nnunet_oneshot.self_training.posterior import posterior_labels, posterior_probabilities


def maps(*probabilities):
    """Probabilities of labels 1, 2, ... on a line of voxels, with the background before them."""
    labels = np.array(probabilities, float)[:, :, None, None]
    return np.concatenate([1 - labels.sum(0, keepdims=True), labels])


def test_where_both_agree_it_is_the_mean():
    carried, student = maps([0.9, 0.8, 0.1, 0.0]), maps([1.0, 0.6, 0.3, 0.0])
    fused, trust = fused_probabilities(carried.copy(), student[1:])
    assert trust.tolist() == [1.0]
    assert np.allclose(fused, (carried + student) / 2)


def test_a_label_on_which_they_do_not_agree_stays_as_it_was_carried():
    carried = maps([0.9, 0.9, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    student = maps([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.8, 0.8])
    fused, trust = fused_probabilities(carried.copy(), student[1:])
    assert trust.tolist() == [0.0, 1.0]
    assert np.allclose(fused[1], carried[1]) and np.allclose(fused[2, -2:], 0.9)


def test_the_share_of_the_student_is_half_the_agreement():
    carried, student = maps([1.0, 1.0, 1.0, 0.0]), maps([1.0, 1.0, 0.2, 0.9])
    fused, trust = fused_probabilities(carried.copy(), student[1:])
    assert trust == pytest.approx([0.67])
    assert fused[1].ravel() == pytest.approx([1, 1, 1 - 0.335 * 0.8, 0.335 * 0.9], abs=1e-6)
    assert np.allclose(fused.sum(0), 1)


def test_a_label_that_neither_finds_stays_away():
    fused, trust = fused_probabilities(maps([1.0, 0.0], [0.0, 0.0]), maps([1.0, 0.0], [0.0, 0.0])[1:])
    assert trust.tolist() == [1.0, 0.0] and not fused[2].any()


def test_many_labels_are_fused_without_a_copy():
    random = np.random.default_rng(0)
    carried, student = (random.dirichlet(np.full(40, 0.1), (16, 16, 16)).astype(np.float32) for _ in range(2))
    carried, student = (np.ascontiguousarray(np.moveaxis(values, -1, 0)) for values in (carried, student[..., 1:]))
    tracemalloc.start()
    fused, _ = fused_probabilities(carried, student)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fused is carried and peak < 0.3 * carried.nbytes
    out = torch.from_numpy(carried)
    image, labels = torch.from_numpy(random.standard_normal((1, 16, 16, 16))), out.argmax(0)
    found = posterior_probabilities(image, labels, range(40), blur=1.0, strength=1.0, out=out)
    assert found is out
    assert torch.equal(found, posterior_probabilities(image, labels, range(40), blur=1.0, strength=1.0))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_the_largest_posterior_is_the_corrected_label(strength):
    random = np.random.default_rng(0)
    truth = np.zeros((20, 22, 18), np.int64)
    truth[5:12, 6:15, 4:12], truth[12:16, 6:15, 4:12] = 1, 3
    image = torch.from_numpy(truth * 2.0 + random.normal(0, 0.3, truth.shape))[None].float()
    labels = torch.from_numpy(np.roll(truth, 1, 0))
    found = posterior_probabilities(image, labels, [0, 1, 2, 3], blur=1.5, strength=strength)
    expected = posterior_labels(image[None], labels[None, None], blur=1.5, strength=strength)[0, 0]
    assert torch.equal(found.argmax(0), expected)
    assert torch.allclose(found.sum(0), torch.ones(truth.shape), atol=1e-4) and not found[2].any()
    assert torch.equal(found[0, -1, -1], torch.ones(18))
