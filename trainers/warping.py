"""The trainer of warped atlases: registers them and feeds nnU-Net with patches made from the registrations."""

from __future__ import annotations

import os
from functools import partial

import torch
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.cache import RegistrationCache
from nnunet_oneshot.registration.dataset import register_dataset
from nnunet_oneshot.synthesis.data_loader import OneShotDataLoader, build_oneshot_loader
from nnunet_oneshot.trainers.base import CUDA, OneShotTrainer


class WarpingTrainer(OneShotTrainer):
    """Trains on patches of the atlas, warped to unlabelled cases; progress is judged on such patches too.

    `real_share` says which image goes with the warped label: the warped atlas (0), the unlabelled case itself (1), or
    either with that probability.
    """

    real_share: float

    # nnU-Net's stochastic gradient descent often finds no foreground in its first hundreds of iterations on few
    # voxels of foreground and batches of two; nnUNetTrainerAdam1en3, whose optimiser this is, does at once.
    configure_optimizers = nnUNetTrainerAdam.configure_optimizers

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.config.initial_lr

    def build_loaders(self, training, validation, initial_patch_size, seeds) -> tuple:
        self.roles.require_unlabelled()
        self._check_guide()
        registrations = register_dataset(
            cases=sorted({*self.roles.unlabelled, *self.roles.progress}),
            dataset_json=self.dataset_json,
            fold=self.fold,
            **self.registered,
        )
        patch_size = self.configuration_manager.patch_size
        build = partial(
            build_oneshot_loader,
            dataset_folder=self.preprocessed_dataset_folder,
            dataset_class=self.dataset_class,
            atlases=self.roles.atlases,
            batch_size=self.batch_size,
            patch_size=patch_size,
            label_manager=self.label_manager,
            config=self.config,
            oversample_foreground_percent=self.oversample_foreground_percent,
        )
        progress = build(
            cases=self.roles.progress,
            registrations=registrations,
            initial_patch_size=patch_size,
            transforms=validation,
            real_share=0.0,
            augment=False,
            seed=seeds[1],
        )
        # First, because the share of real patches may depend on it.
        registrations = self.training_registrations(registrations, progress)
        patches = build(
            cases=self.roles.unlabelled,
            registrations=registrations,
            initial_patch_size=initial_patch_size,
            transforms=training,
            real_share=self.real_share,
            augment=True,
            seed=seeds[0],
        )
        return patches, progress

    def training_registrations(
        self, registrations: RegistrationCache, progress: OneShotDataLoader
    ) -> RegistrationCache:
        """The registrations from which training patches are made.

        Args:
            registrations: Those of the dataset.
            progress: Draws the patches on which progress is watched.
        """
        return registrations

    @property
    def registered(self) -> dict:
        """What is registered and how: arguments of the functions that register a dataset."""
        return {
            "plans": self.plans_manager.plans,
            "configuration": self.configuration_name,
            "atlases": self.roles.atlases,
            "preprocessed_dataset_folder_base": self.preprocessed_dataset_folder_base,
            "config": self.config,
            "device": self.device,
            "log": self.print_to_log_file,
        }

    def _check_guide(self) -> None:
        """Refuses a guide that this training would overwrite."""
        guide = self.config.registration.guide
        if guide is not None and os.path.realpath(os.path.expanduser(guide)) == os.path.realpath(
            self.output_folder_base
        ):
            raise OneShotError(
                f"The guide {guide} is the folder that this training writes to: give another folder in nnUNet_results "
                f"for this training, or copy the model and name the copy as the guide."
            )
