"""Similarity across contrasts: invariances, optima, and registration of inverted images."""

from __future__ import annotations

import pytest
import torch
from tiny_volumes import blobs

from nnunet_oneshot.config import OneShotConfig, RegistrationConfig
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.pair.fitting import refine_velocity
from nnunet_oneshot.registration.pair.functional import integrate_on, integrate_velocity, resize, warp
from nnunet_oneshot.registration.pair.multimodal import mind_ssc, mutual_information
from nnunet_oneshot.registration.pair.similarities import similarity_loss

MULTIMODAL = ("mind", "nmi")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def image(shape=(16, 15, 14), seed=0):
    return torch.from_numpy(blobs(shape, seed))[None]


@pytest.mark.parametrize(("shape", "components"), [((12, 13), 4), ((8, 9, 10), 12)])
def test_descriptor_has_a_component_for_each_pair_of_neighbours_across_axes(shape, components):
    descriptor = mind_ssc(torch.rand(2, 3, *shape))
    assert descriptor.shape == (2, 3 * components, *shape)
    assert torch.isfinite(descriptor).all()
    # The most alike of the pairs of each place has distance 0.
    best = descriptor.view(2, 3, components, *shape).amax(2) / 12**0.5
    assert torch.allclose(best, torch.ones_like(best), atol=1e-5)


def test_descriptor_of_a_constant_image_is_one():
    assert torch.allclose(mind_ssc(torch.full((1, 1, 8, 8, 8), 3.0)) / 12**0.5, torch.ones(1), atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 18), (16, 15, 14)])
@pytest.mark.parametrize("similarity", MULTIMODAL)
@pytest.mark.parametrize("change", [lambda x: -x, lambda x: 5 - 2 * x, lambda x: 7 * x + 1])
def test_contrast_inversion_and_scaling_change_nothing(shape, similarity, change):
    fixed, moving = image(shape), image(shape, 1)
    plain, changed = (similarity_loss(m, fixed, similarity=similarity) for m in (moving, change(moving)))
    assert torch.allclose(plain, changed, atol=2e-3)


@pytest.mark.parametrize("similarity", MULTIMODAL)
def test_the_inverted_image_in_its_place_is_the_best_match(similarity):
    fixed = image()
    at_place = similarity_loss(-fixed, fixed, similarity=similarity)
    for shift in (1, 2, 4):
        assert at_place < similarity_loss(-fixed.roll(shift, 2), fixed, similarity=similarity) - 0.01


def test_identical_images_have_descriptors_without_difference():
    assert similarity_loss(image(), image(), similarity="mind").item() == 0


def test_mutual_information_of_independent_and_of_dependent_images():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 1, 40, 40, 40, generator=generator)
    other = torch.rand(1, 1, 40, 40, 40, generator=generator)
    assert mutual_information(noise, other).item() < 0.01
    assert mutual_information(noise, noise).item() > 0.6
    assert mutual_information(noise, torch.ones_like(noise)).item() == pytest.approx(0, abs=1e-5)


def test_mutual_information_of_two_equally_frequent_values_is_one():
    # Values at the ends of the range fall into one bin each: both entropies and the joint one are log 2.
    values = (torch.arange(512).view(1, 1, 8, 8, 8) % 2).float()
    assert mutual_information(values, -3 * values).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("similarity", MULTIMODAL)
def test_unobserved_places_and_other_pairs_do_not_count(similarity):
    fixed, moving = torch.cat([image(), image(seed=2)]), torch.cat([image(seed=1), image(seed=3)])
    both = similarity_loss(moving, fixed, similarity=similarity)
    alone = torch.cat([similarity_loss(moving[i : i + 1], fixed[i : i + 1], similarity=similarity) for i in range(2)])
    assert torch.allclose(both, alone, atol=1e-4)
    mask = torch.zeros(2, 1, *fixed.shape[2:])
    mask[:, :, :8] = 1
    masked = similarity_loss(moving, fixed, mask, similarity=similarity)
    assert not torch.allclose(masked, both, atol=1e-4)


@pytest.mark.parametrize("similarity", MULTIMODAL)
def test_gradients_are_finite(similarity):
    moving = image((8, 9, 10), 1).requires_grad_()
    similarity_loss(moving, image((8, 9, 10)), similarity=similarity).sum().backward()
    assert torch.isfinite(moving.grad).all()
    assert moving.grad.abs().max() > 0


@pytest.mark.parametrize("similarity", MULTIMODAL)
def test_an_inverted_and_deformed_image_is_registered(similarity):
    shape = (20, 22, 18)
    atlas = image(shape)
    generator = torch.Generator().manual_seed(1)
    truth = integrate_velocity(1.5 * resize(torch.randn(1, 3, 4, 4, 4, generator=generator), shape))
    fixed = warp(atlas, truth)
    config = RegistrationConfig(similarity=similarity, refine_iterations=(40, 40), smoothness=0.02)
    velocity = refine_velocity(atlas, -fixed, torch.ones(1, 1, *shape), spacing=(1, 1, 1), config=config)
    warped = warp(atlas, integrate_on(velocity, shape))
    assert (warped - fixed).abs().mean() < 0.7 * (atlas - fixed).abs().mean()


def test_settings_accept_the_terms_and_refuse_others():
    for similarity in ("lncc", "mse", *MULTIMODAL):
        plans = {"oneshot": {"registration": {"similarity": similarity}}}
        assert OneShotConfig.from_plans(plans).registration.similarity == similarity
    with pytest.raises(OneShotError, match="mind"):
        OneShotConfig.from_plans({"oneshot": {"registration": {"similarity": "ssim"}}})
