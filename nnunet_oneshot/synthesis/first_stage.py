"""What the first stage of a cascade might see in a synthetic patch, which it has never segmented."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_oneshot.registration.pair.warp import sample_labels

# Range of the standard deviation of a border's displacement, and the distance over which it changes; in voxels of the
# first stage. What it leaves agrees with the label about as well as one-shot students do. nnU-Net's own corruptions,
# which come on top, change few labels.
_DISPLACEMENT = (0.5, 1.5)
_DISTANCE = 4.0


def roughened(seg: Tensor, coarseness: Sequence[float]) -> Tensor:
    """A label map as inexact as a segmentation at the first stage's resolution: smoothly displaced at random.

    A student that were shown the exact label would learn to copy it.

    Args:
        seg: (1, *patch) int16, three axes.
        coarseness: Size of a voxel of the first stage along each axis, in voxels of the patch.

    Returns:
        (1, *patch) int16; what is moved in from outside of the patch continues its border.
    """
    shape = seg.shape[1:]
    nodes = [max(2, round(size / (_DISTANCE * step)) + 1) for size, step in zip(shape, coarseness, strict=True)]
    noise = torch.from_numpy(np.random.standard_normal((1, 3, *nodes)).astype(np.float32))
    scale = np.random.uniform(*_DISPLACEMENT) * torch.tensor(coarseness, dtype=torch.float32)
    field = interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=True)[0] * scale.view(3, 1, 1, 1)
    voxels = torch.stack(torch.meshgrid(*[torch.arange(size, dtype=torch.float32) for size in shape], indexing="ij"))
    return sample_labels(seg, voxels + field)
