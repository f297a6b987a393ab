"""Tells which of several affine maps is right by a short deformable registration from each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.fitting import refine_velocity
from nnunet_oneshot.registration.pair.functional import (
    correlation_window,
    identity_grid,
    integrate_on,
    masked_mean,
    scale_vectors,
    squared_local_correlation,
    transform_points,
    warp,
)
from nnunet_oneshot.registration.pair.grid import RegistrationGrid
from nnunet_oneshot.registration.pair.warp import deform_points

# Voxels of the grid and steps of its two levels: enough to tell whether structures meet.
_VOXELS = 40_000
_ITERATIONS = (20, 20)
# Points of a case, along each axis, at which registrations are compared.
_POINTS = 8


class Trial:
    """Registers one atlas to cases from several affine maps, coarsely.

    Args:
        atlas: (C, *atlas_shape) with D = 2 or 3 spatial axes.
        spacing: D voxel edges, mm.
        config: Settings of the registration.
        device: Where it runs.
    """

    def __init__(
        self, atlas: np.ndarray, spacing: Sequence[float], config: RegistrationConfig, device: torch.device
    ) -> None:
        self._grid = RegistrationGrid.over(atlas.shape[1:], spacing, min(_VOXELS, config.max_voxels))
        self._atlas = self._grid.atlas_image(atlas).to(device)
        self._config = dataclasses.replace(config, refine_iterations=_ITERATIONS)

    def compare(self, case: np.ndarray, maps: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """How alike the images are after a short registration from each map, and how far apart those lead.

        Args:
            case: (C, *case_shape).
            maps: K affine maps case voxel -> atlas voxel, (D + 1, D + 1).

        Returns:
            Squared local correlation where the case was observed, lowered by up to half where less of it was than with
            the map that observes most, (K,); and the root mean square distance between the places in the atlas to which
            two of the registrations lead the case, a share of the atlas's longest edge, (K, K).
        """
        pairs = [self._grid.fixed_image(case, affine) for affine in maps]
        fixed, mask = (torch.cat(parts).to(self._atlas.device) for parts in zip(*pairs, strict=True))
        velocity = refine_velocity(self._atlas, fixed, mask, spacing=self._grid.spacing, config=self._config)
        with torch.no_grad():
            displacement = integrate_on(velocity, self._grid.shape)
            warped = warp(self._atlas.expand(len(maps), *self._atlas.shape[1:]), displacement)
            window = correlation_window(self._config.lncc_kernel, self._grid.shape)
            alike = masked_mean(squared_local_correlation(warped, fixed, window), mask)
            observed = mask.flatten(1).mean(1)
            alike = alike * (1 + observed / observed.max().clamp_min(1e-6)) / 2
            places = self._places(displacement, case.shape[1:], maps).flatten(1)
        return alike.cpu().double().numpy(), torch.cdist(places, places).double().numpy()

    def _places(self, displacement: Tensor, shape: Sequence[int], maps: Sequence[np.ndarray]) -> Tensor:
        """Where points of a case lie in the atlas by each map and its displacement, in units of distance of `compare`.

        Args:
            displacement: (K, D, *grid), voxels of the grid.
            shape: Sizes of the case.
            maps: K affine maps case voxel -> atlas voxel.

        Returns:
            (K, D, *points), scaled so that the norm of a difference is the root mean square distance.
        """
        grid = self._grid
        axes = (-1, *[1] * len(shape))
        points = (identity_grid([_POINTS] * len(shape)) + 0.5) * torch.tensor([n / _POINTS for n in shape]).view(axes)
        fields = scale_vectors(displacement, grid.shape, grid.atlas_shape).cpu()
        points = (points - 0.5).expand(len(maps), *points.shape)
        read = transform_points(torch.from_numpy(np.stack(maps)).float(), points)
        moved = [deform_points(p, field, grid.atlas_shape) for p, field in zip(read, fields, strict=True)]
        extents = np.multiply(grid.shape, grid.spacing)
        edges = torch.from_numpy(extents / grid.atlas_shape / extents.max()).float().view(axes)
        return torch.stack(moved) * edges / _POINTS ** (len(shape) / 2)
