"""Tells which of several affine maps is right by a short deformable registration from each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.fitting import refine_velocity
from nnunet_oneshot.registration.pair.functional import (
    correlation_window,
    integrate_on,
    masked_mean,
    squared_local_correlation,
    warp,
)
from nnunet_oneshot.registration.pair.grid import RegistrationGrid

# Voxels of the grid and steps of its two levels: enough to tell whether structures meet.
_VOXELS = 40_000
_ITERATIONS = (20, 20)


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

    def likeness(self, case: np.ndarray, maps: Sequence[np.ndarray]) -> np.ndarray:
        """How alike the images are after a short registration from each map.

        Args:
            case: (C, *case_shape).
            maps: K affine maps case voxel -> atlas voxel, (D + 1, D + 1).

        Returns:
            (K,): squared local correlation where the case was observed, lowered by up to half where less of it was
            than with the map that observes most.
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
            return (alike * (1 + observed / observed.max().clamp_min(1e-6)) / 2).cpu().double().numpy()
