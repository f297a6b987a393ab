"""Trainings on a processor give back what they have freed."""

import pytest
import torch
from nnunetv2.training.logging import nnunet_logger

from nnunet_oneshot.trainers import base


@pytest.mark.parametrize("name", ["OneShotAtlasTrainer_5epochs", "OneShotDistillTrainer_5epochs"])
def test_in_one_of_some_steps(name, prepare, make_trainer, short, stubs, monkeypatch):
    monkeypatch.setattr(nnunet_logger.MetaLogger, "plot_progress_png", lambda self, folder: None)
    released = []
    monkeypatch.setattr(base, "release_freed_memory", lambda: released.append(trainer._steps))
    trainer = make_trainer(prepare(), name, edit=lambda plans: plans["oneshot"]["distillation"].update(rounds=[]))
    trainer.perform_actual_validation = lambda *_: None
    trainer.run_training()
    # Five epochs of two steps and one of validation.
    assert released == [0, 10]


def test_not_where_another_device_computes(prepare, make_trainer, monkeypatch):
    monkeypatch.setattr(base, "release_freed_memory", lambda: pytest.fail("called"))
    trainer = make_trainer(prepare(), "OneShotAtlasTrainer_1epoch")
    trainer.device = torch.device("meta")
    trainer._release_memory()
