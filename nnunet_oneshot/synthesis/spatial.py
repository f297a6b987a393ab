"""nnU-Net's spatial augmentation as coordinates, so that atlas and real image are each resampled only once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from torch import Tensor


def split_spatial(transforms: BasicTransform) -> tuple[SpatialTransform | None, ComposeTransforms]:
    """Takes nnU-Net's spatial transform out of a pipeline.

    Args:
        transforms: Result of ``get_training_transforms`` or ``get_validation_transforms`` of an nnU-Net trainer.

    Returns:
        The spatial transform or None, and the pipeline without it. The pair of conversions around it, with which
        nnU-Net augments anisotropic patches slice-wise, is removed too.
    """
    steps = list(transforms.transforms)
    index = next((i for i, step in enumerate(steps) if isinstance(step, SpatialTransform)), None)
    if index is None:
        return None, ComposeTransforms(steps)
    spatial = steps.pop(index)
    if index < len(steps) and isinstance(steps[index], Convert2DTo3DTransform):
        steps.pop(index)
        if index > 0 and isinstance(steps[index - 1], Convert3DTo2DTransform):
            steps.pop(index - 1)
    return spatial, ComposeTransforms(steps)


@dataclass(frozen=True)
class Lattice:
    """Every ``step``-th voxel of a patch along each axis: the places at which coordinates are computed.

    Between them coordinates are interpolated, which is exact for an affine map and close for a smooth one.

    Attributes:
        shape: Shape of the patch, 3 axes.
        step: Distance of the places, voxels; 1 takes every voxel.
    """

    shape: tuple[int, ...]
    step: int = 2

    def voxels(self) -> Tensor:
        """The places, (3, *lattice) voxel coordinates of the patch; the last may lie beyond its end."""
        axes = [torch.arange(-(-(size - 1) // self.step) + 1, dtype=torch.float32) * self.step for size in self.shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"))

    def slabs(self, coordinates: Tensor, points: int) -> Iterator[tuple[slice, Tensor]]:
        """Coordinates at all voxels of the patch, in slabs along the first axis.

        Args:
            coordinates: (3, *lattice).
            points: Number of voxels of a slab, if a plane has no more.

        Yields:
            The slab, and its coordinates (3, planes, *rest).
        """
        (first, second, share), (low, high, y_share) = (self._neighbours(axis) for axis in (0, 1))
        stretched = coordinates @ self._stretch(2) if self.step > 1 else coordinates
        planes = max(1, points // (self.shape[1] * self.shape[2]))
        for start in range(0, self.shape[0], planes):
            slab = slice(start, min(start + planes, self.shape[0]))
            if self.step == 1:
                yield slab, stretched[:, slab]
                continue
            rows = torch.lerp(stretched[:, first[slab]], stretched[:, second[slab]], share[slab].view(-1, 1, 1))
            yield slab, torch.lerp(rows.index_select(2, low), rows.index_select(2, high), y_share.view(-1, 1))

    def _neighbours(self, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each voxel along an axis the places before and after it, and its distance from the first, 0 to 1."""
        voxels = torch.arange(self.shape[axis])
        low = voxels // self.step
        high = (low + 1).clamp_max(-(-(self.shape[axis] - 1) // self.step))
        return low, high, (voxels % self.step) / self.step

    def _stretch(self, axis: int) -> Tensor:
        """The interpolation along an axis as a matrix, (places, voxels)."""
        low, high, share = self._neighbours(axis)
        matrix = torch.zeros(int(high.max()) + 1, len(low))
        voxels = torch.arange(len(low))
        matrix[low, voxels] += 1 - share
        matrix[high, voxels] += share
        return matrix


@dataclass(frozen=True)
class Places:
    """Where the voxels of a patch lie in a case.

    Attributes:
        lattice: The places of the patch whose coordinates are given.
        points: (3, *lattice), case voxel coordinates.
        corner: The lowest voxel of the case in the patch, if the patch is a box of its voxels; None otherwise.
    """

    lattice: Lattice
    points: Tensor
    corner: tuple[int, ...] | None = None


def patch_places(
    corner: Sequence[int], initial_shape: Sequence[int], patch_shape: Sequence[int], spatial: SpatialTransform | None
) -> Places:
    """Where the voxels of a patch lie after random rotation and scaling.

    Args:
        corner: Lowest voxel of the initial patch, from which nnU-Net would cut the final patch; 3 axes.
        initial_shape: Shape of the initial patch.
        patch_shape: Shape of the final patch.
        spatial: Draws the augmentation, in 3D or in the last two axes; None leaves the patch unchanged.
    """
    plain = tuple(int(c + i // 2 - p // 2) for c, i, p in zip(corner, initial_shape, patch_shape, strict=True))
    shape = tuple(int(size) for size in patch_shape)
    lattice = Lattice(shape)
    if spatial is None:
        return Places(lattice, lattice.voxels() + _column(plain), plain)
    centre = [float(c + (i - 1) / 2) for c, i in zip(corner, initial_shape, strict=True)]
    dim = len(spatial.patch_size)
    if spatial.p_elastic_deform > 0 or spatial.random_crop:
        lattice = Lattice(shape, step=1)
        grid = spatial.get_parameters(image=torch.empty((1, *shape[3 - dim :])))["grid"]
        offsets = None if grid is None else _offsets(grid, shape[3 - dim :])
    else:
        offsets = _affine_offsets(spatial, lattice)
    if offsets is None:
        return Places(lattice, lattice.voxels() + _column(plain), plain)
    points = lattice.voxels() + _column(plain)
    if dim == 2:
        points[1:] = offsets[:, None] + _column(centre)[1:]
    else:
        points = offsets + _column(centre)
    return Places(lattice, points)


def _affine_offsets(spatial: SpatialTransform, lattice: Lattice) -> Tensor | None:
    """Distance from the centre at the places of a lattice, (D, *lattice) voxels, for a transform without elastic part.

    Such a transform is a matrix, which it shows on a patch of two voxels along each axis.
    """
    dim = len(spatial.patch_size)
    small = copy.copy(spatial)
    small.patch_size = (2,) * dim
    grid = small.get_parameters(image=torch.empty((1, *small.patch_size)))["grid"]
    if grid is None:
        return None
    corners = _offsets(grid, small.patch_size)
    origin = corners.flatten(1)[:, 0]
    columns = [corners.select(axis + 1, 1).flatten(1)[:, 0] - origin for axis in range(dim)]
    voxels = lattice.voxels()[3 - dim :]
    voxels = voxels if dim == 3 else voxels[:, 0]
    middle = torch.tensor([(size - 1) / 2 for size in lattice.shape[3 - dim :]]).view(-1, *[1] * dim)
    return torch.einsum("ij,j...->i...", torch.stack(columns, dim=1), voxels - middle)


def _offsets(grid: Tensor, shape: Sequence[int]) -> Tensor:
    """Distance from the centre, (D, *shape) voxels, from a grid of `torch.nn.functional.grid_sample`."""
    half = torch.tensor(list(shape), dtype=torch.float32) / 2
    return (grid.flip(-1).float() * half).movedim(-1, 0)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1, 1)
