"""The search for large displacements: it finds what gradients do not reach, and leaves the rest alone."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
import torch
from tiny_volumes import blobs

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.fitting import refine_velocity
from nnunet_oneshot.registration.pair.functional import folding, identity_grid, integrate_on, integrate_velocity, resize
from nnunet_oneshot.registration.pair.search import (
    consistent,
    coupled_search,
    logarithm,
    matching_cost,
    node_features,
    offsets,
    search_grid,
    searched_velocity,
)

CONFIG = RegistrationConfig(refine_iterations=(30, 10), search_reach=0.4)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def ball(shape, centre, radius=5.0):
    """A bright ball with a soft edge, (1, 1, *shape)."""
    distance = (identity_grid(shape) - torch.tensor(centre).view(-1, *[1] * len(shape))).norm(dim=0)
    return torch.sigmoid(2 * (radius - distance))[None, None]


def displaced_ball(dim):
    """Atlas and fixed image with a ball moved by 20 voxels along the first axis, and its voxels in the fixed image."""
    shape = (48, *[32] * (dim - 1))
    middle = [15.5] * (dim - 1)
    atlas, fixed = ball(shape, [12.0, *middle]), ball(shape, [32.0, *middle])
    return atlas, fixed, fixed[0, 0] > 0.5


def standardised(image):
    axes = tuple(range(2, image.ndim))
    return (image - image.mean(axes, keepdim=True)) / image.std(axes, keepdim=True).clamp_min(1e-6)


def fitted(atlas, fixed, config=CONFIG, mask=None):
    mask = torch.ones_like(fixed[:, :1]) if mask is None else mask
    spacing = (1,) * (fixed.ndim - 2)
    velocity = refine_velocity(standardised(atlas), standardised(fixed), mask, spacing=spacing, config=config)
    return integrate_on(velocity, fixed.shape[2:])


@pytest.mark.parametrize("dim", [2, 3])
def test_a_displacement_beyond_the_reach_of_gradients_is_found(dim):
    atlas, fixed, inside = displaced_ball(dim)
    without = fitted(atlas, fixed, dataclasses.replace(CONFIG, search_reach=0.0))
    found = fitted(atlas, fixed)
    assert found[0, 0][inside].mean().item() == pytest.approx(-20, abs=2)
    assert without[0, 0][inside].mean().item() > -10
    assert folding(found).item() == 0


def test_pairs_of_a_batch_do_not_influence_each_other():
    atlas, fixed, _ = displaced_ball(2)
    both = fitted(atlas, torch.cat([fixed, atlas]))
    assert torch.allclose(both[:1], fitted(atlas, fixed), atol=1e-3)
    assert torch.allclose(both[1:], fitted(atlas, atlas), atol=1e-3)


@pytest.mark.parametrize("shape", [(48, 40), (32, 28, 24)])
def test_identity_stays_identity(shape):
    image = torch.from_numpy(blobs(shape))[None]
    mask = torch.ones_like(image)
    assert searched_velocity(image, image, mask, spacing=(1,) * len(shape), reach=0.4).abs().max() == 0
    without = dataclasses.replace(CONFIG, search_reach=0.0)
    assert torch.equal(fitted(image, image), fitted(image, image, without))


def test_constant_images_are_not_displaced():
    flat = torch.full((1, 1, 32, 32, 32), 2.0)
    assert searched_velocity(flat, flat, torch.ones_like(flat), spacing=(1, 1, 1), reach=0.4).abs().max() == 0
    assert fitted(flat, flat).abs().max() == 0


def test_a_second_channel_counts():
    atlas, fixed, inside = displaced_ball(3)
    empty = torch.zeros_like(atlas)
    found = fitted(torch.cat([empty, atlas], 1), torch.cat([empty, fixed], 1))
    assert found[0, 0][inside].mean().item() == pytest.approx(-20, abs=2)


def test_places_that_were_not_observed_do_not_count():
    atlas = torch.from_numpy(blobs((48, 24, 24)))[None]
    fixed, mask = atlas.clone(), torch.ones_like(atlas)
    fixed[:, :, 24:] = atlas[:, :, 12:36]
    everywhere = searched_velocity(atlas, fixed, mask, spacing=(1, 1, 1), reach=0.4)
    mask[:, :, 24:] = 0
    masked = searched_velocity(atlas, fixed, mask, spacing=(1, 1, 1), reach=0.4)
    assert masked.abs().max() < 1
    assert everywhere.abs().max() > 6
    _, share = node_features(fixed, mask, (12, 6, 6))
    assert (share[:, :, 6:] == 0).all() and (share[:, :, :5] == 1).all()
    nothing = searched_velocity(atlas, fixed, torch.zeros_like(mask), spacing=(1, 1, 1), reach=0.4)
    assert nothing.abs().max() == 0


@pytest.mark.parametrize(("shape", "spacing"), [((8, 8, 8), (1, 1, 1)), ((12, 12), (1, 1)), ((2, 3, 2), (1, 1, 1))])
def test_tiny_grids_are_not_searched(shape, spacing):
    image = torch.rand(1, 1, *shape)
    assert search_grid(shape, spacing, 0.4) is None
    assert searched_velocity(image, image, torch.ones_like(image), spacing=spacing, reach=0.4) is None


@pytest.mark.parametrize("reach", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((128, 128, 128), (1, 1, 1)), ((20, 320, 320), (5, 0.8, 0.8)), ((6, 600, 600), (1, 1, 1)), ((900, 700), (1, 1))],
)
def test_the_table_of_costs_is_bounded(shape, spacing, reach):
    plan = search_grid(shape, spacing, reach)
    if plan is not None:
        nodes, radii = plan
        assert prod(nodes) * prod(2 * r + 1 for r in radii) < 25e6
        assert all(1 <= m <= n for m, n in zip(nodes, shape, strict=True))
        assert all(2 * r + 1 <= max(m, 1) for r, m in zip(radii, nodes, strict=True))


def test_offsets_follow_the_order_of_costs():
    features = torch.zeros(1, 1, 7, 7)
    partners = features.clone()
    features[0, 0, 2, 3] = partners[0, 0, 4, 2] = 1.0
    seen = torch.ones_like(features)
    cost = matching_cost((features, seen), (partners, seen), (2, 2))
    assert offsets((2, 2))[cost[:, 2, 3].argmin()].tolist() == [2.0, -1.0]


def test_without_a_preference_nothing_is_displaced():
    assert coupled_search(torch.ones(25, 5, 6), (2, 2), (1.0, 1.0)).abs().max() == 0


def test_consistent_fields_stay_and_contradictions_halve():
    forward = torch.full((1, 2, 8, 8), 2.0)
    assert torch.allclose(consistent(forward, -forward), forward)
    assert consistent(forward, torch.zeros_like(forward)).max() == pytest.approx(1.0)


def test_the_flow_of_the_logarithm_is_the_displacement():
    generator = torch.Generator().manual_seed(0)
    velocity = resize(2 * torch.randn(1, 2, 4, 4, generator=generator), (24, 24))
    displacement = integrate_velocity(velocity, steps=7)
    error = (integrate_velocity(logarithm(displacement), steps=7) - displacement)[:, :, 4:-4, 4:-4]
    assert error.norm(dim=1).mean() < 0.05 * displacement.norm(dim=1).mean()


def test_the_flow_of_the_logarithm_does_not_fold_where_the_displacement_does():
    displacement = torch.zeros(1, 2, 20, 20)
    displacement[:, 0, :10], displacement[:, 0, 10:] = 3.0, -3.0
    assert folding(displacement).item() > 0
    assert folding(integrate_velocity(logarithm(displacement), steps=7)).item() == 0
