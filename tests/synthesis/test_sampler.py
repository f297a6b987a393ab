"""Synthetic and real patches stay aligned, whatever deformation is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_oneshot.config import SynthesisConfig
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import warp_atlas_to_case
from nnunet_oneshot.synthesis.functional import (
    local_appearance_difference,
    match_quantiles,
    random_velocity,
    transfer_appearance,
)
from nnunet_oneshot.synthesis.sampler import (
    Atlas,
    Flows,
    Patch,
    case_locations,
    draw_deformation,
    sample_patch,
    with_own_mask,
)
from nnunet_oneshot.synthesis.spatial import Lattice, Places

SHAPE = (20, 22, 18)
ALWAYS = SynthesisConfig(p_scale=1, p_mix=1, p_random=1, random_magnitude=1.0)


def smooth_image(seed=0, shape=SHAPE):
    image = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return (image / image.std())[None].astype(np.float32)


def registration(seed=0, shift=(1.0, -2.0, 0.5)):
    affine = np.eye(4)
    affine[:3, 3] = shift
    rng = np.random.default_rng(seed)
    velocity = random_velocity((10, 11, 9), SHAPE, magnitude=0.8, smoothness=5, rng=rng)
    return Registration("a", "c", affine, velocity.numpy(), SHAPE, SHAPE, {"similarity_after": 0.5})


def atlas():
    image = smooth_image()
    seg = np.digitize(image, (0.0, 0.6)).astype(np.int16)
    return Atlas(torch.from_numpy(image), torch.from_numpy(seg), {1: np.argwhere(seg == 1), 2: np.argwhere(seg == 2)})


def places(shape=SHAPE, corner=(0, 0, 0), *, step=2, whole=True):
    """A box of voxels of the case."""
    lattice = Lattice(tuple(shape), step)
    points = lattice.voxels() + torch.tensor(corner, dtype=torch.float32).view(3, 1, 1, 1)
    return Places(lattice, points, tuple(corner) if whole else None)


def drawn(config=ALWAYS, augment=True, seed=0):
    np.random.seed(seed)
    return draw_deformation(registration(1), lambda: registration(2), config, augment=augment)


def test_without_augmentation_the_patch_is_the_registration():
    source, pair = atlas(), registration(1)
    patch = sample_patch(places(), drawn(augment=False), source, smooth_image(3))
    image, seg = warp_atlas_to_case(pair, source.image.numpy(), source.seg.numpy())
    assert np.abs(patch.synthetic.numpy() - image).mean() < 0.02
    assert (patch.seg.numpy() == seg).mean() > 0.99
    assert np.allclose(patch.real.numpy(), smooth_image(3), atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_drawn_deformations_keep_both_patches_aligned(seed):
    """Where the case is the warped atlas itself, synthetic and real patch must agree."""
    source, pair = atlas(), registration(1)
    case, _ = warp_atlas_to_case(pair, source.image.numpy(), source.seg.numpy())
    inner = places([n - 8 for n in SHAPE], (4, 4, 4))
    plain = sample_patch(inner, drawn(augment=False), source, case)
    patch = sample_patch(inner, drawn(seed=seed), source, case)
    inside = patch.real != 0
    moved = (patch.synthetic - plain.synthetic).abs()[inside].mean()
    apart = (patch.synthetic - patch.real).abs()[inside].mean()
    assert moved > 0.05
    assert apart < 0.4 * moved


def test_label_follows_the_synthetic_image_exactly():
    source = atlas()
    patch = sample_patch(places(), drawn(seed=5), source, smooth_image())
    expected = np.digitize(patch.synthetic.numpy(), (0.0, 0.6))
    inside = patch.seg.numpy() >= 0
    assert (patch.seg.numpy() == expected)[inside].mean() > 0.9


def test_outside_the_case_is_padded_as_nnunet_does():
    patch = sample_patch(places((6, 6, 6), (-10, -10, -10)), drawn(augment=False), atlas(), smooth_image())
    assert not patch.synthetic.any()
    assert not patch.real.any()
    assert (patch.seg == -1).all()


def test_atlas_voxel_is_found_in_the_case():
    deformation = drawn(seed=2)
    source = atlas()
    hits = []
    for place in case_locations(deformation, source.class_locations[2][::20, 1:]):
        patch = sample_patch(places((1, 1, 1), place.tolist()), deformation, source, smooth_image())
        hits.append(int(patch.seg) == 2)
    assert np.mean(hits) > 0.6


class Reads:
    """A case on disk that notes what is read."""

    shape = (1, *SHAPE)
    dtype = np.dtype(np.float32)

    def __init__(self):
        self.boxes = []

    def __getitem__(self, index):
        self.boxes.append([part.stop - part.start for part in index[1:]])
        return smooth_image()[index]


@pytest.mark.parametrize("augment", [False, True])
def test_only_the_part_of_the_case_around_the_patch_is_read(augment):
    case = Reads()
    sample_patch(places((6, 6, 6), (4, 4, 4)), drawn(augment=augment), atlas(), case)
    assert len(case.boxes) == 1
    assert max(case.boxes[0]) <= (14 if augment else 6)


@pytest.mark.parametrize("augment", [False, True])
def test_the_patch_is_that_part_of_the_warped_volume(augment):
    """Flows of the part around the patch, or kept ones, on every voxel: to rounding the warp of the whole volume."""
    source, pair, corner, shape = atlas(), registration(1), (3, 5, 2), (10, 9, 12)
    deformation = drawn(augment=augment)
    velocity = pair.velocity if deformation.velocity is None else deformation.velocity.numpy()
    image, seg = warp_atlas_to_case(replace(pair, velocity=velocity), source.image.numpy(), source.seg.numpy(), steps=5)
    part = (slice(None), *[slice(c, c + n) for c, n in zip(corner, shape, strict=True)])
    for kept_bytes in (0, 2**20):
        own = replace(deformation, flows=Flows([pair], kept_bytes=kept_bytes))
        exact = sample_patch(places(shape, corner, step=1), own, source, smooth_image(3))
        assert np.allclose(exact.synthetic, image[part], atol=1e-4)
        assert (exact.seg.numpy() == seg[part]).mean() > 0.999
        near = sample_patch(places(shape, corner), own, source, smooth_image(3))
        assert np.abs(near.synthetic.numpy() - image[part]).mean() < 0.02
        assert (near.seg.numpy() == seg[part]).mean() > 0.99


def test_a_real_patch_needs_no_image_of_the_atlas():
    patch = sample_patch(places(), drawn(augment=False), atlas(), smooth_image(3), synthetic=False)
    assert patch.synthetic is None
    assert np.array_equal(patch.real, smooth_image(3))


def test_a_box_is_read_as_it_is_interpolated():
    """Also where it lies partly outside of the case."""
    corner = (-3, 15, 4)
    as_box, as_points = (
        sample_patch(places((8, 10, 9), corner, whole=whole), drawn(augment=False), atlas(), smooth_image(3)).real
        for whole in (True, False)
    )
    assert torch.allclose(as_box, as_points, atol=1e-5)
    assert not as_box[:, :3].any() and as_box[:, 3:].any()


def test_random_velocity_has_the_asked_magnitude_and_no_mean():
    field = random_velocity((12, 12, 12), (24, 24, 24), magnitude=2.0, smoothness=4, rng=np.random.default_rng(0))
    assert torch.allclose(field.flatten(1).std(1), torch.full((3,), 2.0), atol=0.01)
    assert field.flatten(1).mean(1).abs().max() < 1e-4


def test_random_velocity_leaves_a_flat_axis_alone():
    field = random_velocity((1, 12, 12), (1, 24, 24), magnitude=2.0, smoothness=4, rng=np.random.default_rng(0))
    assert not field[0].any()
    assert field[1].any()


def test_matched_quantiles_are_the_references():
    image, reference = torch.from_numpy(smooth_image(0)), torch.from_numpy(smooth_image(1)) ** 3
    mask = torch.ones(SHAPE, dtype=torch.bool)
    matched = match_quantiles(image, reference, mask)
    for q in (0.1, 0.5, 0.9):
        assert torch.quantile(matched, q).item() == pytest.approx(torch.quantile(reference, q).item(), abs=0.05)
    order = image.flatten().argsort()
    assert (matched.flatten()[order].diff() >= -1e-5).all()


def test_outside_the_mask_nothing_changes():
    image, reference = torch.from_numpy(smooth_image(0)), torch.from_numpy(smooth_image(1))
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:10] = True
    changed = transfer_appearance(image, reference, mask, global_share=1.0, local_share=1.0, smoothness=3.0)
    assert torch.equal(changed[:, 10:], image[:, 10:])
    assert not torch.equal(changed[:, :10], image[:, :10])


def test_no_share_is_identity():
    image = torch.from_numpy(smooth_image(0))
    mask = torch.ones(SHAPE, dtype=torch.bool)
    same = transfer_appearance(
        image, torch.from_numpy(smooth_image(1)), mask, global_share=0.0, local_share=0.0, smoothness=3.0
    )
    assert torch.allclose(same, image)


def test_local_difference_of_a_constant_offset_is_that_offset():
    image = torch.from_numpy(smooth_image(0))
    mask = torch.ones(SHAPE, dtype=torch.bool)
    difference = local_appearance_difference(image, image + 2, mask, smoothness=3.0)
    assert torch.allclose(difference, torch.full_like(image, 2.0), atol=1e-4)


def masked_patch():
    """A real image that is empty in one half, under a label of an atlas that is empty in a quarter elsewhere."""
    real = smooth_image() + 5
    real[:, :, :11] = 0
    seg = np.zeros((1, *SHAPE), np.int16)
    seg[:, :5], seg[:, 8:12, 8:14] = -1, 1
    return Patch(torch.zeros(1, *SHAPE), torch.from_numpy(real), torch.from_numpy(seg))


def test_a_real_patch_is_masked_where_its_own_image_is_empty():
    seg = with_own_mask(masked_patch(), [True]).seg[0]
    assert (seg[:5, 11:] == 0).all()
    assert (seg[:, :11][masked_patch().seg[0][:, :11] != 1] == -1).all()
    assert torch.equal(seg == 1, masked_patch().seg[0] == 1)


def test_without_masked_normalisation_the_label_stays():
    assert torch.equal(with_own_mask(masked_patch(), [False]).seg, masked_patch().seg)


def test_single_voxels_near_zero_are_no_empty_space():
    patch = masked_patch()
    patch.real[:, :, 15] += -patch.real[:, :, 15]
    assert (with_own_mask(patch, [True]).seg[0][5:8, 15] == 0).all()
