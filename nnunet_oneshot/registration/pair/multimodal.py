"""Similarity of images of different contrast: self-similarity descriptors and mutual information."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

# Components of the descriptor in 3D. Squared differences are summed over them (in 2D: 12 times their mean), so that the
# term has the scale of the local correlation.
_COMPONENTS = 12
_BINS = 32
# Intensities beyond this many standard deviations fall into the outermost bins of a histogram.
_TAIL = 3.0


def mind_ssc(image: Tensor, *, radius: int = 1, dilation: int = 1) -> Tensor:
    """Self-similarity context (MIND-SSC; Heinrich et al., MICCAI 2013), scaled for `similarity_loss`.

    Each component is exp(-d / v). Here d compares the patches around two neighbours of a voxel along different axes,
    and v is the mean of d over the components. The descriptor is invariant to contrast inversion and scaling.

    Args:
        image: (B, C, *grid) with 2 or 3 spatial axes.
        radius: Half width of the patches; their edge is ``2 * radius + 1`` voxels.
        dilation: Distance to the neighbours, voxels.

    Returns:
        (B, C * K, *grid) float32, K = 12 in 3D and 4 in 2D. Values lie between 0 and the square root of 12, so that
        the mean squared difference of two results is 12 times that of the descriptors.
    """
    image = image.float()
    batch, channels, *grid = image.shape
    dim = len(grid)
    single = image.reshape(batch * channels, 1, *grid)
    padded = F.pad(single, [dilation] * 2 * dim, "replicate")
    neighbours = []
    for axis in range(dim):
        for side in (0, 2 * dilation):
            view = padded
            for other, size in enumerate(grid):
                view = view.narrow(2 + other, side if other == axis else dilation, size)
            neighbours.append((axis, view))
    pool = F.avg_pool2d if dim == 2 else F.avg_pool3d
    distances = []
    for (axis, first), (other, second) in combinations(neighbours, 2):
        if axis != other:
            squared = F.pad((first - second) ** 2, [radius] * 2 * dim, "replicate")
            distances.append(pool(squared, 2 * radius + 1, stride=1))
    distance = torch.cat(distances, dim=1)
    distance = distance - distance.amin(1, keepdim=True)
    variance = distance.mean(1, keepdim=True)
    usual = variance.mean(dim=tuple(range(1, 2 + dim)), keepdim=True)
    variance = torch.minimum(torch.maximum(variance, 1e-3 * usual), 1e3 * usual).clamp_min(1e-8)
    return _COMPONENTS**0.5 * torch.exp(-distance / variance).reshape(batch, -1, *grid)


def mutual_information(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Normalised mutual information, (H(first) + H(second)) / H(first, second) - 1 (Studholme et al., 1999).

    Each image pair and channel has its own joint histogram of 32 x 32 bins, with linear (triangular) windows so that
    gradients flow to the intensities.

    Args:
        first: (B, C, *grid).
        second: (B, C, *grid).
        mask: (B, 1, *grid) weights of the voxels.

    Returns:
        (B, C), from 0 (independent, or constant) to 1 (one image determines the other).
    """
    batch, channels = first.shape[:2]
    lower_1, share_1 = _bins(first)
    lower_2, share_2 = _bins(second)
    weight = torch.ones_like(share_1) if mask is None else mask.float().expand_as(first).reshape(share_1.shape)
    offset = torch.arange(batch * channels, device=first.device)[:, None] * _BINS**2
    histogram = first.new_zeros(batch * channels * _BINS**2, dtype=torch.float32)
    for step_1, part_1 in ((0, 1 - share_1), (1, share_1)):
        for step_2, part_2 in ((0, 1 - share_2), (1, share_2)):
            index = offset + (lower_1 + step_1) * _BINS + lower_2 + step_2
            histogram = histogram.index_add(0, index.flatten(), (weight * part_1 * part_2).flatten())
    joint = histogram.view(batch, channels, _BINS, _BINS)
    joint = joint / joint.sum((2, 3), keepdim=True).clamp_min(1e-8)
    both = _entropy(joint.flatten(2))
    return (_entropy(joint.sum(3)) + _entropy(joint.sum(2)) - both) / both.clamp_min(1e-6)


def _bins(image: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bin and weight of the upper bin of each voxel, (B * C, voxels) each."""
    flat = image.float().flatten(2).flatten(0, 1)
    values = flat.detach()
    mean, spread = values.mean(1, keepdim=True), _TAIL * values.std(1, keepdim=True)
    low = torch.maximum(values.amin(1, keepdim=True), mean - spread)
    high = torch.minimum(values.amax(1, keepdim=True), mean + spread)
    position = ((flat - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) * (_BINS - 1)
    lower = position.detach().floor().clamp_max(_BINS - 2)
    return lower.long(), position - lower


def _entropy(probability: Tensor) -> Tensor:
    return -(probability * (probability + 1e-10).log()).sum(-1)
