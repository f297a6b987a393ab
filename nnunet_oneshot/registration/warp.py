"""Carries an atlas's image and labels to a case's grid, resampling them once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunet_oneshot.registration.cache import Registration
from nnunet_oneshot.registration.functional import (
    identity_grid,
    integrate_velocity,
    sample_at,
    scale_vectors,
    transform_points,
)

# Case voxels handled at a time, so that label probabilities of large volumes stay small in memory.
_CHUNK_VOXELS = 4_000_000


def displacement_of(velocity: Tensor, atlas_shape: Sequence[int], *, steps: int = 7) -> Tensor:
    """Displacement of exp(velocity) on the velocity's own grid, in atlas voxels.

    Kept on the coarse grid: it is smooth, and reading it there costs a fraction of memory and time.

    Args:
        velocity: (3, gx, gy, gz), atlas voxels, over the atlas's field of view.
        atlas_shape: Voxels of the atlas.
        steps: Squarings.

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
    """Where every voxel of the case is read in the atlas, (3, *case_shape), atlas voxel coordinates."""
    affine = torch.from_numpy(registration.affine).float()
    displacement = displacement_of(torch.from_numpy(registration.velocity), registration.atlas_shape)
    points = transform_points(affine, identity_grid(registration.case_shape)[None])[0]
    return deform_points(points, displacement, registration.atlas_shape)


def warp_label_probabilities(registration: Registration, atlas_seg: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Linear interpolation of each label's indicator on the case's grid.

    Args:
        registration: The pair.
        atlas_seg: (1, X, Y, Z) label map of the atlas; values that are not in ``labels`` count as none of them.
        labels: Labels, with the background 0.

    Returns:
        (len(labels), *case_shape) float32.
    """
    coordinates = atlas_coordinates(registration)[None]
    seg = torch.from_numpy(np.ascontiguousarray(atlas_seg, dtype=np.int16))[None]
    planes = max(1, _CHUNK_VOXELS // max(1, int(np.prod(registration.case_shape[1:]))))
    result = np.empty((len(labels), *registration.case_shape), np.float32)
    for index, label in enumerate(labels):
        indicator = (seg == label).float()
        for start in range(0, registration.case_shape[0], planes):
            part = sample_at(indicator, coordinates[:, :, start : start + planes])
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
    """Reads a label map at voxel coordinates: the label with the highest linearly interpolated indicator.

    Args:
        seg: (1, X, Y, Z) int16; a value such as -1 (outside the nonzero region) is a label like any other.
        coordinates: (3, *out), voxel coordinates of ``seg``; outside the volume the nearest voxel counts.

    Returns:
        (1, *out) int16.
    """
    values = torch.unique(seg).tolist()
    best = torch.full(coordinates.shape[1:], -1.0)
    result = torch.full(coordinates.shape[1:], int(values[0]), dtype=torch.int16)
    for value in values:
        indicator = sample_at((seg == value).float()[None], coordinates[None])[0, 0]
        better = indicator > best
        best = torch.where(better, indicator, best)
        result[better] = int(value)
    return result[None]
