"""A baseline: nnU-Net trained on the atlas alone."""

from __future__ import annotations

from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_oneshot.trainers.base import OneShotTrainer


class OneShotAtlasTrainer(OneShotTrainer):
    """nnU-Net's own training with the labelled case as its only training case; unlabelled images are not used.

    Progress is measured on the atlas itself, so that no validation label is read. Mirroring is also nnU-Net's own,
    unless the plans list axes: the default of the other trainers depends on unlabelled images.
    """

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        if self.config.mirror_axes == "auto":
            return nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(self)
        return super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()

    @property
    def labelled_cases(self) -> list[str]:
        """The cases that are trained on with their own labels."""
        return list(self.roles.atlases)

    def build_loaders(self, training, validation, initial_patch_size, seeds) -> tuple:
        self.print_to_log_file("Progress, and the pseudo Dice, is measured on the cases that are trained on.")
        patch_size = self.configuration_manager.patch_size
        for case in self.labelled_cases:
            # nnU-Net's loader, which reads them later, does not tell which file is damaged.
            self.prepared.image(case), self.prepared.segmentation(case), self.prepared.properties(case)

        def build(size, transforms) -> nnUNetDataLoader:
            return nnUNetDataLoader(
                self.dataset_class(
                    self.preprocessed_dataset_folder,
                    self.labelled_cases,
                    folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
                ),
                self.batch_size,
                size,
                patch_size,
                self.label_manager,
                oversample_foreground_percent=self.oversample_foreground_percent,
                probabilistic_oversampling=self.probabilistic_oversampling,
                transforms=transforms,
            )

        return build(initial_patch_size, training), build(patch_size, validation)
