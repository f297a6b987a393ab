"""What all planners share, and the planner on nnU-Net's default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_oneshot.config import BLOCK, OneShotConfig
from nnunet_oneshot.data.fingerprint import fingerprint_standing_in, load_fingerprint, remove_copy
from nnunet_oneshot.data.plans import FOR_OUR_TRAINERS, NOTE
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.io import load_json_checked, save_json_atomic

# Student and teacher have one topology, and activations dominate memory: each gets half. Those of only one are
# held at a time, which leaves room for the features that the hint compares.
NETWORKS = 2


class OneShotPlannerMixin(ExperimentPlanner):
    """Turns one of nnU-Net's planners into one for one-shot training; to be listed before it among the bases.

    The planner reads the fingerprint in which no label but the atlases' is counted, divides its memory target among
    student and teacher, copes with cases without label, and adds the ``oneshot`` block to the plans.

    Args:
        dataset_name_or_id: Data set.
        gpu_memory_target_in_gb: Memory that the whole training may take, in GB; None is the planner's default.
        preprocessor_name: Stored in the plans.
        plans_name: Name of the plans; None is the planner's default.
        overwrite_target_spacing: Spacing (mm) of the full resolution, one number an axis, instead of the median.
        suppress_transpose: Keep the order of the axes.

    Attributes:
        default_plans_name: Name of the plans.
        default_memory_target: GB.
    """

    default_plans_name: ClassVar[str]
    default_memory_target: ClassVar[float]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        self.dataset_name = maybe_convert_to_dataset_name(dataset_name_or_id)
        fingerprint = load_fingerprint(self.dataset_folder)
        remove_copy(self.dataset_folder)
        with fingerprint_standing_in(default_experiment_planner, self.dataset_folder):
            super().__init__(
                dataset_name_or_id,
                self.default_memory_target if gpu_memory_target_in_gb is None else gpu_memory_target_in_gb,
                preprocessor_name,
                plans_name or self.default_plans_name,
                overwrite_target_spacing,
                suppress_transpose,
            )
        self.dataset_fingerprint = fingerprint
        self.UNet_vram_target_GB /= NETWORKS

    def determine_reader_writer(self) -> type:
        """nnU-Net's reader for the first image; hidden files, which nnU-Net would try too, are no images."""
        return RawDataset(self.raw_dataset_folder).reader_class

    @property
    def dataset_folder(self) -> Path:
        """``nnUNet_preprocessed/DatasetXXX_Name``."""
        return Path(nnUNet_preprocessed) / self.dataset_name

    @property
    def plans_file(self) -> Path:
        """The plans that this planner writes."""
        return self.dataset_folder / f"{self.plans_identifier}.json"

    @property
    def dataset_json(self) -> dict[str, Any]:
        """Content of ``dataset.json``, completed with what nnU-Net's planners take for granted."""
        return self._dataset_json

    @dataset_json.setter
    def dataset_json(self, content: dict[str, Any]) -> None:
        raw = RawDataset(self.raw_dataset_folder)
        self._dataset_json = {**content, "numTraining": len(raw.cases)}
        if "dataset" in content:
            # The name of a label need not be that of a file: planners only join it to a folder.
            self._dataset_json["dataset"] = {
                case: {"images": raw.images(case), "label": raw.label(case) or f"labelsTr/{case}{raw.file_ending}"}
                for case in raw.cases
            }

    @staticmethod
    def static_estimate_VRAM_usage(  # noqa: N802  (nnU-Net's name)
        patch_size: tuple[int, ...],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: tuple[str, ...],
    ) -> int:
        """Number of values in all feature maps of the network.

        nnU-Net's own version sets torch's threads to the number of augmentation processes, which may be 0.
        """
        network = get_network_from_plans(
            arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
        )
        return network.compute_conv_feature_map_size(patch_size)

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Name of the folder of preprocessed data; never shared with nnU-Net's planners, whose fingerprint differs."""
        return f"{self.plans_identifier}_{configuration_name}"

    def default_config(self) -> OneShotConfig:
        """The ``oneshot`` block of new plans."""
        return OneShotConfig()

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Writes the plans with the ``oneshot`` block; custom configurations and an existing block are kept.

        Raises:
            OneShotError: The existing plans or their block are damaged, or the folder cannot be written.
        """
        from nnunetv2.utilities.json_export import recursive_fix_for_json_export

        recursive_fix_for_json_export(plans)
        plans[BLOCK] = self.default_config().to_dict()
        plans[NOTE] = FOR_OUR_TRAINERS
        if self.plans_file.is_file():
            previous = load_json_checked(self.plans_file, "the plans file")
            plans["configurations"] = {**previous.get("configurations", {}), **plans["configurations"]}
            if BLOCK in previous:
                OneShotConfig.from_plans(previous)
                if previous[BLOCK] != plans[BLOCK]:
                    plans[BLOCK] = previous[BLOCK]
                    self.kept_block = True
        save_json_atomic(plans, self.plans_file)

    kept_block = False


class OneShotPlanner(OneShotPlannerMixin, ExperimentPlanner):
    """nnU-Net's default planner (plain U-Net) for one-shot training; see `OneShotPlannerMixin` for its arguments."""

    default_plans_name = "nnUNetOneShotPlans"
    default_memory_target = 8
