"""Draws aligned patches: the warped atlas with its label, and the real image at the same location."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnunet_oneshot.config import SynthesisConfig
from nnunet_oneshot.data.outline import empty_space
from nnunet_oneshot.data.preprocessed import StoredArray
from nnunet_oneshot.registration.pair.functional import transform_points
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import (
    CHUNK_POINTS,
    Cells,
    deform_points,
    displacement_of,
    flow_points,
    flow_single_points,
    interpolate_in,
    labels_in,
    locate,
    nearest_in,
    uniform_labels,
)
from nnunet_oneshot.synthesis.functional import random_velocity, transfer_appearance
from nnunet_oneshot.synthesis.spatial import Places

_STEPS = 5
# Memory for the flows of registrations as they are, in each worker.
_KEPT_BYTES = 2**27


@dataclass(frozen=True)
class Atlas:
    """A labelled case in memory.

    Attributes:
        image: (C, X, Y, Z) float32, contiguous.
        seg: (1, X, Y, Z) int16, contiguous; -1 outside the nonzero region.
        class_locations: Label or region -> (N, 4) voxel locations as nnU-Net stores them.
    """

    image: Tensor
    seg: Tensor
    class_locations: dict

    @cached_property
    def uniform(self) -> Tensor:
        """Where labels need no interpolation; see `uniform_labels`."""
        return uniform_labels(self.seg)


class Flows:
    """The flows of registrations as they are, kept once computed if those of all registrations fit into memory."""

    def __init__(self, registrations: Sequence[Registration], *, kept_bytes: int = _KEPT_BYTES) -> None:
        """Decides whether flows are kept.

        Args:
            registrations: All registrations.
            kept_bytes: Memory for the flows and their inverses.
        """
        self._keeps = 2 * sum(registration.velocity.nbytes for registration in registrations) <= kept_bytes
        self._kept: dict[tuple[str, str, int], Tensor] = {}

    def move(self, points: Tensor, registration: Registration, *, sign: int) -> Tensor:
        """Moves points by exp(sign v), with v the velocity field of a registration.

        Args:
            points: (3, *out), atlas voxel coordinates.
            registration: The registration.
            sign: 1, or -1 for the inverse.

        Returns:
            (3, *out), atlas voxel coordinates.
        """
        velocity, shape = sign * torch.from_numpy(registration.velocity), registration.atlas_shape
        if not self._keeps:
            return flow_points(points, velocity, shape, steps=_STEPS)
        key = registration.atlas, registration.case, sign
        if key not in self._kept:
            self._kept[key] = displacement_of(velocity, shape, steps=_STEPS)
        return deform_points(points, self._kept[key], shape)


@dataclass(frozen=True)
class Deformation:
    """One drawn deformation of an atlas towards a case.

    Attributes:
        registration: The registration it starts from.
        velocity: The drawn field v_new, (3, gx, gy, gz), atlas voxels; None is the registration's own field v.
        flows: The flows of registrations as they are.
    """

    registration: Registration
    velocity: Tensor | None
    flows: Flows

    def move(self, points: Tensor) -> Tensor:
        """Moves points (3, *out), atlas voxel coordinates, by exp(v_new)."""
        if self.velocity is None:
            return self.flows.move(points, self.registration, sign=1)
        return flow_points(points, self.velocity, self.registration.atlas_shape, steps=_STEPS)

    def to_case(self, points: Tensor) -> Tensor:
        """Where the case shows the anatomy of the atlas: affine^-1(exp(-v)(points)), (3, *out), case voxels."""
        return _in_case(self.flows.move(points, self.registration, sign=-1), self.registration)


@dataclass(frozen=True)
class Patch:
    """Aligned patches of the same spatial shape.

    Attributes:
        synthetic: (C, *patch) warped atlas; 0 outside the case's field of view, as nnU-Net pads. None if not asked for.
        real: (C, *patch) unlabelled image.
        seg: (1, *patch) int16 warped label; -1 outside the case's field of view.
        previous: (1, *patch) int16, what the first stage of a cascade sees in ``real``; None without a first stage.
    """

    synthetic: Tensor | None
    real: Tensor
    seg: Tensor
    previous: Tensor | None = None


def draw_deformation(
    registration: Registration,
    others: Callable[[], Registration],
    config: SynthesisConfig,
    *,
    augment: bool,
    flows: Flows | None = None,
) -> Deformation:
    """Draws a velocity field around a registration's: scaled, mixed with another case's, plus a random field.

    With v the registration's field and w another case's on the same atlas,
    ``v_new = s ((1 - t) v + t w) + r``.

    Args:
        registration: Registration of the atlas to the case whose patch is drawn.
        others: Returns the registration of the same atlas to another case.
        config: Probabilities and ranges.
        augment: False uses the registration unchanged.
        flows: The flows of registrations; None keeps those of this one.
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
    return Deformation(registration, None if new is velocity else new, flows or Flows([registration]))


def case_locations(deformation: Deformation, atlas_voxels: np.ndarray) -> np.ndarray:
    """The voxels of the case to which a deformation moves a few atlas voxels.

    The inverse flow is followed from these voxels alone.

    Args:
        deformation: The drawn deformation.
        atlas_voxels: (N, 3).

    Returns:
        (N, 3) integers inside the case.
    """
    registration = deformation.registration
    velocity = torch.from_numpy(registration.velocity) if deformation.velocity is None else deformation.velocity
    points = torch.from_numpy(np.ascontiguousarray(np.transpose(atlas_voxels), dtype=np.float32))
    moved = flow_single_points(points, -velocity, registration.atlas_shape, steps=_STEPS)
    places = _in_case(moved, registration).round().numpy().T
    return np.clip(places, 0, np.array(registration.case_shape) - 1).astype(int)


def _in_case(points: Tensor, registration: Registration) -> Tensor:
    """Atlas voxel coordinates (3, *out) as voxel coordinates of the case, by the inverse of the affine map."""
    return transform_points(torch.from_numpy(np.linalg.inv(registration.affine)).float(), points[None])[0]


def sample_patch(
    places: Places,
    deformation: Deformation,
    atlas: Atlas,
    case: Any,
    *,
    synthetic: bool = True,
    previous: Any = None,
) -> Patch:
    """Samples atlas, label and real image at the places of a patch.

    The atlas is sampled once at exp(v_new)(affine(p)). The real image is sampled where the same anatomy lies according
    to the registration, ``affine^-1(exp(-v)(exp(v_new)(affine(p))))``. This is p itself for an unchanged registration.
    Both thus stay aligned for any drawn deformation.

    Args:
        places: Where the patch lies in the case.
        deformation: The drawn deformation.
        atlas: The atlas.
        case: The real image, (C, *case_shape); only the part that is needed is read from it.
        synthetic: Whether the image of the atlas is wanted.
        previous: The first stage's segmentation of the case, (*case_shape), likewise read in part; or None.
    """
    lattice = places.lattice
    affine = torch.from_numpy(deformation.registration.affine).float()
    in_atlas = deformation.move(transform_points(affine, places.points[None])[0])
    image = torch.empty((len(atlas.image), *lattice.shape)) if synthetic else None

    def cells() -> Iterator[Cells]:
        for slab, points in lattice.slabs(in_atlas, CHUNK_POINTS):
            around = locate(points.flatten(1), atlas.seg.shape[1:])
            if image is not None:
                image[:, slab] = interpolate_in(atlas.image, around).view(-1, *points.shape[1:])
            yield around

    seg = labels_in(atlas.seg, atlas.uniform, cells()).view(1, *lattice.shape)
    outside = _outside(places, deformation.registration.case_shape)
    if outside is not None:
        seg.masked_fill_(outside, -1)
        if image is not None:
            image.masked_fill_(outside, 0)
    shown, points = places, places.points
    if deformation.velocity is not None:
        shown, points = Places(lattice, places.points), deformation.to_case(in_atlas)
    patch = Patch(image, _real_patch(shown, points, case), seg)
    if previous is None:
        return patch
    return replace(patch, previous=_real_patch(shown, points, previous, nearest_in).to(torch.int16))


def _outside(places: Places, case_shape: Sequence[int]) -> Tensor | None:
    """Where a patch (*patch) lies outside of the case's field of view; None if it does nowhere."""
    sizes = torch.tensor(case_shape, dtype=torch.float32).view(3, 1, 1, 1)
    if not _beyond(places.points, sizes).any():
        return None
    slabs = places.lattice.slabs(places.points, CHUNK_POINTS)
    return torch.cat([_beyond(points, sizes) for _, points in slabs])


def _beyond(points: Tensor, sizes: Tensor) -> Tensor:
    return ((points < -0.5) | (points > sizes - 0.5)).any(0)


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
    return replace(patch, seg=seg)


def apply_appearance(patch: Patch, config: SynthesisConfig) -> Patch:
    """With the configured probability, gives the synthetic patch part of the real one's appearance."""
    if patch.synthetic is None or np.random.uniform() >= config.p_appearance:
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
    return replace(patch, synthetic=synthetic)


def _real_patch(
    places: Places, points: Tensor, case: Any, sample: Callable[[Tensor, Cells], Tensor] = interpolate_in
) -> Tensor:
    """An image or a segmentation of a case at the places of a patch, (C, *patch) float32; 0 outside of the case.

    Args:
        places: Where the patch lies.
        points: (3, *lattice), case voxel coordinates.
        case: (C, *case_shape), or (*case_shape) for one channel.
        sample: Gives the values of the case between its voxels.
    """
    lattice = places.lattice
    if places.corner is not None:
        box = [[low, low + size] for low, size in zip(places.corner, lattice.shape, strict=True)]
        return _crop(case, box)
    low, high = points.flatten(1).aminmax(dim=1)
    # With a margin of zeros around the image, a place beyond its border is half in it.
    box = [
        [int(np.clip(np.floor(start), -1, size)), int(np.clip(np.floor(stop), -1, size)) + 2]
        for start, stop, size in zip(low.tolist(), high.tolist(), case.shape[-3:], strict=True)
    ]
    crop = _crop(case, box).contiguous()
    offset = torch.tensor([float(start) for start, _ in box]).view(3, 1, 1, 1)
    result = torch.empty((len(crop), *lattice.shape))
    for slab, part in lattice.slabs(points - offset, CHUNK_POINTS):
        cells = locate(part.flatten(1), crop.shape[1:])
        result[:, slab] = sample(crop, cells).view(-1, *part.shape[1:])
    return result


def _crop(case: Any, box: list[list[int]]) -> Tensor:
    """A box of a case, (C, *box) float32; 0 outside of the case."""
    found = case.crop(box) if isinstance(case, StoredArray) else crop_and_pad_nd(case, box, 0)
    crop = torch.from_numpy(found).float()
    return crop.view(-1, *crop.shape[-3:])
