"""Warps an atlas's image and labels to a case's grid with a single resampling."""

from __future__ import annotations

from collections.abc import Sequence
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


def atlas_coordinates(registration: Registration) -> Tensor:
    """Location in the atlas of each voxel of the case, (3, *case_shape), atlas voxel coordinates."""
    affine = torch.from_numpy(registration.affine).float()
    displacement = displacement_of(torch.from_numpy(registration.velocity), registration.atlas_shape)
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
    registration: Registration, atlas_image: np.ndarray, atlas_seg: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Warps image and labels of the atlas onto the case's grid.

    Args:
        registration: The pair.
        atlas_image: (C, X, Y, Z).
        atlas_seg: (1, X, Y, Z) integer labels.

    Returns:
        Image (C, *case_shape) float32 and the label of the highest interpolated indicator (1, *case_shape) int16.
    """
    coordinates = atlas_coordinates(registration)[None]
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
    parts = [_heaviest_labels(seg, part) for part in coordinates.flatten(1).split(_CHUNK_VOXELS, dim=1)]
    return torch.cat(parts).view(1, *coordinates.shape[1:])


def _heaviest_labels(seg: Tensor, points: Tensor) -> Tensor:
    """`sample_labels` at points (3, N), from the labels of the eight voxels around each: (N,)."""
    sizes = torch.tensor(seg.shape[1:], device=points.device)[:, None]
    places = torch.minimum(points.clamp_min(0), sizes - 1)
    lower = places.floor()
    upper_share = places - lower
    ends = lower.long(), torch.minimum(lower.long() + 1, sizes - 1)
    shares = 1 - upper_share, upper_share
    strides = (seg.shape[2] * seg.shape[3], seg.shape[3], 1)
    corners = list(product((0, 1), repeat=3))
    index = torch.stack(
        [ends[x][0] * strides[0] + ends[y][1] * strides[1] + ends[z][2] * strides[2] for x, y, z in corners]
    )
    labels = seg.flatten()[index]
    result = labels[0].clone()
    # Most points lie between voxels of a single label, which needs no interpolation.
    mixed = (labels != labels[0]).any(0).nonzero()[:, 0]
    labels = labels[:, mixed]
    weights = torch.stack([shares[x][0, mixed] * shares[y][1, mixed] * shares[z][2, mixed] for x, y, z in corners])
    best, chosen = torch.full_like(weights[0], -1.0), labels[0].clone()
    for label in labels:
        score = (weights * (labels == label)).sum(0)
        better = (score > best + _TIE) | ((score > best - _TIE) & (label < chosen))
        best, chosen = torch.where(better, score, best), torch.where(better, label, chosen)
    result[mixed] = chosen
    return result
