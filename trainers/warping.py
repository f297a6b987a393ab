"""The trainer of warped atlases: registers them and feeds nnU-Net with patches made from the registrations."""

from __future__ import annotations

from functools import partial

from nnunet_oneshot.registration.dataset import register_dataset
from nnunet_oneshot.synthesis.data_loader import build_oneshot_loader
from nnunet_oneshot.trainers.base import OneShotTrainer


class WarpingTrainer(OneShotTrainer):
    """Trains on patches of the atlas, warped to unlabelled cases; progress is judged on such patches too.

    `real_share` says which image goes with the warped label: the warped atlas (0), the unlabelled case itself (1), or
    either with that probability.
    """

    real_share: float

    def build_loaders(self, training, validation, initial_patch_size, seeds) -> tuple:
        self.roles.require_unlabelled()
        registrations = register_dataset(
            plans=self.plans_manager.plans,
            dataset_json=self.dataset_json,
            configuration=self.configuration_name,
            atlases=self.roles.atlases,
            cases=sorted({*self.roles.unlabelled, *self.roles.progress}),
            preprocessed_dataset_folder_base=self.preprocessed_dataset_folder_base,
            config=self.config,
            device=self.device,
            log=self.print_to_log_file,
        )
        patch_size = self.configuration_manager.patch_size
        build = partial(
            build_oneshot_loader,
            dataset_folder=self.preprocessed_dataset_folder,
            dataset_class=self.dataset_class,
            atlases=self.roles.atlases,
            registrations=registrations,
            batch_size=self.batch_size,
            patch_size=patch_size,
            label_manager=self.label_manager,
            config=self.config,
            oversample_foreground_percent=self.oversample_foreground_percent,
        )
        return (
            build(
                cases=self.roles.unlabelled,
                initial_patch_size=initial_patch_size,
                transforms=training,
                real_share=self.real_share,
                augment=True,
                seed=seeds[0],
            ),
            build(
                cases=self.roles.progress,
                initial_patch_size=patch_size,
                transforms=validation,
                real_share=0.0,
                augment=False,
                seed=seeds[1],
            ),
        )
