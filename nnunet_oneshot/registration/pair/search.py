"""Discrete search for displacements too large for gradients: where the optimisation of a velocity field may start.

Coupled convex optimisation (Heinrich et al., MICCAI 2014; ConvexAdam, Siebert et al., 2024) on a coarse grid of nodes:
every node of one image is compared with the nodes around its place in the other by self-similarity descriptors, and
choosing the best offset alternates with smoothing the field of choices, under a coupling of the two that grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_oneshot.registration.pair.functional import (
    box_mean,
    compose,
    downsample,
    integrate_velocity,
    scale_vectors,
    warp,
)
from nnunet_oneshot.registration.pair.multimodal import mind_ssc

# Nodes along an edge of the field of view (the geometric mean of the edges), and the offsets to each side: together
# they bound the table of costs to about 4,100 x 2,197 numbers a pair.
_NODES = 16
_LARGEST_RADIUS = 6
# Nodes are no closer than this many voxels.
_NODE_EDGE = 4.0
# Nodes that gradients bridge on their own.
_REACH_OF_GRADIENTS = 2
_WINDOW = 3
_COUPLINGS = (0.00075, 0.0025, 0.0075, 0.025, 0.075, 0.25)
_CONSISTENCY_ROUNDS = 3
_LOGARITHM_ROUNDS = 10
# Voxels that a descriptor sees to each side.
_DESCRIPTOR_REACH = 2


def search_grid(
    shape: Sequence[int], spacing: Sequence[float], reach: float
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Nodes and offsets of the search.

    Args:
        shape: D sizes of the registration grid, voxels.
        spacing: D voxel edges, mm.
        reach: Largest displacement along an axis, as a share of the edge of the field of view (the geometric mean).

    Returns:
        D numbers of nodes, about as far apart along all axes in mm, and D numbers of offsets to each side; None where
        the grid is so small that gradients reach as far.
    """
    dim = len(shape)
    extents = [n * s for n, s in zip(shape, spacing, strict=True)]
    edge = prod(extents) ** (1 / dim)
    step = max(edge / _NODES, edge * reach / _LARGEST_RADIUS, _NODE_EDGE * prod(spacing) ** (1 / dim))
    nodes = tuple(max(1, min(n, round(e / step))) for n, e in zip(shape, extents, strict=True))
    # Beyond half of an axis few nodes have a partner.
    radii = tuple(min(round(reach * edge * n / e), (n - 1) // 2) for n, e in zip(nodes, extents, strict=True))
    return None if max(radii) <= _REACH_OF_GRADIENTS else (nodes, radii)


def searched_velocity(
    atlas: Tensor, fixed: Tensor, mask: Tensor, *, spacing: Sequence[float], reach: float
) -> Tensor | None:
    """A smooth velocity field whose flow is about the displacement that the search finds.

    Args:
        atlas: (1, C, *grid).
        fixed: (B, C, *grid).
        mask: (B, 1, *grid), 1 where ``fixed`` was observed; places outside do not count.
        spacing: D voxel edges of the grid, mm.
        reach: As in `search_grid`.

    Returns:
        (B, D, *nodes), voxels of the grid; None where the grid is too small for a search.
    """
    grid = tuple(fixed.shape[2:])
    plan = search_grid(grid, spacing, reach)
    if plan is None:
        return None
    nodes, radii = plan
    edges = [s * n / m for s, n, m in zip(spacing, grid, nodes, strict=True)]
    atlas_features = node_features(atlas, torch.ones_like(atlas[:, :1]), nodes)
    velocities = []
    for image, observed in zip(fixed.split(1), mask.split(1), strict=True):
        fixed_features = node_features(image, observed, nodes)
        forward = coupled_search(matching_cost(fixed_features, atlas_features, radii), radii, edges)
        # Where the fixed image was not observed, the atlas's nodes would take partners that are not theirs.
        alike = (atlas_features[0], fixed_features[1])
        backward = coupled_search(matching_cost(alike, fixed_features, radii), radii, edges)
        velocities.append(logarithm(consistent(forward, backward)))
    return scale_vectors(torch.cat(velocities), nodes, grid)


def node_features(image: Tensor, mask: Tensor, nodes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Self-similarity descriptors of the places that each node stands for.

    Args:
        image: (1, C, *grid).
        mask: (1, 1, *grid), 1 where the image was observed.
        nodes: D numbers of nodes.

    Returns:
        Mean descriptors (1, K, *nodes), and the share (1, 1, *nodes) of each node's places that were observed.
    """
    shape = [min(n, 2 * m) for n, m in zip(image.shape[2:], nodes, strict=True)]
    descriptors = mind_ssc(downsample(image, shape))
    unseen = 1 - downsample(mask, shape)
    pool = F.max_pool2d if image.ndim == 4 else F.max_pool3d
    observed = 1 - pool(unseen, 2 * _DESCRIPTOR_REACH + 1, stride=1, padding=_DESCRIPTOR_REACH).ceil()
    share = downsample(observed, nodes)
    return downsample(descriptors * observed, nodes) / share.clamp_min(1e-6), share


def matching_cost(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], radii: Sequence[int]) -> Tensor:
    """How unlike each node of one image is to the nodes around its place in another.

    Args:
        first: `node_features` of the image whose nodes are matched.
        second: Those of the image in which partners are sought.
        radii: D numbers of offsets to each side.

    Returns:
        (L, *nodes): mean squared differences, averaged over a cube of three nodes, for the L offsets of `offsets`.
        Partners that were not observed or lie outside cost what the node's other partners do in the mean.
    """
    (features, share), nodes = first, first[0].shape[2:]
    margin = [r for r in reversed(radii) for _ in range(2)]
    partners, partner_share = (F.pad(tensor, margin) for tensor in second)
    costs, weights = [], []
    for start in product(*(range(2 * r + 1) for r in radii)):
        window = (slice(None), slice(None), *(slice(s, s + n) for s, n in zip(start, nodes, strict=True)))
        costs.append(((features - partners[window]) ** 2).mean(1))
        weights.append((share * partner_share[window])[:, 0])
    cost, weight = torch.cat(costs), torch.cat(weights)
    usual = (cost * weight).sum(0) / weight.sum(0).clamp_min(1e-6)
    return box_mean((usual + weight * (cost - usual))[None], _WINDOW)[0]


def offsets(radii: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """All offsets of up to D ``radii`` nodes to each side, (L, D) float32, last axis fastest."""
    axes = [torch.arange(-r, r + 1, dtype=torch.float32, device=device) for r in radii]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def coupled_search(cost: Tensor, radii: Sequence[int], edges: Sequence[float]) -> Tensor:
    """A smooth field of offsets of low cost.

    In turn the field is smoothed, and each node chooses the offset of the least cost plus coupling times the squared
    distance to the smooth field, which is zero at first. Distances count in the mean distance of nodes.

    Args:
        cost: (L, *nodes), see `matching_cost`.
        radii: D numbers of offsets to each side.
        edges: D distances of nodes, mm.

    Returns:
        Displacement (1, D, *nodes), nodes.
    """
    nodes = cost.shape[1:]
    vectors = offsets(radii, device=cost.device)
    unit = torch.tensor(edges, device=cost.device) / prod(edges) ** (1 / len(edges))
    scaled = vectors * unit
    table = cost.flatten(1).T.contiguous()
    field = cost.new_zeros((1, len(radii), *nodes))
    for coupling in _COUPLINGS:
        smooth = field[0].flatten(1).T * unit
        # The square of the smooth field is the same for all offsets.
        total = torch.addmm(table + coupling * scaled.square().sum(1), smooth, scaled.T, alpha=-2 * coupling)
        field = box_mean(vectors[total.argmin(1)].T.reshape(field.shape), _WINDOW)
    return field


def consistent(forward: Tensor, backward: Tensor) -> Tensor:
    """The forward displacement after both were drawn towards being each other's inverse, all (B, D, *nodes), nodes."""
    for _ in range(_CONSISTENCY_ROUNDS):
        forward, backward = (
            (forward - warp(backward, forward)) / 2,
            (backward - warp(forward, backward)) / 2,
        )
    return forward


def logarithm(displacement: Tensor) -> Tensor:
    """A velocity field whose flow is about a displacement, both (B, D, *grid) in voxels of the grid.

    Adds, ten times, the smoothed displacement that is left after the inverse of the flow so far; the first term of the
    Baker-Campbell-Hausdorff formula (Bossa et al., MICCAI 2007). Where the displacement folds, its flow does not.
    """
    velocity = torch.zeros_like(displacement)
    for _ in range(_LOGARITHM_ROUNDS):
        left = compose(displacement, integrate_velocity(-velocity))
        velocity = velocity + box_mean(left, _WINDOW)
    return velocity
