"""Trainers with shorter schedules and names like nnU-Net's; the learning rate decays to zero within each schedule."""

from __future__ import annotations

from nnunet_oneshot.schedules import SHORTER, variant
from nnunet_oneshot.trainers.atlas import OneShotAtlasTrainer
from nnunet_oneshot.trainers.base import OneShotTrainer
from nnunet_oneshot.trainers.distill import OneShotDistillTrainer
from nnunet_oneshot.trainers.propagation import OneShotPropagationTrainer
from nnunet_oneshot.trainers.supervised import OneShotSupervisedAtlasTrainer, OneShotSupervisedTrainer
from nnunet_oneshot.trainers.synthesis import OneShotSynthesisTrainer

FULL_LENGTH = (
    OneShotAtlasTrainer,
    OneShotPropagationTrainer,
    OneShotSynthesisTrainer,
    OneShotDistillTrainer,
    OneShotSupervisedAtlasTrainer,
    OneShotSupervisedTrainer,
)


def _shorter(trainer: type[OneShotTrainer], epochs: int) -> type[OneShotTrainer]:
    name = variant(trainer.__name__, epochs)
    meaning = f"`{trainer.__name__}` with {epochs} epoch{'s' if epochs > 1 else ''}."
    # Pickling looks up a class by its name in its module.
    return type(name, (trainer,), {"__module__": __name__, "__doc__": meaning, "epochs": epochs})


VARIANTS = {made.__name__: made for trainer in FULL_LENGTH for made in (_shorter(trainer, n) for n in SHORTER)}
globals().update(VARIANTS)
__all__ = [*VARIANTS]
