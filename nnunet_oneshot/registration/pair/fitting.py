"""Optimises velocity fields pair by pair, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.functional import (
    diffusion_energy,
    downsample,
    folding,
    integrate_on,
    resize,
    scale_vectors,
    warp,
)
from nnunet_oneshot.registration.pair.label_guide import LabelGuide
from nnunet_oneshot.registration.pair.pyramid import level_shapes, velocity_shape
from nnunet_oneshot.registration.pair.search import searched_velocity
from nnunet_oneshot.registration.pair.similarities import SIMILARITIES

# Share of the first level's steps that both starts get before the worse one is dropped.
_TRIAL = 1 / 3
# Distance to a voxel's centre at which slopes are taken, voxels.
_BESIDE = 1e-2


def refine_velocity(
    atlas: Tensor,
    fixed: Tensor,
    mask: Tensor,
    *,
    spacing: Sequence[float],
    config: RegistrationConfig,
    initial: Tensor | None = None,
    guide: LabelGuide | None = None,
) -> Tensor:
    """Finds the velocity fields that warp the atlas onto each fixed image, by Adam on similarity and smoothness.

    Args:
        atlas: (1, C, *grid), z-scored.
        fixed: (B, C, *grid), z-scored, affinely resampled onto the atlas's grid; each of the B pairs is independent.
        mask: (B, 1, *grid), 1 where ``fixed`` was observed.
        spacing: D voxel edges of the grid, mm.
        config: Similarity, weights, iterations at each level (coarse to fine).
        initial: (B, D, *velocity grid) start, voxels of the grid. None starts from zero and runs all levels; with a
            start, optimisation begins at the second level.
        guide: Labels that should also match, weighted by ``config.guide_weight``.

    Returns:
        (B, D, *velocity_shape) velocity fields, voxels of the grid.
    """
    grid = tuple(fixed.shape[2:])
    shapes = level_shapes(grid, len(config.refine_iterations))
    searched = None
    if initial is None and config.search_reach > 0 and any(config.refine_iterations):
        searched = searched_velocity(atlas, fixed, mask, spacing=spacing, reach=config.search_reach)
    velocity = initial
    for index, (shape, iterations) in enumerate(zip(shapes, config.refine_iterations, strict=True)):
        if iterations == 0 or (initial is not None and index == 0 and len(shapes) > 1):
            continue
        coarse = velocity_shape(shape, config.velocity_downsample)
        if velocity is None:
            start = fixed.new_zeros((len(fixed), len(grid), *coarse))
        else:
            start = resize(scale_vectors(velocity, grid, shape), coarse)
        level = _Level(atlas, fixed, mask, shape, spacing=spacing, config=config, guide=guide)
        descent = _Descent(level, start)
        if searched is not None:
            trial = min(iterations, max(1, round(_TRIAL * iterations)))
            other = _Descent(level, resize(scale_vectors(searched, grid, shape), coarse))
            descent.advance(trial)
            other.advance(trial)
            descent.adopt(other, level.is_better(other.velocity, descent.velocity))
            iterations, searched = iterations - trial, None
        descent.advance(iterations)
        velocity = scale_vectors(descent.velocity, shape, grid)
    if velocity is None:
        return fixed.new_zeros((len(fixed), len(grid), *velocity_shape(grid, config.velocity_downsample)))
    return resize(velocity, velocity_shape(grid, config.velocity_downsample))


class _Level:
    """The objective at one resolution level; takes the arguments of `refine_velocity`.

    Velocity fields are (B, D, *velocity grid), voxels of the level's grid ``shape``.
    """

    def __init__(
        self,
        atlas: Tensor,
        fixed: Tensor,
        mask: Tensor,
        shape: Sequence[int],
        *,
        spacing: Sequence[float],
        config: RegistrationConfig,
        guide: LabelGuide | None,
    ) -> None:
        self._shape, self._config = shape, config
        self.step_size = config.refine_learning_rate
        # Coarse levels get a weaker penalty: with the same one on all levels, large displacements stay too short.
        self._smoothness = config.smoothness * (prod(shape) / prod(fixed.shape[2:])) ** (2 / len(shape))
        atlas, level_fixed, mask = (downsample(v, shape) for v in (atlas, fixed, mask))
        similarity = SIMILARITIES[config.similarity]
        atlas, level_fixed = similarity.described(atlas), similarity.described(level_fixed)
        self._atlas = atlas.expand(len(fixed), -1, *shape)
        self._coarse = velocity_shape(shape, config.velocity_downsample)
        self._edges = [s * g / c for s, g, c in zip(spacing, fixed.shape[2:], self._coarse, strict=True)]
        self._dissimilarity = similarity.to(level_fixed, mask, config.lncc_kernel)
        self._disagreement = None if guide is None else guide.loss_on(shape)

    def loss(self, velocity: Tensor) -> Tensor:
        """Dissimilarity, weighted diffusion energy and, with a guide, weighted disagreement of labels: (B,)."""
        displacement = self._displacement(velocity)
        energy = diffusion_energy(scale_vectors(velocity, self._shape, self._coarse), self._edges)
        loss = self._dissimilarity(warp(self._atlas, displacement)) + self._smoothness * energy
        if self._disagreement is not None:
            loss = loss + self._config.guide_weight * self._disagreement(displacement)
        return loss

    @torch.no_grad()
    def is_better(self, first: Tensor, second: Tensor) -> Tensor:
        """For each pair, whether the first field has the lower loss and a flow without folds, (B,)."""
        return (self.loss(first) < self.loss(second)) & (folding(self._displacement(first)) == 0)

    def _displacement(self, velocity: Tensor) -> Tensor:
        return integrate_on(velocity, self._shape, steps=self._config.integration_steps)


class _Descent:
    """Minimises a level's objective over velocity fields with Adam.

    Args:
        level: The objective.
        start: (B, D, *velocity grid), voxels of the level's grid.
    """

    def __init__(self, level: _Level, start: Tensor) -> None:
        self._level = level
        self._parameter = start.detach().clone().requires_grad_(True)
        self._optimizer = torch.optim.Adam([self._parameter], lr=level.step_size)
        self._has_zeros = True

    @property
    def velocity(self) -> Tensor:
        return self._parameter.detach()

    def advance(self, iterations: int) -> None:
        for _ in range(iterations):
            self._optimizer.zero_grad(set_to_none=True)
            self._loss().sum().backward()
            self._optimizer.step()

    def _loss(self) -> Tensor:
        """The objective; at a field of zeros the mean of those to both sides.

        A linear interpolation has one slope to each side of a voxel's centre. With only one of them, the result would
        depend on the direction in which the axes of the volume are stored.
        """
        # Asked no more once none is: each answer has to be fetched from the device.
        if not self._has_zeros:
            return self._level.loss(self._parameter)
        zero = ~self.velocity.flatten(1).any(1)
        self._has_zeros = bool(zero.any())
        if not self._has_zeros:
            return self._level.loss(self._parameter)
        beside = _BESIDE * zero.to(self._parameter.dtype).view(-1, *[1] * (self._parameter.ndim - 1))
        return (self._level.loss(self._parameter + beside) + self._level.loss(self._parameter - beside)) / 2

    def adopt(self, other: _Descent, chosen: Tensor) -> None:
        """Takes over the state of another descent after as many steps, for the ``chosen`` (B,) pairs."""
        mine, others = self._optimizer.state[self._parameter], other._optimizer.state[other._parameter]
        self._parameter.data[chosen] = other.velocity[chosen]
        for name in ("exp_avg", "exp_avg_sq"):
            mine[name][chosen] = others[name][chosen]
