"""Small blurred copies of volumes, and the case that resembles all others most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_oneshot.intensities import standardised

_EDGE = 24
_BLUR = 1.0


def pool_volume(volume: np.ndarray) -> np.ndarray:
    """Averages a standardised volume over a grid of 24 cells an axis, so that volumes of any shape can be compared.

    Stretching every (cropped) volume to one grid takes the place of aligning size and position.

    Args:
        volume: (C, X, Y, Z); an axis of one voxel (2D images) keeps it.

    Returns:
        (C, 24, 24, 24) float32, 1 instead of 24 on axes of one voxel.
    """
    import torch

    x, y, z = (1 if size == 1 else _EDGE for size in volume.shape[1:])
    tensor = torch.from_numpy(standardised(volume))[None]
    return torch.nn.functional.adaptive_avg_pool3d(tensor, (x, y, z))[0].numpy()


def correlations(volumes: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Normalised cross-correlations of all pairs of blurred volumes.

    Args:
        volumes: Results of `pool_volume`.

    Returns:
        Sorted names, and the symmetric matrix (N, N) in their order.
    """
    matrix = _blurred_rows(volumes)
    return sorted(volumes), matrix @ matrix.T


def find_medoid(candidates: Sequence[str], volumes: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """The candidate with the highest mean normalised cross-correlation to all other volumes.

    Args:
        candidates: Names among those of ``volumes``.
        volumes: Results of `pool_volume`.

    Returns:
        The candidate (the first by name among equals) and its mean correlation.
    """
    names = sorted(volumes)
    matrix = _blurred_rows(volumes)
    # Rounded, so that the choice does not hang on the order in which a BLAS library adds numbers.
    means = np.round((matrix @ (matrix.sum(axis=0)) - 1) / max(len(names) - 1, 1), 6)
    best = max(sorted(candidates), key=lambda name: means[names.index(name)])
    return best, float(means[names.index(best)])


def _blurred_rows(volumes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Each volume as a row of unit length, in order of the names; all channels count the same."""
    from scipy.ndimage import gaussian_filter

    rows = []
    for name in sorted(volumes):
        channels = [gaussian_filter(channel, _BLUR) for channel in volumes[name].astype(np.float64)]
        centred = np.concatenate([(channel - channel.mean()).ravel() / (channel.std() + 1e-8) for channel in channels])
        rows.append(centred / np.sqrt(len(centred)))
    return np.stack(rows)
