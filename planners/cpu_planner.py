"""A planner for training on a few processor cores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.planners.oneshot_planner import OneShotPlanner

_MAX_PATCH_VOXELS = 100_000
_MAX_BATCH_2D = 12
_FEW_CLASSES = 8


class OneShotCPUPlanner(OneShotPlanner):
    """Small patches and batches and few features, so that an iteration takes about a second on two cores.

    Patches hold at most 100,000 voxels; batches hold two patches in 3D, and in 2D up to twelve within the same number
    of voxels; networks have 8 to 64 features, and 16 to 128 for more than 7 foreground labels. Registration runs on at
    most 600,000 voxels. The students start with learning rate 0.003. The memory target has no effect. The target
    spacing grows until a patch covers a quarter of the median image, the share below which nnU-Net adds a low
    resolution: of large images, a short training at full resolution learns little.
    """

    default_plans_name = "nnUNetOneShotCPUPlans"
    least_share = 0.25

    def __init__(self, dataset_name_or_id: str | int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset_name_or_id, *args, **kwargs)
        # The head of the full resolution separates all labels by the features of one voxel.
        self.UNet_base_num_features = 8 if len(self.dataset_json["labels"]) <= _FEW_CLASSES else 16
        self.UNet_max_features_2d = self.UNet_max_features_3d = 8 * self.UNet_base_num_features

    def default_config(self) -> OneShotConfig:
        """The ``oneshot`` block with a registration grid that two cores can handle, and larger steps."""
        config = super().default_config()
        registration = dataclasses.replace(config.registration, max_voxels=600_000)
        # Networks with fewer features bear, and in short trainings need, larger steps.
        return dataclasses.replace(config, initial_lr=3e-3, registration=registration)

    def limited_configuration(self, spacing: np.ndarray, median_shape: np.ndarray, *others: Any) -> dict[str, Any]:
        """nnU-Net's configuration for images no larger than the largest patch allowed here."""
        dimensions = len(spacing)
        limit = np.asarray(median_shape, float)[:dimensions]
        kept = self._least_patch(spacing)
        # Shrinking by arithmetic first spares building a network for every step.
        while np.prod(limit) > _MAX_PATCH_VOXELS:
            limit = _shrink(limit, spacing, kept)
        while True:
            plan = super().limited_configuration(spacing, limit, *others)
            voxels = int(np.prod(plan["patch_size"]))
            if voxels <= _MAX_PATCH_VOXELS:
                break
            limit = _shrink(limit, spacing, kept)
        plan["median_image_size_in_voxels"] = median_shape
        plan["batch_size"] = 2 if dimensions == 3 else int(np.clip(2 * _MAX_PATCH_VOXELS // voxels, 2, _MAX_BATCH_2D))
        return plan

    def _least_patch(self, spacing: np.ndarray) -> np.ndarray:
        """Edges below which a 3D patch would not cover a row of structures that look alike, voxels; 4 without one."""
        extent = self.row_extent
        if extent is None or len(spacing) < 3:
            return np.full(len(spacing), 4.0)
        return np.maximum(4.0, extent / spacing)


def _shrink(shape: np.ndarray, spacing: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Takes one tenth off the axis that is longest in millimetres, of those that stay above ``kept`` if there are any.

    No axis falls below four voxels.
    """
    shape = shape.copy()
    free = 0.9 * shape >= kept
    axis = int(np.argmax(np.where((free if free.any() else True) & (shape > 4), shape * spacing, 0)))
    shape[axis] = max(4.0, shape[axis] * 0.9)
    return shape
