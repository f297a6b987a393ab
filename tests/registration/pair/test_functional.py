"""Warps, integration and losses against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from nnunet_oneshot.registration.pair import functional as fn
from nnunet_oneshot.registration.pair.similarities import similarity_loss, similarity_loss_to


@pytest.mark.parametrize("shape", [(9, 12), (7, 8, 10)])
def test_zero_displacement_is_identity(shape):
    volume = torch.rand(2, 3, *shape)
    assert torch.allclose(fn.warp(volume, torch.zeros(2, len(shape), *shape)), volume, atol=1e-5)


def test_whole_voxel_translation_moves_content_against_the_displacement():
    volume = torch.rand(1, 1, 6, 7, 8)
    displacement = torch.zeros(1, 3, 6, 7, 8)
    displacement[:, 1] = 2
    warped = fn.warp(volume, displacement)
    assert torch.allclose(warped[:, :, :, :5], volume[:, :, :, 2:], atol=1e-5)


def test_sampling_outside_repeats_the_border_or_gives_zero():
    volume = torch.arange(1.0, 5).view(1, 1, 4, 1).expand(1, 1, 4, 3)
    point = torch.tensor([[-3.0], [1.0]]).view(1, 2, 1, 1)
    assert fn.sample_at(volume, point).item() == pytest.approx(1)
    assert fn.sample_at(volume, point, padding="zeros").item() == 0


def test_nearest_sampling_keeps_labels():
    labels = torch.randint(0, 5, (1, 1, 6, 6, 6)).float()
    points = fn.identity_grid((6, 6, 6))[None] + 0.3
    assert torch.equal(fn.sample_at(labels, points, mode="nearest"), labels)


def test_constant_velocity_integrates_to_itself():
    velocity = torch.full((1, 3, 8, 8, 8), 0.7)
    assert torch.allclose(fn.integrate_velocity(velocity, steps=6), velocity, atol=1e-5)


def test_linear_velocity_integrates_to_the_exponential():
    # dx/dt = a (x - c) flows to c + exp(a) (x - c).
    size, rate = 33, 0.2
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    velocity = torch.zeros(1, 2, size, size)
    velocity[0, 0] = rate * axis[:, None]
    displacement = fn.integrate_velocity(velocity, steps=8)
    expected = (math.exp(rate) - 1) * axis[:, None].expand(size, size)
    inner = slice(8, 25)
    assert torch.allclose(displacement[0, 0, inner, inner], expected[inner, inner], atol=0.02)


def _smooth_velocity(shape, magnitude=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, len(shape), *[4] * len(shape), generator=generator)
    return magnitude * fn.resize(coarse, shape)


@pytest.mark.parametrize("shape", [(24, 20), (20, 24, 18)])
def test_negative_velocity_inverts(shape):
    velocity = _smooth_velocity(shape, 1.0)
    forward, backward = (fn.integrate_velocity(sign * velocity, steps=7) for sign in (1, -1))
    residual = fn.compose(forward, backward)[(slice(None), slice(None), *[slice(4, -4)] * len(shape))]
    assert residual.abs().mean() < 0.05


@pytest.mark.parametrize("shape", [(24, 20), (20, 24, 18)])
def test_inverse_residual_of_smooth_fields_is_small_and_of_rough_ones_is_not(shape):
    def error(velocity):
        residual, inside = fn.inverse_residual(velocity)
        return ((residual.norm(dim=1) * inside).sum() / inside.sum()).item()

    assert error(torch.zeros(1, len(shape), *shape)) == 0
    assert error(_smooth_velocity(shape, 1.0)) < 0.05
    rough = 3 * torch.randn(1, len(shape), *shape, generator=torch.Generator().manual_seed(0))
    assert error(rough) > 10 * error(_smooth_velocity(shape, 1.0))


def test_inverse_residual_leaves_out_what_leaves_the_grid():
    velocity = torch.zeros(1, 2, 8, 8)
    velocity[:, 0] = 2.5
    residual, inside = fn.inverse_residual(velocity)
    assert inside[0, :5].all()
    assert not inside[0, 6:].any()
    assert torch.allclose(residual * inside[:, None], torch.zeros(1), atol=1e-4)


def test_composition_of_translations_adds():
    first, second = torch.full((1, 2, 9, 9), 1.0), torch.full((1, 2, 9, 9), -0.25)
    assert torch.allclose(fn.compose(first, second), torch.full((1, 2, 9, 9), 0.75))


def test_velocity_on_a_coarser_grid_has_the_same_unit():
    velocity = torch.full((1, 3, 6, 5, 4), 3.0)
    assert torch.allclose(fn.integrate_on(velocity, (12, 15, 8)), torch.full((1, 3, 12, 15, 8), 3.0), atol=1e-4)


@pytest.mark.parametrize("shape", [(7, 9), (6, 7, 8)])
def test_jacobian_of_a_linear_map(shape):
    dim = len(shape)
    matrix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    displacement = torch.einsum("ij,j...->i...", matrix, fn.identity_grid(shape))[None]
    expected = torch.linalg.det(matrix + torch.eye(dim)).expand(1, *shape)
    assert torch.allclose(fn.jacobian_determinant(displacement), expected, atol=1e-3)


def test_jacobian_of_a_scaling():
    shape = (8, 9, 10)
    grid = fn.identity_grid(shape)[None]
    assert torch.allclose(fn.jacobian_determinant(0.5 * grid), torch.full((1, *shape), 1.5**3), atol=1e-3)


def test_folding_counts_reversed_places():
    displacement = torch.zeros(1, 2, 10, 10)
    displacement[0, 0] = -2 * torch.arange(10.0)[:, None]
    assert fn.folding(displacement).item() == 1
    assert fn.folding(torch.zeros(1, 2, 10, 10)).item() == 0


def test_affine_moves_points():
    affine = torch.tensor([[2.0, 0, 0, 1], [0, 1, 0, -1], [0, 0, 1, 0.5], [0, 0, 0, 1]])
    point = torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1, 1)
    assert fn.transform_points(affine, point).flatten().tolist() == [3.0, 1.0, 3.5]


def test_lncc_is_minus_one_for_linearly_related_images():
    image = torch.rand(2, 1, 12, 12, 12)
    loss = similarity_loss(3 * image + 5, image, kernel=5)
    assert torch.allclose(loss, torch.full((2,), -1.0), atol=0.02)


def test_similarity_ignores_what_was_not_observed():
    fixed = torch.rand(1, 1, 10, 10)
    moving = fixed.clone()
    moving[..., 5:] += 10
    mask = torch.ones(1, 1, 10, 10)
    mask[..., 5:] = 0
    assert similarity_loss(moving, fixed, mask, similarity="mse").item() == 0
    assert similarity_loss(moving, fixed, similarity="mse").item() == pytest.approx(50, rel=1e-4)


def test_pairs_of_a_batch_are_scored_apart():
    fixed, moving = torch.rand(2, 1, 10, 10, 10), torch.rand(2, 1, 10, 10, 10)
    both = similarity_loss(moving, fixed)
    alone = torch.cat([similarity_loss(moving[i : i + 1], fixed[i : i + 1]) for i in range(2)])
    assert torch.allclose(both, alone, atol=1e-5)


def test_diffusion_energy_of_constant_and_linear_fields():
    assert fn.diffusion_energy(torch.full((1, 3, 5, 5, 5), 4.0), (1, 1, 1)).item() == 0
    field = torch.zeros(1, 3, 6, 6, 6)
    field[0, 0] = 0.5 * torch.arange(6.0)[:, None, None]
    assert fn.diffusion_energy(field, (1, 1, 1)).item() == pytest.approx(0.25)


def test_diffusion_energy_is_physical():
    # One voxel of 3 mm displaced over one voxel of 1 mm is a derivative of 3.
    field = torch.zeros(1, 2, 6, 6)
    field[0, 0] = torch.arange(6.0)[None, :]
    assert fn.diffusion_energy(field, (3.0, 1.0)).item() == pytest.approx(9)


def test_contrastive_loss_prefers_cases_like_the_atlas():
    atlas = torch.tensor([[1.0, 0], [1.0, 0]])
    near = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    assert fn.contrastive_loss(atlas[:1], near[:1]).item() == 0
    apart = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    assert fn.contrastive_loss(atlas, apart) < fn.contrastive_loss(atlas, -apart)


def test_contrastive_loss_closed_form():
    # Positive and negative cosine are both 1: -log(1/2).
    ones = torch.ones(2, 4)
    assert fn.contrastive_loss(ones, ones).item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 6)])
def test_box_mean_is_that_of_the_cube_and_has_its_gradient(shape):
    image = torch.rand(2, 2, *shape, dtype=torch.float64, requires_grad=True)
    centre = (0, 1, *[2] * len(shape))
    cube = image[(0, 1, *[slice(1, 4)] * len(shape))]
    assert fn.box_mean(image, 3)[centre].item() == pytest.approx(cube.mean().item())
    assert torch.autograd.gradcheck(lambda x: fn.box_mean(x, 3), image)


@pytest.mark.parametrize("similarity", ["lncc", "mse", "mind", "nmi"])
def test_loss_to_one_image_serves_many(similarity):
    fixed, first, second = torch.rand(3, 2, 1, 9, 8, 10)
    mask = (torch.rand(2, 1, 9, 8, 10) > 0.3).float()
    loss = similarity_loss_to(fixed, mask, similarity=similarity, kernel=5)
    for image in (first, second):
        assert torch.equal(loss(image), similarity_loss(image, fixed, mask, similarity=similarity, kernel=5))
    assert not torch.allclose(loss(first), loss(second), atol=1e-7)


@pytest.mark.parametrize("shape", [(24, 20), (20, 16, 18)])
def test_folds_are_smoothed_where_they_are(shape):
    smooth = torch.stack([torch.sin(2 * torch.pi * x / 16) for x in fn.identity_grid(shape)])[None]
    folded = smooth.clone()
    block = (0, slice(None), *[slice(5, 10)] * len(shape))
    folded[block] += 8 * torch.randn(folded[block].shape, generator=torch.Generator().manual_seed(0))
    both = torch.cat([smooth, folded])
    assert [bool(share > 0) for share in fn.folding(fn.integrate_velocity(both, steps=7))] == [False, True]
    result = fn.without_folds(both, shape)
    assert torch.equal(result[0], both[0])
    assert fn.folding(fn.integrate_velocity(result, steps=7)).max() == 0
    assert torch.equal(result[1, :, -3:], both[1, :, -3:])


@pytest.mark.parametrize(("size", "target"), [(60, 54), (60, 20), (7, 3), (5, 4), (3, 7)])
def test_downsampling_averages_what_a_voxel_covers(size, target):
    """The mean of a linear ramp over a voxel is its value in the middle of the voxel."""
    for axis in range(3):
        shape = [4, 4, 4]
        shape[axis] = size
        fine = (torch.arange(size) + 0.5).view([-1 if a == axis else 1 for a in range(3)]).expand(shape)
        coarse_shape = [target if a == axis else 4 for a in range(3)]
        found = fn.downsample(fine[None, None].contiguous(), coarse_shape)[0, 0]
        middles = (torch.arange(target) + 0.5) * size / target
        expected = middles.view([-1 if a == axis else 1 for a in range(3)]).expand(coarse_shape)
        if target < size:
            # A ramp within the fine voxels would give the middles; constant voxels differ by a bounded amount.
            assert (found - expected).abs().max() < 0.25
        assert found.sum() * size / target == pytest.approx(float(fine.sum()), rel=1e-5)


def test_downsampling_of_parts_of_voxels_is_exact():
    found = fn.downsample(torch.tensor([[[[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]]]), (2, 2))
    assert found[0, 0, 0].tolist() == pytest.approx([(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 4) / 1.5])
