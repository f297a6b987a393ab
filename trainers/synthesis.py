"""The student without a teacher: synthetic patches whose labels are exact."""

from __future__ import annotations

from nnunet_oneshot.trainers.warping import WarpingTrainer


class OneShotSynthesisTrainer(WarpingTrainer):
    """Trains on the atlas warped to unlabelled images, with its label warped in the same way.

    Label and image match regardless of registration errors, but the image is synthetic.
    """

    real_share = 0.0
