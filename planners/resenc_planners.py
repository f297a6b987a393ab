"""nnU-Net's residual encoder presets for one-shot training."""

from __future__ import annotations

from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

from nnunet_oneshot.planners.oneshot_planner import OneShotPlannerMixin


class OneShotResEncMPlanner(OneShotPlannerMixin, nnUNetPlannerResEncM):
    """Residual encoder U-Net, for GPUs of 9 to 11 GB; see `OneShotPlannerMixin` for its arguments."""

    default_plans_name = "nnUNetOneShotResEncUNetMPlans"
    default_memory_target = 8


class OneShotResEncLPlanner(OneShotPlannerMixin, nnUNetPlannerResEncL):
    """Residual encoder U-Net, for GPUs of 24 GB; see `OneShotPlannerMixin` for its arguments."""

    default_plans_name = "nnUNetOneShotResEncUNetLPlans"
    default_memory_target = 24


class OneShotResEncXLPlanner(OneShotPlannerMixin, nnUNetPlannerResEncXL):
    """Residual encoder U-Net, for GPUs of 40 GB; see `OneShotPlannerMixin` for its arguments."""

    default_plans_name = "nnUNetOneShotResEncUNetXLPlans"
    default_memory_target = 40
