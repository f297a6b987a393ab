"""Trainings on several ranks as ``nnUNetv2_train -num_gpus N`` starts them, on processors instead of GPUs."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run import run_training as command
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from torch import multiprocessing

from nnunet_oneshot.benchmarks import processor_ranks

nnunet_run_ddp = command.run_ddp


def on_processors() -> None:
    """Puts gloo and the processor in the place of nccl and CUDA; trainings have two epochs of two iterations."""
    from nnunet_oneshot.trainers.base import OneShotTrainer

    processor_ranks.on_processors()
    make, initialize = OneShotTrainer.__init__, OneShotTrainer.initialize

    @wraps(make)
    def make_short(self, *args, **named) -> None:
        make(self, *args, **named)
        self.num_epochs = min(2, self.num_epochs)

    def initialize_short(self) -> None:
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 1, 1
        initialize(self)

    OneShotTrainer.__init__, OneShotTrainer.initialize = make_short, initialize_short
    # It takes longer than all else.
    MetaLogger.plot_progress_png = lambda self, folder: None


def run_ddp(*args) -> None:
    """nnU-Net's function of this name, on a processor; put it into its module to have `run_training` call it."""
    on_processors()
    nnunet_run_ddp(*args)


def on_ranks(function: Callable[..., Any], folder: Path, *args: object, count: int = 2) -> list[Any]:
    """What a function of a module returns in each rank, an exception as text; ranks that were killed give None."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(command.find_free_network_port()))
    places = [folder / f"rank_{rank}.pth" for rank in range(count)]
    # Forked, since each would import torch and nnU-Net for longer than it computes.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_work, args=(rank, count, places[rank], function, args)) for rank in range(count)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    stuck = [rank for rank in ranks if rank.is_alive()]
    for rank in stuck:
        rank.kill()
    assert not stuck, "a rank hung"
    return [torch.load(place, weights_only=False) if place.exists() else None for place in places]


def _work(rank: int, count: int, place: Path, function: Callable[..., Any], args: tuple) -> None:
    on_processors()
    command.setup_ddp(rank, count)
    try:
        result = function(*args)
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    torch.save(result, place)
