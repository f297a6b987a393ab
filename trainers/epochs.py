"""The trainers with shorter schedules, named as nnU-Net names its own; the learning rate falls to zero within them."""

from __future__ import annotations

from nnunet_oneshot.trainers.atlas import OneShotAtlasTrainer
from nnunet_oneshot.trainers.distill import OneShotDistillTrainer
from nnunet_oneshot.trainers.propagation import OneShotPropagationTrainer
from nnunet_oneshot.trainers.synthesis import OneShotSynthesisTrainer


class OneShotAtlasTrainer_1epoch(OneShotAtlasTrainer):
    epochs = 1


class OneShotAtlasTrainer_5epochs(OneShotAtlasTrainer):
    epochs = 5


class OneShotAtlasTrainer_10epochs(OneShotAtlasTrainer):
    epochs = 10


class OneShotAtlasTrainer_20epochs(OneShotAtlasTrainer):
    epochs = 20


class OneShotAtlasTrainer_50epochs(OneShotAtlasTrainer):
    epochs = 50


class OneShotAtlasTrainer_100epochs(OneShotAtlasTrainer):
    epochs = 100


class OneShotAtlasTrainer_250epochs(OneShotAtlasTrainer):
    epochs = 250


class OneShotAtlasTrainer_500epochs(OneShotAtlasTrainer):
    epochs = 500


class OneShotPropagationTrainer_1epoch(OneShotPropagationTrainer):
    epochs = 1


class OneShotPropagationTrainer_5epochs(OneShotPropagationTrainer):
    epochs = 5


class OneShotPropagationTrainer_10epochs(OneShotPropagationTrainer):
    epochs = 10


class OneShotPropagationTrainer_20epochs(OneShotPropagationTrainer):
    epochs = 20


class OneShotPropagationTrainer_50epochs(OneShotPropagationTrainer):
    epochs = 50


class OneShotPropagationTrainer_100epochs(OneShotPropagationTrainer):
    epochs = 100


class OneShotPropagationTrainer_250epochs(OneShotPropagationTrainer):
    epochs = 250


class OneShotPropagationTrainer_500epochs(OneShotPropagationTrainer):
    epochs = 500


class OneShotSynthesisTrainer_1epoch(OneShotSynthesisTrainer):
    epochs = 1


class OneShotSynthesisTrainer_5epochs(OneShotSynthesisTrainer):
    epochs = 5


class OneShotSynthesisTrainer_10epochs(OneShotSynthesisTrainer):
    epochs = 10


class OneShotSynthesisTrainer_20epochs(OneShotSynthesisTrainer):
    epochs = 20


class OneShotSynthesisTrainer_50epochs(OneShotSynthesisTrainer):
    epochs = 50


class OneShotSynthesisTrainer_100epochs(OneShotSynthesisTrainer):
    epochs = 100


class OneShotSynthesisTrainer_250epochs(OneShotSynthesisTrainer):
    epochs = 250


class OneShotSynthesisTrainer_500epochs(OneShotSynthesisTrainer):
    epochs = 500


class OneShotDistillTrainer_1epoch(OneShotDistillTrainer):
    epochs = 1


class OneShotDistillTrainer_5epochs(OneShotDistillTrainer):
    epochs = 5


class OneShotDistillTrainer_10epochs(OneShotDistillTrainer):
    epochs = 10


class OneShotDistillTrainer_20epochs(OneShotDistillTrainer):
    epochs = 20


class OneShotDistillTrainer_50epochs(OneShotDistillTrainer):
    epochs = 50


class OneShotDistillTrainer_100epochs(OneShotDistillTrainer):
    epochs = 100


class OneShotDistillTrainer_250epochs(OneShotDistillTrainer):
    epochs = 250


class OneShotDistillTrainer_500epochs(OneShotDistillTrainer):
    epochs = 500
