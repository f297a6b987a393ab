"""nnU-Net's spatial augmentation as coordinates, so that atlas and real image are each resampled only once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from torch import Tensor

from nnunet_oneshot.registration.pair.functional import identity_grid


def split_spatial(transforms: BasicTransform) -> tuple[SpatialTransform | None, ComposeTransforms]:
    """Takes nnU-Net's spatial transform out of a pipeline.

    Args:
        transforms: Result of ``get_training_transforms`` or ``get_validation_transforms`` of an nnU-Net trainer.

    Returns:
        The spatial transform or None, and the pipeline without it. The pair of conversions around it, with which
        nnU-Net augments anisotropic patches slice-wise, is removed too.
    """
    steps = list(transforms.transforms)
    index = next((i for i, step in enumerate(steps) if isinstance(step, SpatialTransform)), None)
    if index is None:
        return None, ComposeTransforms(steps)
    spatial = steps.pop(index)
    if index < len(steps) and isinstance(steps[index], Convert2DTo3DTransform):
        steps.pop(index)
        if index > 0 and isinstance(steps[index - 1], Convert3DTo2DTransform):
            steps.pop(index - 1)
    return spatial, ComposeTransforms(steps)


def patch_coordinates(
    corner: Sequence[int], initial_shape: Sequence[int], patch_shape: Sequence[int], spatial: SpatialTransform | None
) -> Tensor:
    """Voxel coordinates of a patch after random rotation and scaling.

    Args:
        corner: Lowest voxel of the initial patch, from which nnU-Net would cut the final patch; 3 axes.
        initial_shape: Shape of the initial patch.
        patch_shape: Shape of the final patch.
        spatial: Draws the augmentation, in 3D or in the last two axes; None leaves the patch unchanged.

    Returns:
        (3, *patch_shape); whole numbers if nothing is augmented.
    """
    plain = [c + i // 2 - p // 2 for c, i, p in zip(corner, initial_shape, patch_shape, strict=True)]
    points = identity_grid(patch_shape) + torch.tensor(plain, dtype=torch.float32).view(3, 1, 1, 1)
    if spatial is None:
        return points
    dim = len(spatial.patch_size)
    grid = spatial.get_parameters(image=torch.empty((1, *patch_shape[3 - dim :])))["grid"]
    if grid is None:
        return points
    centre = torch.tensor([float(c + (i - 1) / 2) for c, i in zip(corner, initial_shape, strict=True)])
    half = torch.from_numpy(np.array(patch_shape[3 - dim :], dtype=np.float32) / 2)
    offsets = (grid.flip(-1).float() * half).movedim(-1, 0)
    if dim == 2:
        points[1:] = (offsets + centre[1:].view(2, 1, 1))[:, None]
        return points
    return offsets + centre.view(3, 1, 1, 1)
