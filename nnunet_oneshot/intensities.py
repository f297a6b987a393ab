"""Intensities on one scale, whatever the unit, the offset, the padding and the outliers of an image."""

from __future__ import annotations

import numpy as np

# Percentiles between which the values of an image are taken to lie, and how far others may lie outside them, in
# distances of the two.
_PERCENTILES = (0.5, 99.5)
_MARGIN = 1.0
# Share of the outermost voxels that a constant must fill to be padding.
_PADDED = 0.5
# Values from which the percentiles are taken, evenly spaced.
_SAMPLES = 1_000_000
# Below this share of the largest value, a standard deviation is rounding.
_ROUNDING = 1e-6


def standardised(image: np.ndarray) -> np.ndarray:
    """Channels with mean 0 and standard deviation 1, robust against what lies outside the subject.

    Affine changes of the intensities leave the result as it is. Values beyond the 0.5th and 99.5th percentile by more
    than their distance are clipped; so is a hot voxel. A constant outside (padding such as -3024 in CT) takes no part
    in the percentiles; where it would be clipped it becomes the lower one, the darkest that the subject shows.

    Args:
        image: (C, *shape), finite.

    Returns:
        (C, *shape) float32; 0 for a channel of one value.
    """
    return np.stack([_standardised(np.asarray(channel)) for channel in image])


def _standardised(channel: np.ndarray) -> np.ndarray:
    channel = _without_outliers(channel)
    largest = float(np.abs(channel).max(initial=0.0))
    # Sums of squares neither overflow nor vanish.
    values = channel.astype(np.float64) / largest if largest > 0 else np.zeros(channel.shape)
    spread = float(values.std())
    if spread <= _ROUNDING:
        return np.zeros(channel.shape, np.float32)
    return ((values - values.mean()) / spread).astype(np.float32)


def _without_outliers(channel: np.ndarray) -> np.ndarray:
    padding = _padding(channel)
    sample = channel.reshape(-1)[:: max(1, channel.size // _SAMPLES)].astype(np.float64)
    if padding is not None:
        sample = sample[sample != padding]
    if sample.size == 0:
        return channel
    low, high = np.percentile(sample, _PERCENTILES)
    if not high > low:
        return channel
    lowest, highest = low - _MARGIN * (high - low), high + _MARGIN * (high - low)
    if padding is not None and not lowest <= padding <= highest:
        channel = np.where(channel == padding, low, channel)
    if channel.min() >= lowest and channel.max() <= highest:
        return channel
    return np.clip(channel, lowest, highest)


def _padding(channel: np.ndarray) -> float | None:
    """The constant that fills most of the outermost voxels, or None."""
    faces = [np.take(channel, end, axis).ravel() for axis in range(channel.ndim) for end in (0, -1)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if counts[most] > _PADDED * counts.sum() else None
