"""Optimises velocity fields pair by pair, coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.functional import (
    diffusion_energy,
    integrate_on,
    resize,
    scale_vectors,
    similarity_loss_to,
    warp,
)
from nnunet_oneshot.registration.multimodal import mind_ssc

if TYPE_CHECKING:
    from nnunet_oneshot.registration.label_guide import LabelGuide

# No level is coarser than this many voxels on its shortest axis: less holds no anatomy.
_COARSEST_EDGE = 12


def velocity_shape(shape: Sequence[int], downsample: int) -> tuple[int, ...]:
    """Shape of the velocity grid over a registration grid: coarser by ``downsample``, at least 2 voxels an axis."""
    return tuple(max(2, -(-n // downsample)) for n in shape)


def level_shapes(shape: Sequence[int], levels: int) -> list[tuple[int, ...]]:
    """Grid shapes of the resolution levels, coarse to fine, each a factor 2 apart where the axis is long enough."""
    shapes = []
    for level in reversed(range(levels)):
        shapes.append(tuple(max(min(n, _COARSEST_EDGE), round(n / 2**level)) for n in shape))
    return shapes


def downsample(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Area average of (B, C, *grid) onto (B, C, *shape)."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    return F.adaptive_avg_pool2d(image, shape) if image.ndim == 4 else F.adaptive_avg_pool3d(image, shape)


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
        initial: (B, D, *velocity grid) start, voxels of the grid; None is zero, and all levels are run. With a start
            only the levels from the second on are run.
        guide: Labels that are to match too, with the weight ``config.guide_weight``.

    Returns:
        (B, D, *velocity_shape) velocity fields, voxels of the grid.
    """
    grid = tuple(fixed.shape[2:])
    dim = len(grid)
    shapes = level_shapes(grid, len(config.refine_iterations))
    velocity = initial
    for index, (shape, iterations) in enumerate(zip(shapes, config.refine_iterations, strict=True)):
        if iterations == 0 or (initial is not None and index == 0 and len(shapes) > 1):
            continue
        atlas_level, fixed_level, mask_level = (downsample(v, shape) for v in (atlas, fixed, mask))
        similarity = config.similarity
        if similarity == "mind":
            # Descriptors are computed once and warped as they are; a small rotation of them is neglected.
            atlas_level, fixed_level, similarity = mind_ssc(atlas_level), mind_ssc(fixed_level), "mse"
        edges = [s * g / n for s, g, n in zip(spacing, grid, shape, strict=True)]
        coarse = velocity_shape(shape, config.velocity_downsample)
        coarse_edges = [e * n / c for e, n, c in zip(edges, shape, coarse, strict=True)]
        if velocity is None:
            parameter = fixed.new_zeros((len(fixed), dim, *coarse))
        else:
            parameter = resize(scale_vectors(velocity, grid, shape), coarse).detach().clone()
        parameter.requires_grad_(True)
        dissimilarity = similarity_loss_to(fixed_level, mask_level, similarity=similarity, kernel=config.lncc_kernel)
        disagreement = None if guide is None else guide.loss_on(shape)
        optimizer = torch.optim.Adam([parameter], lr=config.refine_learning_rate)
        for _ in range(iterations):
            optimizer.zero_grad(set_to_none=True)
            displacement = integrate_on(parameter, shape, steps=config.integration_steps)
            warped = warp(atlas_level.expand(len(fixed), -1, *shape), displacement)
            energy = diffusion_energy(scale_vectors(parameter, shape, coarse), coarse_edges)
            loss = dissimilarity(warped) + config.smoothness * energy
            if disagreement is not None:
                loss = loss + config.guide_weight * disagreement(displacement)
            loss.sum().backward()
            optimizer.step()
        velocity = scale_vectors(parameter.detach(), shape, grid)
    if velocity is None:
        return fixed.new_zeros((len(fixed), dim, *velocity_shape(grid, config.velocity_downsample)))
    return resize(velocity, velocity_shape(grid, config.velocity_downsample))
