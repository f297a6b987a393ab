"""The student without a teacher: synthetic patches whose labels are exact."""

from __future__ import annotations

from nnunet_oneshot.trainers.warping import WarpingTrainer


class OneShotSynthesisTrainer(WarpingTrainer):
    """Trains on the atlas warped to unlabelled images, with its label warped alike.

    Label and image agree whatever the error of a registration; only the image is synthetic.
    """

    real_share = 0.0
