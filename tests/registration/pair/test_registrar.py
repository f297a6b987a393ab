"""Affine and deformable registration recover known maps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from tiny_volumes import blobs

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.affine import AffineResult, centre_alignment, register_affine
from nnunet_oneshot.registration.pair.fitting import _Level
from nnunet_oneshot.registration.pair.functional import (
    diffusion_energy,
    identity_grid,
    integrate_velocity,
    resize,
    warp,
)
from nnunet_oneshot.registration.pair.grid import RegistrationGrid
from nnunet_oneshot.registration.pair.quality import is_ambiguous
from nnunet_oneshot.registration.pair.registrar import AtlasRegistrar, register_arrays
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import atlas_coordinates, warp_atlas_to_case, warp_label_probabilities


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def pulled(image, matrix, shape=None):
    """image read at matrix(p), (1, *shape)."""
    dim = image.ndim - 1
    return affine_transform(
        image[0], matrix[:dim, :dim], matrix[:dim, dim], output_shape=shape or image.shape[1:], order=1, mode="nearest"
    )[None]


def mean_error(found, expected, shape):
    points = np.stack(np.meshgrid(*[np.arange(4, n - 4) for n in shape], indexing="ij")).reshape(len(shape), -1)
    points = np.concatenate([points, np.ones((1, points.shape[1]))])
    return np.linalg.norm((found @ points - expected @ points)[:-1], axis=0).mean()


def test_identity_stays_identity():
    image = blobs((24, 22, 20))
    result = register_affine(image, image, fixed_spacing=(1, 1, 1), moving_spacing=(1, 1, 1))
    assert mean_error(result.matrix, np.eye(4), image.shape[1:]) < 0.1


@pytest.mark.parametrize("shape", [(40, 36), (30, 28, 26)])
def test_known_affine_is_recovered(shape):
    dim = len(shape)
    moving = blobs(shape)
    matrix = np.eye(dim + 1)
    angle = 0.15
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:dim, :dim] *= 1.08
    centre = (np.array(shape) - 1) / 2
    matrix[:dim, dim] = centre - matrix[:dim, :dim] @ centre + np.arange(1, dim + 1)
    fixed = pulled(moving, matrix)
    result = register_affine(fixed, moving, fixed_spacing=(1,) * dim, moving_spacing=(1,) * dim)
    assert mean_error(result.matrix, matrix, shape) < 0.4
    assert result.metric_after < result.metric_before


def in_voxels(transform, centre, spacing):
    """A linear map about a centre in mm (3, 3) as a map of voxels, (4, 4)."""
    scale = np.diag(spacing)
    matrix = np.eye(4)
    matrix[:3, :3] = np.linalg.inv(scale) @ transform @ scale
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre
    return matrix


@pytest.mark.parametrize(
    "transform",
    [
        [[np.cos(0.15), -np.sin(0.15), 0], [np.sin(0.15), np.cos(0.15), 0], [0, 0, 1]],
        [[1.12, 0, 0], [0, 0.9, 0], [0, 0, 1.1]],
    ],
    ids=["rotation", "scaling"],
)
def test_rotation_and_scaling_in_mm_under_anisotropic_spacing(transform):
    shape, spacing = (20, 60, 50), (3.0, 1.0, 1.2)
    moving = blobs(shape)
    matrix = in_voxels(np.array(transform), (np.array(shape) - 1) / 2, spacing)
    result = register_affine(pulled(moving, matrix), moving, fixed_spacing=spacing, moving_spacing=spacing)
    # Errors in mm: both maps lead to voxels, which are scaled to mm.
    to_mm = np.diag([*spacing, 1.0])
    assert mean_error(to_mm @ result.matrix, to_mm @ matrix, shape) < 0.3


def test_translation_in_mm_under_anisotropic_spacing():
    shape, spacing = (16, 40, 40), (3.0, 1.0, 1.0)
    moving = blobs(shape)
    matrix = np.eye(4)
    matrix[:3, 3] = (1, -3, 2)
    result = register_affine(pulled(moving, matrix), moving, fixed_spacing=spacing, moving_spacing=spacing)
    assert np.abs((result.matrix[:3, 3] - matrix[:3, 3]) * spacing).max() < 1.0


def test_centres_are_aligned_across_spacings():
    matrix = centre_alignment((11, 11, 11), (21, 21, 21), (2, 2, 2), (1, 1, 1))
    assert np.allclose(matrix @ [5, 5, 5, 1], [10, 10, 10, 1])
    assert np.allclose(np.diag(matrix), [2, 2, 2, 1])


def test_constant_images_fall_back_to_the_centres():
    flat = np.ones((1, 12, 12, 12), np.float32)
    result = register_affine(flat, flat, fixed_spacing=(1, 1, 1), moving_spacing=(1, 1, 1))
    assert result.start == "identity"
    assert np.allclose(result.matrix, np.eye(4))


def test_affine_that_stretches_more_than_twofold_is_discarded(monkeypatch):
    """A small ball is explained best by stretching it threefold, which no anatomy does."""
    axes = np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    small, large = ((1 / (1 + np.exp(radius - edge)))[None].astype(np.float32) for edge in (4, 12))

    def largest_stretch():
        result = register_affine(small, large, fixed_spacing=(1, 1, 1), moving_spacing=(1, 1, 1))
        return np.linalg.svd(result.matrix[:3, :3], compute_uv=False).max()

    assert largest_stretch() <= 2
    monkeypatch.setattr("nnunet_oneshot.registration.pair.affine._LARGEST_STRETCH", np.inf)
    assert largest_stretch() > 2


def field_error(registration, velocity):
    """Distance in voxels between where a registration reads the atlas and where the known flow does, (*grid)."""
    found = atlas_coordinates(registration)
    if velocity.shape[1] == 2:
        found = found[1:, 0]
    known = integrate_velocity(velocity)[0]
    return (found - known - identity_grid(known.shape[1:])).norm(dim=0)


@pytest.mark.parametrize("shape", [(1, 40, 36), (32, 30, 28)])
def test_known_smooth_deformation_is_recovered(shape):
    atlas = blobs(shape[shape[0] == 1 :] if shape[0] == 1 else shape)
    dim = atlas.ndim - 1
    generator = torch.Generator().manual_seed(1)
    velocity = 1.5 * resize(torch.randn(1, dim, *[4] * dim, generator=generator), atlas.shape[1:])
    case = warp(torch.from_numpy(atlas)[None], integrate_velocity(velocity))[0].numpy()
    if dim == 2:
        atlas, case = atlas[:, None], case[:, None]
    registration = register_arrays(atlas, case, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1))
    warped, _ = warp_atlas_to_case(registration, atlas, np.zeros((1, *shape), np.int16))
    before, after = np.abs(atlas - case).mean(), np.abs(warped - case).mean()
    assert after < 0.5 * before
    moved = integrate_velocity(velocity)[0].norm(dim=0)
    error = field_error(registration, velocity)
    # Where the images show something; two voxels from the border, beyond which nothing was observed.
    inner = (slice(2, -2),) * dim
    assert error[inner].mean() < 0.4 * moved[inner].mean()
    assert registration.quality["similarity_after"] > registration.quality["similarity_before"]
    assert registration.quality["folding"] < 1e-4
    assert registration.quality["inverse_consistency_mm"] < 0.15
    assert registration.quality["observed"] > 0.8
    assert registration.velocity.shape[0] == 3


def test_a_flow_that_folds_is_smoothed(monkeypatch):
    image = blobs((20, 18, 16))

    def rough(atlas, fixed, mask, **_):
        return 6 * torch.randn(1, 3, 10, 9, 8, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("nnunet_oneshot.registration.pair.registrar.refine_velocity", rough)
    smoothed = register_arrays(image, image, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1))
    monkeypatch.setattr("nnunet_oneshot.registration.pair.registrar.without_folds", lambda velocity, *_, **__: velocity)
    folded = register_arrays(image, image, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1))
    assert folded.quality["folding"] > 0 >= folded.quality["jacobian_min"]
    assert smoothed.quality["folding"] == 0 < smoothed.quality["jacobian_min"]


@pytest.mark.parametrize(("level", "share"), [((40, 24, 24), 1), ((20, 12, 12), 1 / 4), ((10, 6, 6), 1 / 16)])
def test_coarse_levels_are_smoothed_less(level, share):
    shape = (40, 24, 24)
    image = torch.from_numpy(blobs(shape))[None]
    config = RegistrationConfig(velocity_downsample=1, similarity="mse")
    stiff, free = (
        _Level(
            image,
            image,
            torch.ones_like(image),
            level,
            spacing=(1, 1, 1),
            config=dataclasses.replace(config, smoothness=weight),
            guide=None,
        )
        for weight in (1.0, 0.0)
    )
    field = torch.rand(1, 3, *level, generator=torch.Generator().manual_seed(0))
    energy = diffusion_energy(field, [n / m for n, m in zip(shape, level, strict=True)])
    assert (stiff.loss(field) - free.loss(field)).item() == pytest.approx(share * energy.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("atlas_shape", "case_shape"), [((8, 8, 8), (8, 8, 8)), ((9, 31, 12), (26, 10, 15)), ((1, 33, 20), (1, 18, 41))]
)
def test_odd_tiny_and_unequal_shapes(atlas_shape, case_shape):
    registration = register_arrays(
        blobs(atlas_shape) if atlas_shape[0] > 1 else blobs(atlas_shape[1:])[:, None],
        blobs(case_shape, 1) if case_shape[0] > 1 else blobs(case_shape[1:], 1)[:, None],
        atlas_spacing=(1, 1, 1),
        case_spacing=(1.5, 1, 1),
    )
    coordinates = atlas_coordinates(registration)
    assert coordinates.shape == (3, *case_shape)
    assert torch.isfinite(coordinates).all()


def test_several_channels_are_all_used():
    image = np.concatenate([blobs((20, 20, 20), seed) for seed in range(2)])
    registration = register_arrays(image, np.roll(image, 2, 1), atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1))
    assert registration.quality["similarity_after"] > 0.5


def test_equal_inputs_give_equal_results():
    atlas, case = blobs((20, 18, 16)), blobs((20, 18, 16), 3)
    first, second = (register_arrays(atlas, case, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1)) for _ in range(2))
    assert np.array_equal(first.velocity, second.velocity)
    assert np.array_equal(first.affine, second.affine)


def test_label_probabilities_sum_to_one():
    atlas, case = blobs((16, 16, 16)), blobs((16, 16, 16), 2)
    seg = (atlas > 1).astype(np.int16) + (atlas > 2)
    registration = register_arrays(atlas, case, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1))
    probabilities = warp_label_probabilities(registration, seg, [0, 1, 2])
    assert np.allclose(probabilities.sum(0), 1, atol=1e-4)


def test_affine_alone_needs_no_iterations():
    config = RegistrationConfig(refine_iterations=(0,))
    atlas = blobs((16, 16, 16))
    registration = register_arrays(atlas, atlas, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1), config=config)
    assert not registration.velocity.any()


def test_inverse_consistency_is_in_mm():
    velocity = 2 * torch.randn(1, 3, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for edge in (1.0, 2.0):
        registrar = AtlasRegistrar(
            "atlas",
            blobs((16, 16, 16)),
            (edge, edge, edge),
            config=RegistrationConfig(),
            device=torch.device("cpu"),
        )
        mask = torch.ones(1, 1, 16, 16, 16)
        errors.append(registrar._quality(velocity, registrar.image, registrar.image, mask)[0])
    assert errors[1]["inverse_consistency_mm"] == pytest.approx(2 * errors[0]["inverse_consistency_mm"], rel=1e-3)
    assert errors[0]["inverse_consistency_max_mm"] >= errors[0]["inverse_consistency_mm"] > 0


def test_an_initial_map_turns_every_start():
    moving = blobs((24, 26, 28))
    turned = np.ascontiguousarray(np.flip(np.moveaxis(moving, 1, 3), 2))
    # Axes of the turned copy are (1, reversed 2, 0) of the original.
    initial = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 27], [0, 0, 0, 1.0]])
    result = register_affine(turned, moving, fixed_spacing=(1, 1, 1), moving_spacing=(1, 1, 1), initial=initial)
    assert mean_error(result.matrix, initial, turned.shape[1:]) < 0.1


def test_registration_grid_respects_the_limit_and_covers_the_atlas():
    grid = RegistrationGrid.over((100, 200, 20), (1.0, 1.0, 5.0), 60_000)
    assert np.prod(grid.shape) <= 60_000
    assert grid.shape[2] == 20
    assert np.allclose(np.array(grid.shape) * grid.spacing, [100, 200, 100])


@pytest.mark.parametrize("shape", [(17, 12), (9, 12, 10)])
def test_slabs_change_nothing(shape, monkeypatch):
    dim = len(shape)
    grid = RegistrationGrid.over(shape, (1.0,) * dim, 500)
    case, affine = np.random.default_rng(0).random((2, *shape[::-1]), np.float32), np.eye(dim + 1)
    affine[:dim, dim] = 1.5
    whole = (*grid.fixed_image(case, affine), grid.fixed_maps(case, affine, (4,) * dim))
    monkeypatch.setattr("nnunet_oneshot.registration.pair.grid._SLAB_VOXELS", 2 * shape[1])
    parts = (*grid.fixed_image(case, affine), grid.fixed_maps(case, affine, (4,) * dim))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert 0 < whole[1].mean() < 1


def test_similarity_at_labels_is_that_of_their_surroundings():
    atlas = blobs((28, 26, 24))
    case = atlas.copy()
    case[:, 14:] = np.random.default_rng(0).normal(size=case[:, 14:].shape)
    low, high = np.zeros((1, 28, 26, 24), np.int16), np.zeros((1, 28, 26, 24), np.int16)
    low[:, 4:7, 10:14, 10:14] = 2
    high[:, 20:24, 10:14, 10:14] = 1
    spacing = (1.0, 1.0, 1.0)
    settings = {"atlas_spacing": spacing, "case_spacing": spacing, "config": RegistrationConfig(affine=False)}

    at_low, at_high = (register_arrays(atlas, case, **settings, atlas_labels=labels) for labels in (low, high))
    without = register_arrays(atlas, case, **settings)

    assert at_low.quality["similarity_at_labels"] > 0.8 > 0.5 > at_high.quality["similarity_at_labels"]
    assert "similarity_at_labels" not in without.quality
    assert np.array_equal(at_low.velocity, without.velocity)


@pytest.mark.parametrize("change", ["1e-9", "1e9", "offset", "hot voxel"])
def test_registration_does_not_depend_on_the_scale_of_intensities(change):
    atlas = blobs((24, 26, 22))
    case = np.roll(atlas, (2, -1), axis=(1, 2))
    changed = {
        "1e-9": case * np.float32(1e-9),
        "1e9": case * np.float32(1e9),
        "offset": case + np.float32(1000),
        "hot voxel": np.where(np.indices(case.shape).sum(0) == 3, np.float32(1e6), case),
    }[change]
    known = identity_grid(case.shape[1:]) - torch.tensor([2.0, -1.0, 0.0]).view(3, 1, 1, 1)
    errors = []
    for image in (case, changed):
        found = atlas_coordinates(register_arrays(atlas, image, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1)))
        errors.append((found - known).norm(dim=0)[4:-4, 4:-4, 4:-4].mean())
    assert errors[0] < 0.5
    assert errors[1] == pytest.approx(float(errors[0]), abs=0.1)


def rungs(first, step, length=120, width=24):
    """A ladder (1, length, width, width) of equal blocks, with a larger one at its end: (volume, block centres)."""
    volume = np.full((length, width, width), 0.1, np.float32)
    centres = [first + step * number for number in range(5)]
    for centre in centres:
        volume[max(0, centre - 5) : centre + 6, 7:17, 7:17] += 1
    volume[centres[-1] + 9 : centres[-1] + 16, 2:22, 2:22] += 2
    return volume[None] + np.random.default_rng(first).normal(0, 0.02, volume.shape).astype(np.float32), centres


def test_a_ladder_that_lies_elsewhere_is_met_rung_by_rung():
    """Aligned centres lie one rung and a half off; only the end tells which rung is which."""
    atlas, centres = rungs(20, 16)
    case, moved = rungs(44, 16, length=132)
    registration = register_arrays(atlas, case, atlas_spacing=(2, 2, 2), case_spacing=(2, 2, 2))
    read = registration.affine @ np.array([[float(c) for c in moved], [11.5] * 5, [11.5] * 5, [1.0] * 5])
    assert np.abs(read[0] - centres).max() < 4


def test_equal_rungs_are_called_ambiguous_and_an_end_tells_them_apart():
    atlas, _ = rungs(20, 16)
    endless = np.concatenate([np.tile(atlas[:, 12:28], (1, 8, 1, 1))], axis=1)
    spacing = {"atlas_spacing": (2, 2, 2), "case_spacing": (2, 2, 2)}
    assert is_ambiguous(register_arrays(endless[:, :112], endless[:, 6:118], **spacing).quality)
    assert not is_ambiguous(register_arrays(atlas, atlas.copy(), **spacing).quality)


@pytest.mark.parametrize(("trust", "rung"), [([1.0], 2), ([0.0], 3)])
def test_labels_decide_where_images_alone_hardly_tell_rungs_apart(trust, rung, monkeypatch):
    """The known map leads to the next rung; a student finds the right one."""
    atlas = blobs((48, 16, 16))
    one_rung = np.eye(4)
    one_rung[0, 3] = 12
    found = AffineResult(one_rung, "centre", 0.0, 0.0, rivals=(np.eye(4),))
    monkeypatch.setattr("nnunet_oneshot.registration.pair.registrar.register_affine", lambda *_, **__: found)
    registrar = AtlasRegistrar("atlas", atlas, (1, 1, 1), config=RegistrationConfig(), device=torch.device("cpu"))
    velocity, quality = np.zeros((3, 4, 4, 4), np.float32), {"affine_start": "centre", "rival_margin": 0.01}
    known = Registration("atlas", "case", one_rung, velocity, (48, 16, 16), (48, 16, 16), quality)
    label = np.zeros((1, 48, 16, 16), np.float32)
    label[:, 24:32, 4:12, 4:12] = 1
    chosen = registrar.realign(
        atlas,
        (1, 1, 1),
        known=known,
        atlas_maps=np.concatenate([label, np.ones_like(label)]),
        probabilities=label,
        trust=np.array(trust),
    )
    assert (chosen.affine[0, 3], chosen.start) == ((0, "labels") if rung == 2 else (12, "centre"))
    assert chosen.rival_margin == 0.01


def test_an_earlier_registration_passes_on_its_margin():
    atlas = blobs((16, 16, 16))
    registrar = AtlasRegistrar(
        "atlas", atlas, (1, 1, 1), config=RegistrationConfig(refine_iterations=(1,)), device=torch.device("cpu")
    )
    first = register_arrays(atlas, atlas, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1))
    known = dataclasses.replace(first, quality={**first.quality, "rival_margin": 0.01})
    again = registrar.align(atlas, (1, 1, 1), known=known)
    assert again.rival_margin == 0.01
    assert np.array_equal(again.affine, first.affine)


def test_the_direction_in_which_axes_are_stored_does_not_matter():
    """Slopes at a field of zeros, where each voxel is read at its centre, must be taken to both sides."""
    atlas, case = blobs((24, 26, 22)), blobs((24, 26, 22), 1)
    turned = [np.ascontiguousarray(volume[:, ::-1, ::-1, ::-1]) for volume in (atlas, case)]
    settings = {"atlas_spacing": (1, 1, 1), "case_spacing": (1, 1, 1)}
    config = RegistrationConfig(affine=False, search_reach=0.0)
    first, second = (register_arrays(*pair, config=config, **settings) for pair in ((atlas, case), turned))
    difference = np.abs(first.velocity + second.velocity[:, ::-1, ::-1, ::-1])
    assert difference.mean() < 0.03 * np.abs(first.velocity).mean()
