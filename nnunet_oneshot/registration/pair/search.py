"""Discrete search for large displacements that gradient descent misses: a start for the velocity field.

Coupled convex optimisation (Heinrich et al., MICCAI 2014; ConvexAdam, Siebert et al., 2024) on a coarse grid of nodes:
self-similarity descriptors compare each node of one image with the nodes around the same position in the other. The
search alternates between choosing the best offset of each node and smoothing the field of offsets; the coupling of the
two grows.
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

# Nodes along an edge of the field of view (geometric mean of the edges), and offsets to each side. Together they limit
# the cost table to about 4,100 x 2,197 numbers per pair.
_NODES = 16
_LARGEST_RADIUS = 6
# Smallest distance between nodes, voxels.
_NODE_EDGE = 4.0
# Displacement that gradient descent finds on its own, nodes.
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
        D numbers of nodes, with about equal distances in mm along all axes, and D numbers of offsets to each side; None
        if the grid is so small that gradient descent reaches as far.
    """
    dim = len(shape)
    extents = [n * s for n, s in zip(shape, spacing, strict=True)]
    edge = prod(extents) ** (1 / dim)
    step = max(edge / _NODES, edge * reach / _LARGEST_RADIUS, _NODE_EDGE * prod(spacing) ** (1 / dim))
    nodes = tuple(max(1, min(n, round(e / step))) for n, e in zip(shape, extents, strict=True))
    # For offsets beyond half of an axis, few nodes have a partner.
    radii = tuple(min(round(reach * edge * n / e), (n - 1) // 2) for n, e in zip(nodes, extents, strict=True))
    return None if max(radii) <= _REACH_OF_GRADIENTS else (nodes, radii)


def searched_velocity(
    atlas: Tensor, fixed: Tensor, mask: Tensor, *, spacing: Sequence[float], reach: float
) -> Tensor | None:
    """A smooth velocity field whose flow approximates the displacement found by the search.

    Args:
        atlas: (1, C, *grid).
        fixed: (B, C, *grid).
        mask: (B, 1, *grid), 1 where ``fixed`` was observed; other voxels do not count.
        spacing: D voxel edges of the grid, mm.
        reach: As in `search_grid`.

    Returns:
        (B, D, *nodes), voxels of the grid; None if the grid is too small for a search.
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
        # Use the fixed image's mask: where it was not observed, the atlas's nodes would match wrong partners.
        alike = (atlas_features[0], fixed_features[1])
        backward = coupled_search(matching_cost(alike, fixed_features, radii), radii, edges)
        velocities.append(logarithm(consistent(forward, backward)))
    return scale_vectors(torch.cat(velocities), nodes, grid)


def node_features(image: Tensor, mask: Tensor, nodes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean self-similarity descriptors of the voxels in each node.

    Args:
        image: (1, C, *grid).
        mask: (1, 1, *grid), 1 where the image was observed.
        nodes: D numbers of nodes.

    Returns:
        Mean descriptors (1, K, *nodes), and the share (1, 1, *nodes) of each node's voxels that were observed.
    """
    shape = [min(n, 2 * m) for n, m in zip(image.shape[2:], nodes, strict=True)]
    descriptors = mind_ssc(downsample(image, shape))
    unseen = 1 - downsample(mask, shape)
    pool = F.max_pool2d if image.ndim == 4 else F.max_pool3d
    observed = 1 - pool(unseen, 2 * _DESCRIPTOR_REACH + 1, stride=1, padding=_DESCRIPTOR_REACH).ceil()
    share = downsample(observed, nodes)
    return downsample(descriptors * observed, nodes) / share.clamp_min(1e-6), share


def matching_cost(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], radii: Sequence[int]) -> Tensor:
    """Dissimilarity of each node of one image to the nodes around the same position in another.

    Args:
        first: `node_features` of the image whose nodes are matched.
        second: `node_features` of the image that is searched for partners.
        radii: D numbers of offsets to each side.

    Returns:
        (L, *nodes): mean squared differences, averaged over a cube of 3 nodes per edge, for the L offsets of `offsets`.
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
    """A smooth field of low-cost offsets.

    Alternates two steps: each node chooses the offset that minimises its cost plus the coupling times the squared
    distance to the smooth field, then the field of offsets is smoothed. The smooth field starts at zero. The unit of
    distance is the mean distance of nodes.

    Args:
        cost: (L, *nodes), see `matching_cost`.
        radii: D numbers of offsets to each side.
        edges: D distances between nodes, mm.

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
        # Omits the square of the smooth field, which is the same for all offsets.
        total = torch.addmm(table + coupling * scaled.square().sum(1), smooth, scaled.T, alpha=-2 * coupling)
        field = box_mean(vectors[total.argmin(1)].T.reshape(field.shape), _WINDOW)
    return field


def consistent(forward: Tensor, backward: Tensor) -> Tensor:
    """The forward displacement after making both closer to mutual inverses, all (B, D, *nodes), nodes."""
    for _ in range(_CONSISTENCY_ROUNDS):
        forward, backward = (
            (forward - warp(backward, forward)) / 2,
            (backward - warp(forward, backward)) / 2,
        )
    return forward


def logarithm(displacement: Tensor) -> Tensor:
    """A velocity field whose flow approximates a displacement, both (B, D, *grid) in voxels of the grid.

    Repeats ten times: composes the displacement with the inverse of the current flow, smooths the residual and adds it
    to the velocity. This is the first term of the Baker-Campbell-Hausdorff formula (Bossa et al., MICCAI 2007). The
    flow does not fold even where the displacement does.
    """
    velocity = torch.zeros_like(displacement)
    for _ in range(_LOGARITHM_ROUNDS):
        left = compose(displacement, integrate_velocity(-velocity))
        velocity = velocity + box_mean(left, _WINDOW)
    return velocity
