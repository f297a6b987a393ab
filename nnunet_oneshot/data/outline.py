"""The outline of an object that masked normalisation has hidden."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

# Of the values inside the object, this percentile stands for what lies outside.
_DARK = 1.0
_NEARLY_ZERO = 1e-2


def empty_space(image: np.ndarray, masked: Sequence[bool]) -> np.ndarray:
    """Where masked normalisation left nothing: 0 in every masked channel, over at least three voxels along every axis.

    Args:
        image: (C, *shape) preprocessed image or a part of it.
        masked: For each channel, whether the values of the nonzero region alone were normalised.

    Returns:
        (*shape) bool; False everywhere where no channel is masked.
    """
    channels = np.flatnonzero(masked)
    if len(channels) == 0:
        return np.zeros(image.shape[1:], bool)
    empty = (np.abs(image[channels]) < _NEARLY_ZERO).all(0)
    block = np.ones([min(3, size) for size in empty.shape])
    # Beyond the border of a part of an image it may go on.
    wide = ndimage.binary_erosion(empty, block, border_value=1)
    return ndimage.binary_dilation(wide, np.ones([3] * empty.ndim)) & empty


def restore_outline(image: np.ndarray, masked: Sequence[bool]) -> np.ndarray:
    """Makes the outside of an object darker than the object again.

    Where most of an image is empty (a brain without its skull), nnU-Net normalises the values of the nonzero region
    alone and leaves 0 elsewhere, which is then the mean of the object: the outline, by which a registration orients
    itself first of all, is gone.

    Args:
        image: (C, *shape) preprocessed image, two or three spatial axes; an axis may have one voxel.
        masked: For each channel, whether the values of the nonzero region alone were normalised (``use_mask_for_norm``
            of the plans).

    Returns:
        A copy in which masked channels have the first percentile of the object's values outside of it. The outside is
        what is nearly 0 in every masked channel and connected to the border, without passages under three voxels. The
        image itself where there is no outside, or nothing else.
    """
    channels = np.flatnonzero(masked)
    if len(channels) == 0:
        return image
    empty = (np.abs(image[channels]) < _NEARLY_ZERO).all(0)
    wide = ndimage.binary_erosion(empty, np.ones([3] * empty.ndim), border_value=1)
    components, _ = ndimage.label(wide)
    faces = [np.take(components, end, axis) for axis in range(wide.ndim) if wide.shape[axis] > 1 for end in (0, -1)]
    touching = np.unique(np.concatenate([face.ravel() for face in faces]))
    reached = np.isin(components, touching[touching > 0])
    outside = ndimage.binary_dilation(reached, np.ones([3] * empty.ndim)) & empty
    if not outside.any() or outside.all():
        return image
    result = image.copy()
    for channel in channels:
        result[channel][outside] = np.percentile(image[channel][~outside], _DARK)
    return result
