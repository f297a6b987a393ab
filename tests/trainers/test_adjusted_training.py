"""When trainers take labels for equally frequent: less in each epoch, and never where losses are compared."""

import pytest
import torch
from nnunetv2.training.logging import nnunet_logger

from nnunet_oneshot.logit_adjustment import log_priors


@pytest.mark.parametrize(("strength", "factors"), [(1.0, [1.0, 0.8, 0.6]), (0.5, [0.5, 0.4, 0.3]), (0.0, [None] * 3)])
@pytest.mark.parametrize("name", ["OneShotSynthesisTrainer_5epochs", "OneShotDistillTrainer_5epochs"])
def test_priors_fade_over_the_epochs(name, strength, factors, prepare, make_trainer, short, stubs, monkeypatch):
    monkeypatch.setattr(nnunet_logger.MetaLogger, "plot_progress_png", lambda self, folder: None)
    trainer = make_trainer(prepare(), name, edit=lambda plans: plans["oneshot"].update(logit_adjustment=strength))
    train, validate = trainer.train_step, trainer.validation_step
    added: dict[int, list] = {}

    def train_step(batch):
        added.setdefault(trainer.current_epoch, []).append(trainer._cross_entropy.added)
        return train(batch)

    def validation_step(batch):
        assert trainer._cross_entropy.added is None
        return validate(batch)

    trainer.train_step, trainer.validation_step = train_step, validation_step
    trainer.perform_actual_validation = lambda *_: None
    trainer.run_training()
    segmentations = [trainer.prepared.segmentation(atlas) for atlas in trainer.roles.atlases]
    priors = log_priors(segmentations, trainer.label_manager)
    assert len(added) == 5
    for epoch, factor in enumerate(factors):
        for found in added[epoch]:
            assert found is None if factor is None else torch.allclose(found, factor * priors)


def test_trainers_that_do_not_warp_have_the_loss_of_nnunet(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(), "OneShotAtlasTrainer_1epoch")
    trainer.initialize()
    assert not hasattr(trainer, "_cross_entropy")
