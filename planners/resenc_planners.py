"""nnU-Net's residual encoder presets for one-shot training."""

from __future__ import annotations

from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)

from nnunet_oneshot.planners.oneshot_planner import OneShotPlannerMixin


class OneShotResEncMPlanner(OneShotPlannerMixin, nnUNetPlannerResEncM):
    """Residual encoder U-Net, for GPUs of 9 to 11 GB. Arguments as for `OneShotPlanner`."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetOneShotResEncUNetMPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )


class OneShotResEncLPlanner(OneShotPlannerMixin, nnUNetPlannerResEncL):
    """Residual encoder U-Net, for GPUs of 24 GB. Arguments as for `OneShotPlanner`."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 24,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetOneShotResEncUNetLPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )


class OneShotResEncXLPlanner(OneShotPlannerMixin, nnUNetPlannerResEncXL):
    """Residual encoder U-Net, for GPUs of 40 GB. Arguments as for `OneShotPlanner`."""

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 40,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "nnUNetOneShotResEncUNetXLPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
