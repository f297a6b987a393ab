"""The trainer for warped atlases: registers them and trains nnU-Net on patches made from the registrations."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

import torch
from nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam import nnUNetTrainerAdam
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_oneshot.data.parallel import default_processes
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset.cache import GuidedRegistrations, RegistrationCache
from nnunet_oneshot.registration.dataset.ratings import RATINGS_FILE, rejected_pairs
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar
from nnunet_oneshot.synthesis.data_loader import OneShotDataLoader, PatchSettings, build_oneshot_loader
from nnunet_oneshot.trainers.adjusting import AdjustingTrainer
from nnunet_oneshot.trainers.base import CUDA


class WarpingTrainer(AdjustingTrainer):
    """Trains on patches of the atlas warped to unlabelled cases; progress is measured on such patches too.

    `real_share` is the probability that the image for the warped label is the unlabelled case itself instead of the
    warped atlas: 0 always uses the warped atlas, 1 always the unlabelled case.
    """

    real_share: float
    # Pairs (atlas, case) that are rated bad.
    rejected: Collection[tuple[str, str]] = ()

    # With few foreground voxels and batches of two, nnU-Net's stochastic gradient descent often finds no foreground in
    # its first hundreds of iterations. The optimiser used here, that of nnUNetTrainerAdam1en3, finds it at once.
    configure_optimizers = nnUNetTrainerAdam.configure_optimizers

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.config.initial_lr

    def build_loaders(self, training, validation, initial_patch_size, seeds) -> tuple:
        self.roles.require_unlabelled()
        self._check_guide()
        cases = sorted({*self.roles.unlabelled, *self.roles.progress})
        registrations = self.ranks.once(lambda: self.registrar.register(cases, fold=self.fold))
        self._leave_out_rejected(registrations)
        settings = PatchSettings(
            batch_size=self.batch_size,
            initial_patch_size=self.configuration_manager.patch_size,
            patch_size=self.configuration_manager.patch_size,
            transforms=validation,
            synthesis=self.config.synthesis,
            real_share=0.0,
            augment=False,
            oversample_foreground_percent=self.oversample_foreground_percent,
            masked=self.configuration_manager.use_mask_for_norm,
            coarseness=self.coarseness,
        )
        build = partial(build_oneshot_loader, self.prepared, atlases=self.roles.atlases, rejected=self.rejected)
        progress = build(registrations, cases=self.roles.progress, settings=settings, seed=seeds[1])
        training_registrations, real_cases = self.training_registrations(registrations, progress)
        settings = replace(
            settings,
            initial_patch_size=initial_patch_size,
            transforms=training,
            real_share=self.real_share,
            augment=True,
        )
        patches = build(
            training_registrations,
            cases=self.roles.unlabelled,
            settings=settings,
            seed=seeds[0],
            real_cases=real_cases,
        )
        return patches, progress

    def training_registrations(
        self, registrations: RegistrationCache, progress: OneShotDataLoader
    ) -> tuple[RegistrationCache | GuidedRegistrations, Sequence[str] | None]:
        """The registrations from which training patches are made, and the cases that are shown as they are.

        Args:
            registrations: Registrations of the dataset.
            progress: Loader of the patches on which progress is measured.

        Returns:
            Registrations of all unlabelled cases, and names of cases or None for all.
        """
        return registrations, None

    def usable(self, cases: Sequence[str]) -> list[str]:
        """Those of the cases to which the registration of an atlas is not rated bad."""
        atlases = self.roles.atlases
        return [case for case in cases if any(a != case and (a, case) not in self.rejected for a in atlases)]

    @property
    def registrar(self) -> DatasetRegistrar:
        """Registers the atlases of the fold."""
        return DatasetRegistrar(
            self.prepared,
            self.config,
            self.roles.atlases,
            self.device,
            self.print_to_log_file,
            # As many as make patches later, which do not run yet.
            num_processes=min(default_processes(), max(1, get_allowed_n_proc_DA())),
        )

    def _leave_out_rejected(self, registrations: RegistrationCache) -> None:
        """Finds what is rated bad, and other progress cases where none of those is left.

        Raises:
            OneShotError: No registration is left to train with.
        """
        cases = sorted({*self.roles.unlabelled, *self.roles.progress})
        pairs = [(atlas, case) for atlas in self.roles.atlases for case in cases if atlas != case]
        self.rejected = rejected_pairs(self.prepared.kept, registrations, pairs, self.print_to_log_file)
        if not self.rejected:
            return
        unlabelled = self.usable(self.roles.unlabelled)
        if not unlabelled:
            raise OneShotError(
                f"All {len(self.roles.unlabelled)} training cases of fold {self.fold} have registrations that are "
                f"rated bad in {self.prepared.kept / RATINGS_FILE}, so that there is nothing to make patches from. "
                f"Change ratings, register with other settings or another atlas, or delete the file."
            )
        if not self.usable(self.roles.progress):
            self.print_to_log_file("No progress case is left: progress is watched on training cases.")
            progress = tuple(unlabelled[: max(1, self.config.progress_cases)])
            self._roles = replace(self.roles, progress=progress, held_out=False)

    def _check_guide(self) -> None:
        """Rejects a guide that this training would overwrite."""
        guide = self.config.registration.guide
        if guide is not None and os.path.realpath(os.path.expanduser(guide)) == os.path.realpath(
            self.output_folder_base
        ):
            raise OneShotError(
                f"The guide {guide} is the folder that this training writes to: give another folder in nnUNet_results "
                f"for this training, or copy the model and name the copy as the guide."
            )
