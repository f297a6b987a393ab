"""Draws aligned patches: the warped atlas with its label, and the real image at the same location."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_oneshot.config import SynthesisConfig
from nnunet_oneshot.data.outline import empty_space
from nnunet_oneshot.registration.pair.functional import sample_at, transform_points
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import deform_points, displacement_of, sample_labels
from nnunet_oneshot.synthesis.functional import random_velocity, transfer_appearance

_STEPS = 5


@dataclass(frozen=True)
class Atlas:
    """A labelled case in memory.

    Attributes:
        image: (C, X, Y, Z) float32.
        seg: (1, X, Y, Z) int16, -1 outside the nonzero region.
        class_locations: Label or region -> (N, 4) voxel locations as nnU-Net stores them.
    """

    image: Tensor
    seg: Tensor
    class_locations: dict


@dataclass(frozen=True)
class Deformation:
    """One drawn deformation of an atlas towards a case.

    Attributes:
        registration: The registration it starts from.
        displacement: Displacement of exp(v_new), (3, gx, gy, gz), atlas voxels.
        inverse: Displacement of exp(-v_new), as above.
        undo: Displacement of exp(-v) of the registration, as above; None if v_new = v, so that the real image is read
            as is.
    """

    registration: Registration
    displacement: Tensor
    inverse: Tensor
    undo: Tensor | None


@dataclass(frozen=True)
class Patch:
    """Aligned patches of the same spatial shape.

    Attributes:
        synthetic: (C, *patch) warped atlas; 0 outside the case's field of view, as nnU-Net pads.
        real: (C, *patch) unlabelled image.
        seg: (1, *patch) int16 warped label; -1 outside the case's field of view.
    """

    synthetic: Tensor
    real: Tensor
    seg: Tensor


def draw_deformation(
    registration: Registration, others: Callable[[], Registration], config: SynthesisConfig, *, augment: bool
) -> Deformation:
    """Draws a velocity field around a registration's: scaled, mixed with another case's, plus a random field.

    With v the registration's field and w another case's on the same atlas,
    ``v_new = s ((1 - t) v + t w) + r``.

    Args:
        registration: Registration of the atlas to the case whose patch is drawn.
        others: Returns the registration of the same atlas to another case.
        config: Probabilities and ranges.
        augment: False uses the registration unchanged.
    """
    velocity = torch.from_numpy(registration.velocity)
    shape = registration.atlas_shape
    new = velocity
    if augment and np.random.uniform() < config.p_mix:
        share = np.random.uniform(*config.mix_range)
        new = (1 - share) * new + share * torch.from_numpy(others().velocity)
    if augment and np.random.uniform() < config.p_scale:
        new = np.random.uniform(*config.scale_range) * new
    if augment and np.random.uniform() < config.p_random:
        magnitude = np.random.uniform(0, config.random_magnitude)
        new = new + random_velocity(velocity.shape[1:], shape, magnitude=magnitude, smoothness=config.random_smoothness)
    return Deformation(
        registration,
        displacement_of(new, shape, steps=_STEPS),
        displacement_of(-new, shape, steps=_STEPS),
        None if new is velocity else displacement_of(-velocity, shape, steps=_STEPS),
    )


def case_location(deformation: Deformation, atlas_voxel: Sequence[int]) -> np.ndarray:
    """The voxel of the case to which a deformation moves an atlas voxel, 3 integers inside the case."""
    registration = deformation.registration
    point = torch.tensor(list(atlas_voxel), dtype=torch.float32).view(3, 1, 1, 1)
    point = deform_points(point, deformation.inverse, registration.atlas_shape)
    inverse = torch.from_numpy(np.linalg.inv(registration.affine)).float()
    place = transform_points(inverse, point[None])[0].flatten().round().numpy()
    return np.clip(place, 0, np.array(registration.case_shape) - 1).astype(int)


def sample_patch(
    points: Tensor, deformation: Deformation, atlas: Atlas, read_case: Callable[[tuple[slice, ...]], np.ndarray]
) -> Patch:
    """Samples atlas, label and real image at the points of a patch.

    The atlas is sampled once at exp(v_new)(affine(p)). The real image is sampled where the same anatomy lies according
    to the registration, ``affine^-1(exp(-v)(exp(v_new)(affine(p))))``. This is p itself for an unchanged registration.
    Both thus stay aligned for any drawn deformation.

    Args:
        points: (3, *patch), case voxel coordinates.
        deformation: The drawn deformation.
        atlas: The atlas.
        read_case: Reads a box (C, *box) of the real image.
    """
    registration = deformation.registration
    shape = registration.atlas_shape
    affine = torch.from_numpy(registration.affine)
    in_atlas = deform_points(transform_points(affine.float(), points[None])[0], deformation.displacement, shape)
    sizes = torch.tensor(registration.case_shape, dtype=torch.float32).view(3, 1, 1, 1)
    outside = ((points < -0.5) | (points > sizes - 0.5)).any(0)

    box, local = _box(in_atlas, shape)
    synthetic = sample_at(atlas.image[in_all_channels(box)][None], local[None])[0]
    seg = sample_labels(atlas.seg[in_all_channels(box)], local)
    synthetic[:, outside] = 0
    seg[:, outside] = -1

    real_points = points
    if deformation.undo is not None:
        inverse = torch.linalg.inv(affine).float()
        real_points = transform_points(inverse, deform_points(in_atlas, deformation.undo, shape)[None])[0]
    box, local = _box(real_points, registration.case_shape)
    crop = torch.from_numpy(np.ascontiguousarray(read_case(box), dtype=np.float32))
    return Patch(synthetic, sample_at(crop[None], local[None], padding="zeros")[0], seg)


def in_all_channels(box: tuple[slice, ...]) -> tuple[slice, ...]:
    """The index of a box (3 slices) in a volume (C, X, Y, Z)."""
    return (slice(None), *box)


def with_own_mask(patch: Patch, masked: Sequence[bool]) -> Patch:
    """A patch whose label is -1 where its real image is empty, instead of where the warped atlas is empty.

    nnU-Net's augmentation sets masked channels to 0 where the label is -1. For a patch that shows the real image, this
    must be the empty space of that image, as at inference.

    Args:
        patch: The patch.
        masked: For each channel, whether only the values of the nonzero region were normalised.
    """
    if not any(masked):
        return patch
    seg = patch.seg.clone()
    seg[seg < 0] = 0
    empty = torch.from_numpy(empty_space(patch.real.numpy(), masked))
    seg[0][empty & (seg[0] == 0)] = -1
    return Patch(patch.synthetic, patch.real, seg)


def apply_appearance(patch: Patch, config: SynthesisConfig) -> Patch:
    """With the configured probability, gives the synthetic patch part of the real one's appearance."""
    if np.random.uniform() >= config.p_appearance:
        return patch
    global_share, local_share = np.random.uniform(*config.appearance_strength, size=2)
    synthetic = transfer_appearance(
        patch.synthetic,
        patch.real,
        patch.seg[0] >= 0,
        global_share=global_share,
        local_share=local_share,
        smoothness=config.appearance_smoothness,
    )
    return Patch(synthetic, patch.real, patch.seg)


def _box(points: Tensor, shape: Sequence[int]) -> tuple[tuple[slice, ...], Tensor]:
    """The part of a volume that linear interpolation at ``points`` needs, and the points relative to it."""
    flat = points.flatten(1)
    low, high = flat.min(1).values.floor().long().tolist(), flat.max(1).values.ceil().long().tolist()
    box = []
    for start, stop, size in zip(low, high, shape, strict=True):
        start = min(max(start, 0), size - 1)
        box.append(slice(start, min(max(stop, start) + 1, size)))
    offset = torch.tensor([part.start for part in box], dtype=points.dtype).view(3, 1, 1, 1)
    return tuple(box), points - offset
