"""A baseline: real images with labels propagated to them by registration."""

from __future__ import annotations

from nnunet_oneshot.trainers.warping import WarpingTrainer


class OneShotPropagationTrainer(WarpingTrainer):
    """Trains on the unmodified unlabelled images, with the atlas's labels warped to them.

    The images are real, but each registration error becomes a label error.
    """

    real_share = 1.0
