"""The student without a teacher: synthetic patches whose labels are exact."""

from __future__ import annotations

from nnunet_oneshot.trainers.warping import WarpingTrainer


class OneShotSynthesisTrainer(WarpingTrainer):
    """Trains on the atlas warped to unlabelled images, with its label warped alike.

    Label and image agree whatever the error of a registration; only the image is synthetic.
    """

    @property
    def real_share(self) -> float:
        return 0.0
