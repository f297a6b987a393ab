"""What a distilling training gives to nnU-Net's logger: curves, their figure, Weights & Biases, checkpoints."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image

from nnunet_oneshot.distillation.progress import VALUES

NAME = "OneShotDistillTrainer_5epochs"


@pytest.fixture
def plain(monkeypatch):
    """Draws no figure, which takes longer than the rest."""
    monkeypatch.setattr(nnunet_logger.MetaLogger, "plot_progress_png", lambda self, folder: None)


def trained(trainer, epochs):
    """Runs some epochs of a training that is interrupted then."""
    last, begin = trainer.current_epoch + epochs, trainer.on_epoch_start

    def begin_or_stop():
        if trainer.current_epoch == last:
            raise KeyboardInterrupt
        begin()

    trainer.on_epoch_start = begin_or_stop
    with pytest.raises(SystemExit, match="130"):
        trainer.run_training()
    return trainer


def test_every_epoch_has_each_value_and_figures_gain_panels(prepare, make_trainer, short, stubs, monkeypatch):
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(rounds=[0.2]))
    heights = []
    plot = nnunet_logger.LocalLogger.plot_progress_png

    def measured(self, folder):
        plot(self, folder)
        heights.append(Image.open(os.path.join(folder, "progress.png")).size)

    monkeypatch.setattr(nnunet_logger.LocalLogger, "plot_progress_png", measured)
    trained(trainer, 1)
    logged = trainer.logger.get_checkpoint()
    assert all(len(values) == 1 for values in logged.values()) and set(VALUES) < set(logged)
    assert logged["hint"][0] > 0 and logged["reconstruction"][0] > 0 and 0 <= logged["real_share"][0] <= 1
    assert np.isnan(logged["trust"][0]).all() and len(logged["trust"][0]) == 2 and logged["rounds"] == [0.0]
    with Image.open(os.path.join(trainer.output_folder, "progress.png")) as figure:
        assert figure.width == heights[0][0] and figure.height > 2 * heights[0][1]


def test_rounds_and_trust_are_logged(prepare, make_trainer, short, stubs, plain, monkeypatch):
    import nnunet_oneshot.trainers.distill as module
    from nnunet_oneshot.registration.dataset.cache import GuidedRegistrations

    monkeypatch.setattr(module, "trust_in", lambda *dice: np.array([0.75, 0.0]))
    monkeypatch.setattr(
        module, "kept_of", lambda first, again, pairs: GuidedRegistrations(first, again, set(pairs[:1]))
    )
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(rounds=[0.2]))
    trained(trainer, 2)
    logged = trainer.logger.get_checkpoint()
    assert logged["rounds"] == [0.0, 1.0] and logged["trust"][1] == [0.75, 0.0]
    assert logged["guided_share"] == [0.0, pytest.approx(1 / 3)]


def test_without_a_teacher_there_are_no_losses_of_it(prepare, make_trainer, short, stubs, plain):
    edit = lambda p: p["oneshot"]["distillation"].update(hint="none", real_share=1.0)  # noqa: E731
    logged = trained(make_trainer(prepare(), NAME, edit=edit), 1).logger.get_checkpoint()
    assert np.isnan(logged["hint"]).all() and logged["real_share"] == [0.5]


def test_a_resumed_training_keeps_the_curves_and_stock_nnunet_loads_them(
    prepare, make_trainer, short, stubs, plain, tmp_path
):
    dataset = prepare()
    first = trained(make_trainer(dataset, NAME), 1)
    path = os.path.join(first.output_folder, "checkpoint_best.pth")
    second = make_trainer(dataset, NAME, resume=True)
    second.load_checkpoint(path)
    trained(second, 1)
    logged = second.logger.get_checkpoint()
    assert [len(logged[name]) for name in VALUES] == [2] * len(VALUES)
    assert logged["hint"][0] == first.logger.get_value("hint", 0)
    stock = nnUNetTrainer(
        {**first.plans_manager.plans, "continue_training": True},
        "3d_fullres",
        0,
        first.dataset_json,
        torch.device("cpu"),
    )
    stock.initialize()
    stock.optimizer = first.optimizer
    stock.load_checkpoint(path)
    assert stock.logger.get_value("train_losses", 0) == first.logger.get_value("train_losses", 0)


def test_checkpoints_of_earlier_versions_have_no_values_of_their_epochs(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(), NAME)
    trainer.logger.load_checkpoint({"train_losses": [1.0, 0.5]})
    assert all(np.isnan(trainer.logger.get_value(name, None)).tolist() == [True, True] for name in VALUES)


def test_weights_and_biases_get_them(prepare, make_trainer, short, stubs, plain, monkeypatch):
    sent = {}
    run = SimpleNamespace(step=0, summary={}, config={}, log=lambda values, step: sent.update(values))
    monkeypatch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=lambda **_: run))
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    trained(make_trainer(prepare(), NAME), 1)
    assert {"hint", "reconstruction", "real_share", "rounds", "trust/class_1", "trust/class_2"} <= set(sent)
