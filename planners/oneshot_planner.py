"""What all planners share, and the planner on nnU-Net's default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_oneshot.config import BLOCK, OneShotConfig
from nnunet_oneshot.data.fingerprint import fingerprint_standing_in, load_fingerprint, remove_copy
from nnunet_oneshot.data.plans import FOR_OUR_TRAINERS, NOTE, check_plans
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.io import load_json_checked, save_json_atomic

# Student and teacher have one topology, and activations dominate memory: each gets half. Those of only one are
# held at a time, which leaves room for the features that the hint compares.
NETWORKS = 2
# A patch covers a row of structures that look alike with this much to spare, for longer bodies than the atlas's.
_SPARE = 1.1
# The target spacing grows in steps of this factor, until an image has at most so many times fewer voxels.
_COARSER, _COARSEST = 1.05, 27.0
_MUCH_COARSER = 2.0
# Axes with more than so many times finer voxels than the coarsest grow first, as in nnU-Net's low resolution.
_ANISOTROPIC = 2.0
_FULLRES, _CASCADE = "3d_fullres", "3d_cascade_fullres"


class OneShotPlannerMixin(ExperimentPlanner):
    """Turns one of nnU-Net's planners into one for one-shot training; to be listed before it among the bases.

    The planner reads the fingerprint in which no label but the atlases' is counted, divides its memory target among
    student and teacher, copes with cases without label, and adds the ``oneshot`` block to the plans. Where the atlas
    shows a row of structures that look alike, such as vertebrae, and the patch of the 3D full resolution does not cover
    it, the target spacing of 3D grows until it does: a network that sees part of the row cannot tell which part. It
    also grows until a patch covers ``least_share`` of an image, if that makes images much smaller. nnU-Net's own target
    spacing is then that of a cascade, whose first stage is this 3D full resolution with its wide view.

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
        least_share: Share of the median image that a 3D patch covers at least; 0 leaves it to nnU-Net.
        kept_block: Whether the existing plans' ``oneshot`` block was kept.
        notes: What was planned otherwise than nnU-Net would, and why; sentences for the user.
    """

    default_plans_name: ClassVar[str]
    default_memory_target: ClassVar[float]
    least_share: ClassVar[float] = 0.0

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
        self.kept_block = False
        self.notes: list[str] = []
        self._coarsening = np.ones(3)
        self._second_stage: dict[str, Any] | None = None

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

    @property
    def row_extent(self) -> np.ndarray | None:
        """Box that a patch must cover to show a whole row of structures that look alike, 3 edges in mm, as planned."""
        row = self.dataset_fingerprint["oneshot"].get("row")
        if row is None:
            return None
        return _SPARE * np.asarray(row["extent"], float)[self.determine_transpose()[0]]

    def plan_experiment(self) -> dict[str, Any]:
        self._widen_view()
        return super().plan_experiment()

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """nnU-Net's, larger where a patch would show too little."""
        return self._coarsening * np.asarray(super().determine_fullres_target_spacing(), float)

    def _widen_view(self) -> None:
        """Makes the target spacing of volumes coarser until a patch shows enough."""
        is_flat = all(shape[0] == 1 for shape in self.dataset_fingerprint["shapes_after_crop"])
        asks_for_nothing = self.row_extent is None and self.least_share == 0
        if self.overwrite_target_spacing is not None or is_flat or asks_for_nothing:
            return
        spacing = self.determine_fullres_target_spacing()
        known: dict = {}
        first = plan = self._plan_3d(spacing, known)
        grown = spacing.copy()
        while np.prod(grown / spacing) < _COARSEST and not (self._covers_row(plan) and self._covers_share(plan)):
            finer = grown.max() / grown > _ANISOTROPIC
            grown[finer if finer.any() else slice(None)] *= _COARSER
            plan = self._plan_3d(grown, known)
        fewer = float(np.prod(grown / spacing))
        # nnU-Net drops its low resolution too where it has more than half as many voxels.
        if fewer == 1 or (self._covers_row(first) and fewer < _MUCH_COARSER):
            return
        self._coarsening = grown / spacing
        self._second_stage = first
        before, after = ([int(edge) for edge in one["patch_size"]] for one in (first, plan))
        coarser, finer = (np.round(edges, 2).tolist() for edges in (grown, spacing))
        if self._covers_row(first):
            reason = (
                f"a patch of {before} voxels shows less than {self.least_share:.0%} of an image, too little to learn "
                f"from in a short training"
            )
        else:
            labels = ", ".join(map(str, self.dataset_fingerprint["oneshot"]["row"]["labels"]))
            reason = (
                f"labels {labels} of the atlas look alike, and a patch of {before} voxels does not show all of them, "
                f"so that a network could not tell them apart"
            )
        self.notes.append(
            f"the 3D target spacing is {coarser} mm with patches of {after} voxels instead of {finer} mm, since "
            f"{reason}. -overwrite_target_spacing sets another, and {_CASCADE} keeps {finer} mm."
        )

    def _plan_3d(self, spacing: np.ndarray, known: dict) -> dict[str, Any]:
        """The configuration of the full resolution with a target spacing (mm), in the order of the files' axes.

        What networks cost is kept in ``known``.
        """
        geometry = zip(self.dataset_fingerprint["spacings"], self.dataset_fingerprint["shapes_after_crop"], strict=True)
        shapes = [compute_new_shape(shape, old, spacing) for old, shape in geometry]
        order = self.determine_transpose()[0]
        median = np.median(shapes, 0)[order]
        voxels = float(np.prod(median)) * self.dataset_json["numTraining"]
        return self.limited_configuration(spacing[order], median, "", voxels, known)

    def _covers_row(self, plan: dict[str, Any]) -> bool:
        """Whether the patch of a 3D configuration shows the whole row, or the whole of the median image."""
        extent = self.row_extent
        if extent is None:
            return True
        spacing, image = np.asarray(plan["spacing"]), np.asarray(plan["median_image_size_in_voxels"], float)
        wanted = np.minimum(extent, image * spacing)
        return bool((np.asarray(plan["patch_size"]) * spacing >= wanted - 1e-6).all())

    def _covers_share(self, plan: dict[str, Any]) -> bool:
        voxels, patch = (np.prod(plan[name], dtype=float) for name in ("median_image_size_in_voxels", "patch_size"))
        return bool(patch >= self.least_share * voxels)

    def get_plans_for_configuration(
        self,
        spacing: np.ndarray | tuple[float, ...] | list[float],
        median_shape: np.ndarray | tuple[int, ...],
        *others: Any,
    ) -> dict[str, Any]:
        """nnU-Net's configuration, by its arguments; slices keep their resolution where that of volumes is coarser."""
        if len(spacing) == 2 and (self._coarsening > 1).any():
            coarsening = self._coarsening[self.determine_transpose()[0]][1:]
            spacing = np.asarray(spacing) / coarsening
            median_shape = np.round(np.asarray(median_shape) * coarsening)
        return self.limited_configuration(np.asarray(spacing), np.asarray(median_shape), *others)

    def limited_configuration(self, spacing: np.ndarray, median_shape: np.ndarray, *others: Any) -> dict[str, Any]:
        """A configuration within the limits of the planner, here nnU-Net's; arguments as above."""
        return super().get_plans_for_configuration(spacing, median_shape, *others)

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

        if self._second_stage is not None:
            self._add_second_stage(plans["configurations"], self._second_stage)
        recursive_fix_for_json_export(plans)
        plans[BLOCK] = self.default_config().to_dict()
        plans[NOTE] = FOR_OUR_TRAINERS
        if self.plans_file.is_file():
            previous = check_plans(load_json_checked(self.plans_file, "the plans file", dict), self.plans_file)
            plans["configurations"] = {**previous["configurations"], **plans["configurations"]}
            if BLOCK in previous:
                OneShotConfig.from_plans(previous)
                if previous[BLOCK] != plans[BLOCK]:
                    plans[BLOCK] = previous[BLOCK]
                    self.kept_block = True
        save_json_atomic(plans, self.plans_file)

    def _add_second_stage(self, configurations: dict[str, Any], plan: dict[str, Any]) -> None:
        """Makes a configuration the second stage of the wide view, instead of one that nnU-Net planned for its own."""
        configurations.get("3d_lowres", {}).pop("next_stage", None)
        configurations[_CASCADE] = {
            **plan,
            "data_identifier": self.generate_data_identifier(_CASCADE),
            "batch_dice": True,
            "previous_stage": _FULLRES,
        }


class OneShotPlanner(OneShotPlannerMixin, ExperimentPlanner):
    """nnU-Net's default planner (plain U-Net) for one-shot training; see `OneShotPlannerMixin` for its arguments."""

    default_plans_name = "nnUNetOneShotPlans"
    default_memory_target = 8
