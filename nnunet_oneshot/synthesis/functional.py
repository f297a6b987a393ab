"""Random velocity fields and appearance transfer, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

_QUANTILES = np.linspace(0, 1, 33)
# Quantiles of large patches are those of about this many voxels, evenly taken from them.
_COMPARED_VOXELS = 2**16
# Voxels that are changed at a time: as many as a processor's cache holds.
_TOGETHER = 2**16


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
    field = torch.zeros((3, *grid))
    for axis in range(3):
        if atlas_shape[axis] == 1:
            continue
        noise = torch.from_numpy(rng.standard_normal(tuple(grid)).astype(np.float32))
        smooth = gaussian_smooth(noise, sigma, mode="nearest")
        deviation, mean = torch.std_mean(smooth, correction=0)
        if deviation > 0:
            field[axis] = (smooth - mean) * (magnitude / deviation)
    return field


def gaussian_smooth(volume: Tensor, sigma: Sequence[float], *, mode: str) -> Tensor:
    """`scipy.ndimage.gaussian_filter` as one product with a matrix for each axis, several times faster in float32.

    Args:
        volume: (X, Y, Z) float32.
        sigma: Standard deviation along each axis, voxels.
        mode: How the volume continues beyond its border, as in scipy.

    Returns:
        (X, Y, Z) float32.
    """
    matrices = [_gaussian_matrix(size, float(width), mode) for size, width in zip(volume.shape, sigma, strict=True)]
    along_y_and_z = matrices[1] @ (volume @ matrices[2].T)
    return (matrices[0] @ along_y_and_z.flatten(1)).view_as(volume)


@lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, mode: str) -> Tensor:
    """The Gaussian filter along an axis of ``size`` voxels, (size, size) float32."""
    return torch.from_numpy(gaussian_filter1d(np.eye(size), sigma, axis=0, mode=mode).astype(np.float32))


def match_quantiles(image: Tensor, reference: Tensor, mask: Tensor, *, share: float = 1.0) -> Tensor:
    """Maps intensities so that their distribution inside a mask becomes the reference's, channel by channel.

    The map is monotone and piecewise linear between 33 quantiles; values beyond the outermost quantiles keep their
    distance to them. Quantiles of large patches are estimated from a part of their voxels; the smallest and the largest
    value are those of all.

    Args:
        image: (C, *patch).
        reference: (C, *patch).
        mask: (*patch) bool, voxels that are compared and changed.
        share: 0 keeps the intensities, 1 maps them wholly.

    Returns:
        (C, *patch), a copy; equal to ``image`` if the mask has fewer voxels than there are quantiles.
    """
    result = image.clone()
    if int(mask.sum()) < len(_QUANTILES):
        return result
    whole = bool(mask.all())
    for channel, others in zip(result, reference, strict=True):
        if whole:
            # Indexing by a mask copies.
            _match(channel.flatten(), others.flatten(), share)
        else:
            inside = channel[mask]
            _match(inside, others[mask], share)
            channel[mask] = inside
    return result


def _match(values: Tensor, reference: Tensor, share: float) -> None:
    """Applies the map of `match_quantiles` to values (N,), in place."""
    source, first = np.unique(_quantiles(values), return_index=True)
    target = (1 - share) * source + share * _quantiles(reference)[first]
    # Beyond the outermost quantiles the slope is 1.
    slopes = np.concatenate([[1], np.diff(target) / np.diff(source), [1]])
    begins = [0, *range(len(source))]
    start, end, slope = (torch.from_numpy(table).float() for table in (source[begins], target[begins], slopes))
    bounds = torch.from_numpy(source).float()
    for some in values.split(_TOGETHER):
        part = torch.bucketize(some, bounds, out_int32=True)
        some.sub_(start.index_select(0, part)).mul_(slope.index_select(0, part)).add_(end.index_select(0, part))


def _quantiles(values: Tensor) -> np.ndarray:
    """33 quantiles of (N,) values, float64."""
    # Odd, so that the voxels of a patch with even edges do not all come from the same planes.
    step = (len(values) // _COMPARED_VOXELS) | 1
    found = np.quantile(values[::step].numpy(), _QUANTILES).astype(np.float64)
    found[[0, -1]] = [float(end) for end in values.aminmax()]
    return found


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
    sigma = [smoothness] * mask.ndim
    difference = reference - image
    if mask.all():
        return torch.stack([gaussian_smooth(channel, sigma, mode="reflect") for channel in difference])
    weight = mask.float()
    norm = gaussian_smooth(weight, sigma, mode="reflect").clamp_min(1e-3)
    share = weight / norm
    return torch.stack([gaussian_smooth(channel * weight, sigma, mode="reflect") * share for channel in difference])


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
    image = match_quantiles(image, reference, mask, share=global_share)
    difference = local_appearance_difference(image, reference, mask, smoothness=smoothness)
    return image.add_(difference, alpha=local_share)
