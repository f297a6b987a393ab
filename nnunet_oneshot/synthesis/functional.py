"""Random velocity fields and appearance transfer, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

_QUANTILES = np.linspace(0, 1, 33)


def random_velocity(
    grid: Sequence[int],
    atlas_shape: Sequence[int],
    *,
    magnitude: float,
    smoothness: float,
    rng: np.random.Generator | np.random.RandomState = np.random,  # type: ignore[assignment]
) -> Tensor:
    """A smooth random velocity field: white noise, Gaussian-filtered and scaled.

    Args:
        grid: Shape of the velocity grid over the atlas's field of view.
        atlas_shape: Voxels of the atlas.
        magnitude: Standard deviation of each component, atlas voxels.
        smoothness: Standard deviation of the filter, atlas voxels.
        rng: Source of the noise.

    Returns:
        (3, *grid) float32, atlas voxels; the component of an axis along which the atlas has one voxel is 0.
    """
    sigma = [smoothness * g / n for g, n in zip(grid, atlas_shape, strict=True)]
    field = np.zeros((3, *grid), np.float32)
    for axis in range(3):
        if atlas_shape[axis] == 1:
            continue
        smooth = gaussian_filter(rng.standard_normal(tuple(grid)), sigma, mode="nearest")
        deviation = smooth.std()
        if deviation > 0:
            field[axis] = magnitude * (smooth - smooth.mean()) / deviation
    return torch.from_numpy(field)


def match_quantiles(image: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Maps intensities so that their distribution inside a mask becomes the reference's, channel by channel.

    The map is monotone and piecewise linear between 33 quantiles; values beyond the outermost quantiles keep their
    distance to them.

    Args:
        image: (C, *patch).
        reference: (C, *patch).
        mask: (*patch) bool, voxels that are compared and changed.

    Returns:
        (C, *patch); ``image`` itself if the mask has fewer voxels than there are quantiles.
    """
    if int(mask.sum()) < len(_QUANTILES):
        return image
    result = image.clone()
    for channel in range(len(image)):
        values = image[channel][mask].numpy()
        source = np.quantile(values, _QUANTILES)
        target = np.quantile(reference[channel][mask].numpy(), _QUANTILES)
        source, first = np.unique(source, return_index=True)
        target = target[first]
        mapped = np.interp(values, source, target)
        mapped += np.where(values > source[-1], values - source[-1], 0) + np.where(
            values < source[0], values - source[0], 0
        )
        result[channel][mask] = torch.from_numpy(mapped.astype(np.float32))
    return result


def local_appearance_difference(image: Tensor, reference: Tensor, mask: Tensor, *, smoothness: float) -> Tensor:
    """The smooth part of reference - image inside a mask, by normalised Gaussian filtering.

    Adding it to ``image`` transfers shading and regional contrast, but no edges finer than the filter.

    Args:
        image: (C, *patch).
        reference: (C, *patch), spatially aligned with ``image``.
        mask: (*patch) bool.
        smoothness: Standard deviation of the filter, voxels.

    Returns:
        (C, *patch), 0 outside the mask.
    """
    weight = mask.numpy().astype(np.float32)
    norm = np.maximum(gaussian_filter(weight, smoothness), 1e-3)
    difference = (reference - image).numpy() * weight
    smooth = [gaussian_filter(channel, smoothness) / norm * weight for channel in difference]
    return torch.from_numpy(np.stack(smooth).astype(np.float32))


def transfer_appearance(
    image: Tensor, reference: Tensor, mask: Tensor, *, global_share: float, local_share: float, smoothness: float
) -> Tensor:
    """Gives ``image`` part of the appearance of an aligned ``reference``.

    Args:
        image: (C, *patch).
        reference: (C, *patch).
        mask: (*patch) bool, voxels that are changed.
        global_share: 0 keeps the intensities, 1 matches their distribution to the reference's (`match_quantiles`).
        local_share: Share of the remaining smooth difference that is added (`local_appearance_difference`).
        smoothness: Standard deviation of the filter for that difference, voxels.

    Returns:
        (C, *patch).
    """
    image = image + global_share * (match_quantiles(image, reference, mask) - image)
    return image + local_share * local_appearance_difference(image, reference, mask, smoothness=smoothness)
