"""Ceilings: trainings on real images with their own labels that share everything else with the one-shot trainers."""

from __future__ import annotations

import torch

from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.partial import require_every_label
from nnunet_oneshot.data.roles import CaseRoles, assign_roles
from nnunet_oneshot.trainers.adjusting import AdjustingTrainer
from nnunet_oneshot.trainers.atlas import OneShotAtlasTrainer
from nnunet_oneshot.trainers.base import CUDA, OneShotTrainer
from nnunet_oneshot.trainers.warping import WarpingTrainer


class OneShotSupervisedAtlasTrainer(AdjustingTrainer, OneShotAtlasTrainer):
    """`OneShotAtlasTrainer` with the optimiser, learning rate, loss and mirroring of the trainers that warp the atlas.

    What it lacks beside them is the unlabelled images alone, of which only the decision on mirroring knows.
    """

    configure_optimizers = WarpingTrainer.configure_optimizers

    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.config.initial_lr

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        return OneShotTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(self)


class OneShotSupervisedTrainer(OneShotSupervisedAtlasTrainer):
    """A ceiling, no one-shot training: reads the labels of ALL labelled training cases, and says so in its log.

    The atlas is resolved as for the other trainers, for the decision on mirroring and for that alone. Progress is
    measured on training cases, so that no validation label is read.
    """

    _roles: CaseRoles | None

    @property
    def labelled_cases(self) -> list[str]:
        fold = self._fold()
        return sorted(set(fold.train) & set(fold.labelled))

    @property
    def roles(self) -> CaseRoles:
        if self._roles is None:
            fold, cases = self._fold(), self.labelled_cases
            prepared = self.prepared
            choice = self.ranks.once(
                lambda: resolve_atlases(
                    prepared.base, self.config, fold, prepared.image_in_common_order, kept=prepared.kept
                )
            )
            require_every_label(self.dataset_json, cases, fold.number)
            self._roles = assign_roles(choice, fold, self.config)
            self.print_to_log_file(
                f"THIS IS NO ONE-SHOT TRAINING but a ceiling to compare with: it reads the labels of all {len(cases)} "
                f"labelled cases among the {len(fold.train)} training cases. The intensity statistics of the plans are "
                f"those of the one-shot trainings, and mirroring is decided as for them, with the atlas "
                f"{', '.join(choice.atlases)}."
            )
        return self._roles
