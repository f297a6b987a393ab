"""The trainer on which all others rest: nnU-Net's, with the stages of a cascade linked fold by fold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.previous_stage import NEXT_STAGE, PreviousStage
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.inference import build_predictor, predict_for_next_stage


class CascadeTrainer(nnUNetTrainer):
    """Writes and finds the segmentations that a first stage leaves to the second in the folder of the fold.

    nnU-Net has each fold segment its validation cases, so that five folds together segment all. One-shot training needs
    those of its training cases, none of whose labels but the atlases' it learns from. Each fold keeps its own, since
    the models of other folds may have learned from labels of its validation cases.
    """

    # nnU-Net's.
    folder_with_segs_from_previous_stage: Any

    def link_stages(self) -> None:
        """Replaces nnU-Net's own places; to be called once its constructor has run."""
        if self.is_cascaded:
            first = Path(self.folder_with_segs_from_previous_stage).parents[1] / f"fold_{self.fold}"
            self.folder_with_segs_from_previous_stage = str(first / NEXT_STAGE / self.configuration_name)
        self.configuration_manager.configuration.pop("next_stage", None)

    @property
    def previous_stage(self) -> PreviousStage | None:
        """What the first stage, trained by the same trainer on the same fold, left; None if this is no second stage."""
        if not self.is_cascaded:
            return None
        plans, first = self.plans_manager, self.configuration_manager.previous_stage_name
        command = f"nnUNetv2_train {plans.dataset_name} {first} {self.fold} -tr {type(self).__name__}"
        return PreviousStage(Path(self.folder_with_segs_from_previous_stage), f"{command} -p {plans.plans_name}")

    @property
    def coarseness(self) -> tuple[float, ...]:
        """Size of a voxel of the first stage along three axes, in voxels of the second; empty if this is none."""
        if not self.is_cascaded:
            return ()
        first = self.plans_manager.get_configuration(self.configuration_manager.previous_stage_name).spacing
        second = self.configuration_manager.spacing
        # The spacing of slices has two edges, those of their last axes.
        shared = min(len(first), len(second))
        ratios = np.maximum(1.0, np.divide(first[-shared:], second[-shared:]))
        return (*[1.0] * (3 - shared), *ratios.tolist())

    def segment_for_next_stages(self, prepared: PreparedDataset, cases: Sequence[str]) -> None:
        """Segments cases for the configurations of the plans that name this one as their previous stage.

        Args:
            prepared: What this trainer segments.
            cases: All cases of the fold.
        """
        plans = self.plans_manager
        for name in plans.available_configurations:
            if plans.get_configuration(name).previous_stage_name != self.configuration_name:
                continue
            following = replace(prepared, configuration=name, previous=None)
            try:
                following.check()
            except OneShotError as error:
                self.print_to_log_file(
                    f"Nothing is segmented for configuration {name}, of which this is the previous stage. {error} Then "
                    f"repeat the validation of this stage with --val."
                )
                continue
            folder = Path(self.output_folder, NEXT_STAGE, name)
            self.print_to_log_file(f"Segmenting {len(cases)} cases for configuration {name}; results go to {folder}.")
            self.set_deep_supervision_enabled(False)
            axes = self.inference_allowed_mirroring_axes
            network = self.network.module if self.is_ddp else self.network
            predictor = build_predictor(network, prepared, mirror_axes=axes, device=self.device)
            predict_for_next_stage(predictor, prepared, following, cases, folder)
            self.set_deep_supervision_enabled(self.enable_deep_supervision)
