"""Trainers that nnU-Net finds by name."""

from nnunet_oneshot.trainers import epochs
from nnunet_oneshot.trainers.atlas import OneShotAtlasTrainer
from nnunet_oneshot.trainers.distill import OneShotDistillTrainer
from nnunet_oneshot.trainers.epochs import *  # noqa: F403
from nnunet_oneshot.trainers.propagation import OneShotPropagationTrainer
from nnunet_oneshot.trainers.supervised import OneShotSupervisedAtlasTrainer, OneShotSupervisedTrainer
from nnunet_oneshot.trainers.synthesis import OneShotSynthesisTrainer

__all__ = [
    "OneShotAtlasTrainer",
    "OneShotPropagationTrainer",
    "OneShotSynthesisTrainer",
    "OneShotDistillTrainer",
    "OneShotSupervisedAtlasTrainer",
    "OneShotSupervisedTrainer",
    *epochs.__all__,
]
