"""Warps an atlas's image and labels to a case's grid with a single resampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from nnunet_oneshot.registration.pair.functional import (
    identity_grid,
    integrate_velocity,
    sample_at,
    scale_vectors,
    transform_points,
)
from nnunet_oneshot.registration.pair.registration import Registration

# Voxels processed at a time, to limit memory for the labels of large volumes.
_CHUNK_VOXELS = 4_000_000
# Indicators closer than this count as equal, because they differ by rounding only.
_TIE = 1e-5
# Points that are located and interpolated at a time: as many as a processor's cache holds.
CHUNK_POINTS = 2**16
# Voxels of a velocity grid around the reach of a flow.
_AROUND = 2
# No label: the voxels around a point have different ones.
MIXED = torch.iinfo(torch.int16).min


def displacement_of(velocity: Tensor, atlas_shape: Sequence[int], *, steps: int = 7) -> Tensor:
    """Displacement of exp(velocity) on the velocity's own grid, in atlas voxels.

    Stays on the coarse grid: the displacement is smooth, and sampling it there saves memory and time.

    Args:
        velocity: (3, gx, gy, gz), atlas voxels, over the atlas's field of view.
        atlas_shape: Voxels of the atlas.
        steps: Number of squarings.

    Returns:
        (3, gx, gy, gz).
    """
    grid = velocity.shape[1:]
    own = scale_vectors(velocity[None], atlas_shape, grid)
    return scale_vectors(integrate_velocity(own, steps=steps), grid, atlas_shape)[0]


def deform_points(points: Tensor, displacement: Tensor, atlas_shape: Sequence[int]) -> Tensor:
    """Moves atlas voxel coordinates by a displacement given on a coarser grid over the atlas's field of view.

    Args:
        points: (3, *out), atlas voxel coordinates.
        displacement: (3, gx, gy, gz), atlas voxels.
        atlas_shape: Voxels of the atlas.

    Returns:
        (3, *out).
    """
    grid = torch.tensor(displacement.shape[1:], dtype=points.dtype)
    ratio = (grid / torch.tensor(list(atlas_shape), dtype=points.dtype)).view(-1, *[1] * (points.ndim - 1))
    return points + sample_at(displacement[None], ((points + 0.5) * ratio - 0.5)[None])[0]


def flow_points(points: Tensor, velocity: Tensor, atlas_shape: Sequence[int], *, steps: int = 7) -> Tensor:
    """`deform_points` by exp(velocity), integrated only in the part of the grid that the points can reach.

    Args:
        points: (3, *out), atlas voxel coordinates.
        velocity: (3, gx, gy, gz), atlas voxels, over the atlas's field of view.
        atlas_shape: Voxels of the atlas.
        steps: Number of squarings.

    Returns:
        (3, *out).
    """
    grid = velocity.shape[1:]
    own = scale_vectors(velocity[None], atlas_shape, grid)[0]
    ratio = torch.tensor([g / n for g, n in zip(grid, atlas_shape, strict=True)])[:, None]
    places = (points.flatten(1) + 0.5) * ratio - 0.5
    part = _reachable(own, places)
    flow = own[:, part[0], part[1], part[2]] / 2**steps
    nodes = identity_grid(flow.shape[1:]).flatten(1)
    for _ in range(steps):
        flow = flow + interpolate_at(flow, nodes + flow.flatten(1)).view_as(flow)
    offset = torch.tensor([float(axis.start) for axis in part])[:, None]
    return points + (interpolate_at(flow, places - offset) / ratio).view_as(points)


def _reachable(velocity: Tensor, places: Tensor) -> tuple[slice, ...]:
    """The part of a velocity grid (3, gx, gy, gz) in its own voxels that flows from places (3, N) can reach."""
    low, high = (end[:, None] for end in places.aminmax(dim=1))
    last = torch.tensor(velocity.shape[1:])[:, None] - 1
    part: tuple[slice, ...] = ()
    farthest = torch.cat([low, high], dim=1)
    while True:
        # A flow passes between voxels, so that those around it count.
        ends = torch.cat([farthest[:, :1].floor() - _AROUND, farthest[:, 1:].ceil() + _AROUND], dim=1)
        inside = torch.minimum(ends.clamp_min(0), last).long().tolist()
        wider = tuple(slice(start, stop + 1) for start, stop in inside)
        if wider == part:
            return part
        part = wider
        slowest, fastest = velocity[:, part[0], part[1], part[2]].flatten(1).aminmax(dim=1)
        farthest = torch.cat([low + slowest[:, None].clamp_max(0), high + fastest[:, None].clamp_min(0)], dim=1)


def flow_single_points(points: Tensor, velocity: Tensor, atlas_shape: Sequence[int], *, steps: int = 7) -> Tensor:
    """Moves few atlas voxel coordinates by exp(velocity): small steps along the velocity, without a grid of flows.

    Args:
        points: (3, N), atlas voxel coordinates.
        velocity: (3, gx, gy, gz), atlas voxels, over the atlas's field of view.
        atlas_shape: Voxels of the atlas.
        steps: Squarings of the flow on a grid, each of which doubles the number of steps.

    Returns:
        (3, N).
    """
    moved, step = points[:, :, None, None], velocity / 2**steps
    for _ in range(2**steps):
        moved = deform_points(moved, step, atlas_shape)
    return moved[:, :, 0, 0]


def atlas_coordinates(registration: Registration, *, steps: int = 7) -> Tensor:
    """Location in the atlas of each voxel of the case, (3, *case_shape), atlas voxel coordinates.

    Args:
        registration: The pair.
        steps: Number of squarings.
    """
    affine = torch.from_numpy(registration.affine).float()
    displacement = displacement_of(torch.from_numpy(registration.velocity), registration.atlas_shape, steps=steps)
    points = transform_points(affine, identity_grid(registration.case_shape)[None])[0]
    return deform_points(points, displacement, registration.atlas_shape)


def warp_label_probabilities(registration: Registration, atlas_seg: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """`sample_label_probabilities` on the case's grid, (len(labels), *case_shape) float32.

    Args:
        registration: The pair.
        atlas_seg: (1, X, Y, Z) label map of the atlas.
        labels: Labels, including the background 0.
    """
    return sample_label_probabilities(atlas_seg, atlas_coordinates(registration), labels)


def sample_label_probabilities(seg: np.ndarray, coordinates: Tensor, labels: Sequence[int]) -> np.ndarray:
    """Linear interpolation of each label's indicator.

    Args:
        seg: (1, X, Y, Z) label map; values that are not in ``labels`` belong to none of them.
        coordinates: (3, *out) with three axes, voxel coordinates of ``seg``; outside, the nearest voxel counts.
        labels: Labels, including the background 0.

    Returns:
        (len(labels), *out) float32.
    """
    shape = tuple(coordinates.shape[1:])
    volume = torch.from_numpy(np.ascontiguousarray(seg, dtype=np.int16))[None]
    planes = max(1, _CHUNK_VOXELS // max(1, int(np.prod(shape[1:]))))
    result = np.empty((len(labels), *shape), np.float32)
    for index, label in enumerate(labels):
        indicator = (volume == label).float()
        for start in range(0, shape[0], planes):
            part = sample_at(indicator, coordinates[None, :, start : start + planes])
            result[index, start : start + planes] = part[0, 0].numpy()
    return result


def warp_atlas_to_case(
    registration: Registration, atlas_image: np.ndarray, atlas_seg: np.ndarray, *, steps: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """Warps image and labels of the atlas onto the case's grid.

    Args:
        registration: The pair.
        atlas_image: (C, X, Y, Z).
        atlas_seg: (1, X, Y, Z) integer labels.
        steps: Number of squarings.

    Returns:
        Image (C, *case_shape) float32 and the label of the highest interpolated indicator (1, *case_shape) int16.
    """
    coordinates = atlas_coordinates(registration, steps=steps)[None]
    image = sample_at(torch.from_numpy(np.ascontiguousarray(atlas_image, dtype=np.float32))[None], coordinates)[0]
    seg = torch.from_numpy(np.ascontiguousarray(atlas_seg, dtype=np.int16))
    return image.numpy(), sample_labels(seg, coordinates[0]).numpy()


def sample_labels(seg: Tensor, coordinates: Tensor) -> Tensor:
    """Samples a label map at voxel coordinates: the label with the highest linearly interpolated indicator.

    Args:
        seg: (1, X, Y, Z) int16; a value such as -1 (outside the nonzero region) is a label like any other.
        coordinates: (3, *out), voxel coordinates of ``seg``; outside the volume the nearest voxel counts.

    Returns:
        (1, *out) int16; the smallest label wins ties.
    """
    seg = seg.contiguous()
    uniform = uniform_labels(seg)
    parts = coordinates.flatten(1).split(CHUNK_POINTS, dim=1)
    labels = labels_in(seg, uniform, (locate(part, seg.shape[1:]) for part in parts))
    return labels.view(1, *coordinates.shape[1:])


def interpolate_at(volume: Tensor, points: Tensor) -> Tensor:
    """Linear interpolation at voxel coordinates; a point outside of the volume takes its nearest voxel.

    Args:
        volume: (C, X, Y, Z).
        points: (3, N), voxel coordinates.

    Returns:
        (C, N).
    """
    volume = volume.contiguous()
    parts = points.split(CHUNK_POINTS, dim=1)
    return torch.cat([interpolate_in(volume, locate(part, volume.shape[1:])) for part in parts], dim=1)


@dataclass(frozen=True)
class Cells:
    """Points of a volume, each within the cell of the eight voxels around it.

    Attributes:
        index: (N,) int32, the first of the eight voxels in the flattened volume.
        shares: (3, N) float32, distance from it along each axis, 0 to 1.
        strides: From a voxel to the next along each axis, in the flattened volume; 0 along an axis of one voxel.
    """

    index: Tensor
    shares: Tensor
    strides: tuple[int, ...]


def locate(points: Tensor, shape: Sequence[int]) -> Cells:
    """Finds the cells in which points lie; a point outside of the volume is moved to its nearest voxel.

    Args:
        points: (3, N), voxel coordinates.
        shape: Voxels of the volume.
    """
    shares = torch.empty_like(points)
    for axis, size in enumerate(shape):
        torch.clamp(points[axis], 0, size - 1, out=shares[axis])
    first = shares.floor()
    for axis, size in enumerate(shape):
        # The last cell begins one voxel before the end.
        first[axis].clamp_(max=max(size - 2, 0))
    strides = (shape[1] * shape[2], shape[2], 1)
    x, y, z = first.to(torch.int32)
    index = x.mul_(strides[0]).add_(y, alpha=strides[1]).add_(z)
    steps = tuple(stride if size > 1 else 0 for stride, size in zip(strides, shape, strict=True))
    return Cells(index, shares.sub_(first), steps)


def interpolate_in(volume: Tensor, cells: Cells) -> Tensor:
    """Linear interpolation of a volume.

    Several times faster than `sample_at` on a processor, for parts of about `CHUNK_POINTS` points.

    Args:
        volume: (C, X, Y, Z) contiguous.
        cells: N points in the volume.

    Returns:
        (C, N).
    """
    x, y, z = cells.shares
    offsets = _corner_offsets(cells)
    result = volume.new_empty((len(volume), len(cells.index)))
    # Writing into given memory spares the time to allocate it.
    corners = volume.new_empty((8, len(cells.index)))
    for channel, values in enumerate(volume.flatten(1)):
        for corner, offset in zip(corners, offsets, strict=True):
            torch.index_select(values[offset:], 0, cells.index, out=corner)
        edges = torch.lerp(corners[0::2], corners[1::2], z)
        sides = torch.lerp(edges[0::2], edges[1::2], y)
        torch.lerp(sides[0], sides[1], x, out=result[channel])
    return result


def nearest_in(volume: Tensor, cells: Cells) -> Tensor:
    """The voxels of a volume that are nearest to points.

    Args:
        volume: (C, X, Y, Z) contiguous.
        cells: N points in the volume.

    Returns:
        (C, N).
    """
    index = cells.index.clone()
    for share, stride in zip(cells.shares, cells.strides, strict=True):
        index.add_(share.round().to(torch.int32), alpha=stride)
    return volume.flatten(1).index_select(1, index)


def _corner_offsets(cells: Cells) -> list[int]:
    """Distance of the eight voxels of a cell from its first in the flattened volume; the last axis runs fastest."""
    x, y, z = cells.strides
    return [i * x + j * y + k * z for i, j, k in product((0, 1), repeat=3)]


def uniform_labels(seg: Tensor) -> Tensor:
    """For each voxel the label of the cell that it begins, or `MIXED` where the eight voxels of the cell differ.

    Args:
        seg: (1, X, Y, Z) int16.

    Returns:
        (X, Y, Z) int16; `MIXED` also for the last voxels of an axis of several voxels, which begin no cell.
    """
    lowest = highest = seg[0]
    for axis, size in enumerate(seg.shape[1:]):
        if size > 1:
            lowest = torch.minimum(lowest.narrow(axis, 0, size - 1), lowest.narrow(axis, 1, size - 1))
            highest = torch.maximum(highest.narrow(axis, 0, size - 1), highest.narrow(axis, 1, size - 1))
    result = torch.full_like(seg[0], MIXED)
    x, y, z = lowest.shape
    result[:x, :y, :z] = torch.where(lowest == highest, lowest, MIXED)
    return result


def labels_in(seg: Tensor, uniform: Tensor, parts: Iterable[Cells]) -> Tensor:
    """The label with the highest linearly interpolated indicator; the smallest label wins ties.

    Args:
        seg: (1, X, Y, Z) int16, contiguous.
        uniform: `uniform_labels` of it.
        parts: Points in the volume, at least one part; no more than one is in memory at a time.

    Returns:
        (N,) int16, the labels of the points of all parts.
    """
    labels, indices, shares = [], [], []
    strides: tuple[int, ...] = ()
    for cells in parts:
        labels.append(uniform.flatten().index_select(0, cells.index))
        # Most points lie between voxels of a single label, which needs no interpolation.
        mixed = (labels[-1] == MIXED).nonzero()[:, 0]
        indices.append(cells.index.index_select(0, mixed))
        shares.append(cells.shares.index_select(1, mixed))
        strides = cells.strides
    result = torch.cat(labels)
    mixed = (result == MIXED).nonzero()[:, 0]
    for some, index, share in zip(
        mixed.split(CHUNK_POINTS),
        torch.cat(indices).split(CHUNK_POINTS),
        torch.cat(shares, dim=1).split(CHUNK_POINTS, dim=1),
        strict=True,
    ):
        result.index_copy_(0, some, _heaviest_labels(seg, Cells(index, share, strides)))
    return result


def _heaviest_labels(seg: Tensor, cells: Cells) -> Tensor:
    """`labels_in` for points between voxels of different labels."""
    x, y, z = (torch.stack([1 - share, share]) for share in cells.shares)
    weight = (x[:, None, None] * y[:, None] * z).flatten(0, 2)
    values = seg.flatten()
    label = torch.stack([values[offset:].index_select(0, cells.index) for offset in _corner_offsets(cells)])
    smallest, largest = label.aminmax(dim=0)
    upper = (weight * (label == largest)).sum(0)
    result = torch.where(upper > 0.5 * (1 + _TIE), largest, smallest)
    several = ((label != smallest) & (label != largest)).any(0).nonzero()[:, 0]
    if len(several):
        heaviest = _heaviest_of_several(label.index_select(1, several), weight.index_select(1, several))
        result.index_copy_(0, several, heaviest)
    return result


def _heaviest_of_several(labels: Tensor, weights: Tensor) -> Tensor:
    """The heaviest of the labels (8, N) of points between voxels of more than two labels: (N,)."""
    best, chosen = torch.full_like(weights[0], -1.0), labels[0].clone()
    for label in labels:
        score = (weights * (labels == label)).sum(0)
        better = (score > best + _TIE) | ((score > best - _TIE) & (label < chosen))
        best, chosen = torch.where(better, score, best), torch.where(better, label, chosen)
    return chosen
