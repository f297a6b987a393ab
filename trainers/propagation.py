"""For comparison: real images with the labels that registration propagates to them."""

from __future__ import annotations

from nnunet_oneshot.trainers.warping import WarpingTrainer


class OneShotPropagationTrainer(WarpingTrainer):
    """Trains on the unlabelled images as they are, with the atlas's labels warped to them.

    The images are real, and every error of a registration is an error of the label.
    """

    real_share = 1.0
