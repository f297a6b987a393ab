"""The loss of trainers that have an optimiser of ours: small structures are found early."""

from __future__ import annotations

from functools import cached_property

import torch

from nnunet_oneshot.logit_adjustment import AdjustedLogits, adjust_cross_entropy, log_priors
from nnunet_oneshot.trainers.base import OneShotTrainer


class AdjustingTrainer(OneShotTrainer):
    """Takes labels for equally frequent in cross-entropy at first, and less so in each epoch (`logit_adjustment`).

    How frequent they are is read from the labels of the atlases alone.
    """

    _cross_entropy: AdjustedLogits | None = None

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        self._cross_entropy = adjust_cross_entropy(loss)
        return loss

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        strength = self.config.logit_adjustment * (1 - self.current_epoch / self.num_epochs)
        if self._cross_entropy is not None and strength > 0:
            self._cross_entropy.added = strength * self._log_priors

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        # Losses of all epochs are compared with each other.
        if self._cross_entropy is not None:
            self._cross_entropy.added = None

    @cached_property
    def _log_priors(self) -> torch.Tensor:
        return log_priors(self._load_atlas_segs(), self.label_manager).to(self.device)
