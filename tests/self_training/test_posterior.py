"""Propagated labels corrected by intensities: what is known in closed form, and nnU-Net's forms of targets."""

from __future__ import annotations

import pytest
import torch

from nnunet_oneshot.self_training.posterior import _voxels_by_faces, posterior_labels, posterior_target


def block(shape, start, stop, value=1):
    """(1, 1, *shape) with a value inside a box."""
    volume = torch.zeros(1, 1, *shape)
    volume[(0, 0, *[slice(a, b) for a, b in zip(start, stop, strict=True)])] = value
    return volume


def noisy(image, deviation=0.05):
    return image + deviation * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("shape", "start", "stop", "shift"),
    [
        ((24, 24, 24), (8, 8, 8), (16, 16, 16), (1, 0, 0)),
        ((24, 24, 24), (8, 8, 8), (16, 16, 16), (-1, 1, 0)),
        ((24, 30, 11), (6, 8, 3), (16, 20, 8), (0, 1, 0)),
        ((24, 24), (8, 8), (16, 16), (1, -1)),
    ],
)
def test_a_displaced_label_moves_back_to_the_edges_of_the_image(shape, start, stop, shift):
    truth = block(shape, start, stop)
    displaced = block(
        shape, [a + s for a, s in zip(start, shift, strict=True)], [b + s for b, s in zip(stop, shift, strict=True)]
    )
    found = posterior_labels(noisy(truth), displaced, blur=1.0, strength=1.0)
    errors_before, errors_after = ((v != truth).sum().item() for v in (displaced, found))
    assert errors_after < 0.35 * errors_before


def test_strength_zero_returns_the_labels_as_they_are():
    labels = block((12, 12, 12), (3, 3, 3), (8, 8, 8))
    assert posterior_labels(noisy(labels), labels, blur=1.0, strength=0) is labels


def test_an_image_without_contrast_leaves_a_plane_boundary_in_place():
    labels = block((16, 16, 16), (0, 0, 0), (16, 16, 7))
    assert torch.equal(posterior_labels(torch.zeros(labels.shape), labels, blur=1.0, strength=1.0), labels)


def test_a_sheet_is_blurred_by_half_its_thickness():
    # Blurred by a whole voxel, the background would be likelier than the label even within the sheet.
    labels = block((16, 16, 16), (0, 0, 8), (16, 16, 9))
    assert torch.equal(posterior_labels(torch.zeros(labels.shape), labels, blur=1.0, strength=1.0), labels)


def test_voxels_are_divided_by_faces():
    labels = torch.zeros(12, 12, 12, dtype=torch.long)
    labels[:, :, 2:6] = 1
    labels[4:8, 4:8, 8:10] = 2
    found = _voxels_by_faces(labels, 3)
    # A sheet of 4 voxels, cut off by the border of the patch, and a block with faces of 16, 8 and 8 voxels.
    assert found[1:].tolist() == pytest.approx([2.0, 32 / 64])


def test_neighbouring_labels_of_equal_intensity_keep_the_boundary_between_them():
    image = block((20, 20, 20), (4, 4, 4), (16, 16, 16))
    labels = block((20, 20, 20), (4, 4, 4), (16, 16, 16))
    labels[..., 10:] *= 2
    found = posterior_labels(noisy(image), labels, blur=1.0, strength=1.0)
    assert (found == labels).float().mean() > 0.99


def test_labels_that_a_sample_lacks_do_not_appear_and_empty_samples_stay_empty():
    labels = torch.cat([block((12, 12, 12), (3, 3, 3), (9, 9, 9), value=5), torch.zeros(1, 1, 12, 12, 12)])
    found = posterior_labels(torch.randn(2, 1, 12, 12, 12), labels, blur=1.0, strength=1.0)
    assert set(found[0].unique().tolist()) <= {0.0, 5.0}
    assert not found[1].any()


def test_samples_are_independent_of_each_other_and_of_the_scale_of_their_intensities():
    labels = block((16, 16, 16), (5, 4, 4), (13, 12, 12))
    image = noisy(block((16, 16, 16), (4, 4, 4), (12, 12, 12)))
    alone = posterior_labels(image, labels, blur=1.0, strength=0.5)
    both = posterior_labels(torch.cat([image, 100 - 30 * image]), labels.repeat(2, 1, 1, 1, 1), blur=1.0, strength=0.5)
    assert torch.equal(both[:1], alone)
    assert (both[1:] != alone).float().mean() < 0.002


def test_a_second_channel_without_contrast_takes_from_the_evidence_but_does_not_replace_it():
    labels = block((16, 16, 16), (5, 4, 4), (13, 12, 12))
    truth = block((16, 16, 16), (4, 4, 4), (12, 12, 12))
    image = torch.cat([noisy(truth), torch.zeros_like(truth)], dim=1)
    found = posterior_labels(image, labels, blur=1.0, strength=2.0)
    assert torch.equal(found, posterior_labels(noisy(truth), labels, blur=1.0, strength=1.0))


def test_more_labels_than_are_kept_at_a_place():
    labels = torch.arange(1, 9).float().repeat_interleave(4).view(1, 1, 32, 1, 1).repeat(1, 1, 1, 8, 8)
    found = posterior_labels(noisy(labels), labels, blur=1.0, strength=1.0)
    assert (found == labels).float().mean() > 0.99


@pytest.mark.parametrize("kind", [torch.int16, torch.float32, torch.bool])
def test_the_type_of_the_labels_is_kept(kind):
    labels = block((12, 12, 12), (3, 3, 3), (8, 8, 8)).to(kind)
    assert posterior_labels(noisy(labels.float()), labels, blur=1.0, strength=0.5).dtype == kind


def options(**changes):
    return {"num_heads": 3, "has_regions": False, "blur": 1.0, "strength": 1.0, **changes}


def test_deep_supervision_gets_nearest_neighbours_of_the_corrected_labels():
    truth = block((16, 16, 16), (4, 4, 4), (12, 12, 12))
    displaced = block((16, 16, 16), (5, 4, 4), (13, 12, 12))
    target = [displaced, displaced[..., ::2, ::2, ::2]]
    full, half = posterior_target(noisy(truth), target, **options())
    assert torch.equal(full, posterior_labels(noisy(truth), displaced, blur=1.0, strength=1.0))
    assert half.shape == target[1].shape
    assert torch.equal(half, torch.nn.functional.interpolate(full, scale_factor=0.5, mode="nearest-exact"))


def test_ignored_voxels_remain_ignored_and_are_no_foreground():
    labels = block((16, 16, 16), (4, 4, 4), (12, 12, 12))
    labels[:, :, 14:] = 3
    found = posterior_target(noisy(block((16, 16, 16), (4, 4, 4), (12, 12, 12))), labels, **options())
    assert torch.equal(found == 3, labels == 3)


def test_every_region_is_corrected_by_itself_and_the_ignore_channel_is_kept():
    inner, outer = block((20, 20, 20), (7, 6, 6), (13, 12, 12)), block((20, 20, 20), (4, 4, 4), (16, 16, 16))
    image = noisy(outer + 2 * block((20, 20, 20), (6, 6, 6), (12, 12, 12)))
    ignored = block((20, 20, 20), (18, 0, 0), (20, 20, 20))
    found = posterior_target(image, torch.cat([outer, inner, ignored], dim=1), **options(num_heads=2, has_regions=True))
    assert torch.equal(found[:, :1], posterior_labels(image, outer, blur=1.0, strength=1.0))
    assert torch.equal(found[:, 1:2], posterior_labels(image, inner, blur=1.0, strength=1.0))
    assert torch.equal(found[:, 2:], ignored)


def test_strength_zero_returns_the_target_as_it_is():
    target = [block((8, 8), (2, 2), (6, 6))]
    (found,) = posterior_target(torch.zeros(1, 1, 8, 8), target, **options(strength=0))
    assert torch.equal(found, target[0])


def test_labels_in_parts_are_those_at_once(monkeypatch):
    import nnunet_oneshot.self_training.posterior as module

    labels = torch.zeros(1, 1, 20, 20, 20, dtype=torch.long)
    for number in range(27):
        corner = [2 + 6 * (number // 3**axis % 3) for axis in range(3)]
        labels[(0, 0, *[slice(start, start + 5) for start in corner])] = number + 1
    image = noisy((labels.roll(1, 2) % 5).float())
    whole = posterior_labels(image, labels, blur=1.0, strength=0.6)
    assert not torch.equal(whole, labels)
    monkeypatch.setattr(module, "_VALUES", 1)
    assert torch.equal(posterior_labels(image, labels, blur=1.0, strength=0.6), whole)
    seen = []
    original = module._largest
    monkeypatch.setattr(module, "_largest", lambda values, number: seen.append(len(values)) or original(values, number))
    posterior_labels(image, labels, blur=1.0, strength=0.6)
    assert max(seen) == 8 and len(seen) == 7
