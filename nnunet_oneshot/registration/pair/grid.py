"""The grid on which an atlas is compared with the cases, and the resampling of images to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_oneshot.intensities import standardised
from nnunet_oneshot.registration.pair.functional import downsample, identity_grid, sample_at, transform_points

# Axes are not downsampled below this many voxels.
_MINIMUM_EDGE = 16
# Voxels of the atlas whose coordinates are in memory at a time.
_SLAB_VOXELS = 2**21


@dataclass(frozen=True)
class RegistrationGrid:
    """A grid over an atlas's field of view.

    Attributes:
        shape: D sizes, voxels.
        spacing: D voxel edges, mm.
        atlas_shape: D sizes of the preprocessed atlas.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    atlas_shape: tuple[int, ...]

    @classmethod
    def over(cls, atlas_shape: Sequence[int], spacing: Sequence[float], max_voxels: int) -> RegistrationGrid:
        """The atlas's own grid, or one coarsened to at most about ``max_voxels``, starting with the finest axes."""
        shape, edges = [int(n) for n in atlas_shape], [float(s) for s in spacing]
        full = list(zip(shape, edges, strict=True))
        edge = min(edges)
        while np.prod(shape, dtype=np.int64) > max_voxels:
            edge *= 1.05
            coarser = [max(min(n, _MINIMUM_EDGE), round(n * min(1.0, s / edge))) for n, s in full]
            if coarser == shape and edge > 64 * max(edges):
                break
            shape = coarser
        spacing = tuple(s * n / m for (n, s), m in zip(full, shape, strict=True))
        return cls(tuple(shape), spacing, tuple(int(n) for n in atlas_shape))

    def atlas_image(self, atlas: np.ndarray) -> Tensor:
        """The z-scored atlas (C, *atlas_shape) on this grid, (1, C, *shape)."""
        return downsample(_as_tensor(atlas), self.shape)

    def fixed_image(self, case: np.ndarray, affine: np.ndarray) -> tuple[Tensor, Tensor]:
        """Resamples a case to this grid by the affine registration.

        Args:
            case: (C, *case_shape).
            affine: (D + 1, D + 1), case voxel coordinates -> atlas voxel coordinates.

        Returns:
            Image (1, C, *shape), and mask (1, 1, *shape) that is 1 where the case was observed.
        """
        sizes = torch.tensor(case.shape[1:], dtype=torch.float32).view(1, -1, *[1] * (case.ndim - 1))
        source = _as_tensor(case)
        image = torch.empty(1, len(case), *self.atlas_shape)
        inside = torch.empty(1, 1, *self.atlas_shape)
        for slab, points in self._places(affine):
            image[:, :, slab] = sample_at(source, points)
            inside[:, :, slab] = ((points > -0.5) & (points < sizes - 0.5)).all(1, keepdim=True).float()
        return downsample(image, self.shape), (downsample(inside, self.shape) > 0.5).float()

    def fixed_maps(self, maps: np.ndarray, affine: np.ndarray, shape: Sequence[int]) -> Tensor:
        """Resamples maps of a case, such as label probabilities, to a coarser grid over the same field of view.

        Args:
            maps: (K, *case_shape).
            affine: (D + 1, D + 1), case voxel coordinates -> atlas voxel coordinates.
            shape: D sizes.

        Returns:
            (1, K, *shape), averages over the voxels of that grid.
        """
        result = []
        # In parts, to limit memory: there may be many labels, and the atlas's grid may be large.
        together = max(1, _SLAB_VOXELS // math.prod(self.atlas_shape))
        for start in range(0, len(maps), together):
            source = torch.from_numpy(np.ascontiguousarray(maps[start : start + together], np.float32))[None]
            moved = torch.empty(1, source.shape[1], *self.atlas_shape)
            for slab, points in self._places(affine):
                moved[:, :, slab] = sample_at(source, points)
            result.append(downsample(moved, shape))
        return torch.cat(result, dim=1)

    def _places(self, affine: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Where the voxels of the atlas lie in a case, in slabs along the first axis to limit memory.

        Args:
            affine: (D + 1, D + 1), case voxel coordinates -> atlas voxel coordinates.

        Yields:
            The slab, and case voxel coordinates (1, D, slab, *rest).
        """
        inverse = torch.from_numpy(np.linalg.inv(affine)).float()
        first, *rest = self.atlas_shape
        thickness = max(1, _SLAB_VOXELS // math.prod(rest))
        for start in range(0, first, thickness):
            places = identity_grid((min(thickness, first - start), *rest))
            places[0] += start
            yield slice(start, start + thickness), transform_points(inverse, places[None])


def _as_tensor(image: np.ndarray) -> Tensor:
    """A standardised image (C, *shape) as (1, C, *shape) float32."""
    return torch.from_numpy(standardised(image))[None]
