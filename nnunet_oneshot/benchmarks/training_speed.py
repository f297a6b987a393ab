"""What an iteration of each trainer costs: ``python -m nnunet_oneshot.benchmarks.training_speed``.

Trainers are set up as by ``nnUNetv2_train``, one after the other in one process, and run some iterations; nothing is
kept but the registrations, which are cached. Settings can be changed by ``nnUNet_oneshot_overrides`` as for a training.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter

from nnunet_oneshot.data.fingerprint import lent_fingerprint
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.errors import exit_status

TRAINERS = ("nnUNetTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer")


@dataclass(frozen=True)
class Speed:
    """Cost of a trainer's iterations.

    Attributes:
        trainer: Its name.
        step: Median seconds of a training step, what it moves to the device included.
        wait: Mean seconds for which the training waits for its next batch.
        memory: Largest memory that tensors take on a GPU, MiB; None elsewhere.
    """

    trainer: str
    step: float
    wait: float
    memory: float | None


def measure(
    prepared: PreparedDataset, name: str, *, fold: str, device: torch.device, iterations: int, warm_up: int
) -> Speed:
    """Runs some iterations of a trainer's first epoch.

    Args:
        prepared: The dataset.
        name: A trainer's name, of nnU-Net or ours.
        fold: Fold.
        device: Where it is trained.
        iterations: Iterations that are timed.
        warm_up: Iterations before them, in which networks are compiled and memory is claimed.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = recursive_find_trainer_class_by_name(name)(
        plans={**prepared.plans, "continue_training": False},
        configuration=prepared.configuration,
        fold=int(fold) if fold.isdigit() else fold,
        dataset_json=prepared.dataset_json,
        device=device,
    )
    # Our trainers need no fingerprint of nnU-Net's, its own trainer does.
    with lent_fingerprint(prepared.base):
        trainer.on_train_start()
    trainer.on_train_epoch_start()
    waits, steps = [], []
    try:
        for _ in range(warm_up + iterations):
            started = time.perf_counter()
            batch = next(trainer.dataloader_train)
            ready = time.perf_counter()
            trainer.train_step(batch)
            if is_cuda:
                torch.cuda.synchronize(device)
            waits.append(ready - started)
            steps.append(time.perf_counter() - ready)
    finally:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if isinstance(loader, MultiThreadedAugmenter):
                loader._finish()
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if is_cuda else None
    return Speed(name, float(np.median(steps[warm_up:])), float(np.mean(waits[warm_up:])), memory)


def report(speeds: Sequence[Speed]) -> str:
    """A table; ratios are of whole iterations, to the first trainer's."""
    lines = ["| trainer | step (s) | waits for a batch (s) | iteration to the first | GPU memory (MiB) |"]
    lines.append("| --- | --- | --- | --- | --- |")
    first = speeds[0].step + speeds[0].wait
    for s in speeds:
        memory = "" if s.memory is None else f"{s.memory:.0f}"
        lines.append(f"| {s.trainer} | {s.step:.4f} | {s.wait:.4f} | {(s.step + s.wait) / first:.2f} | {memory} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset number or name")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-p", default="nnUNetOneShotPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("-f", default="0", metavar="FOLD", help="default: %(default)s")
    parser.add_argument("-device", "--device", default="cuda", help="cpu, cuda or mps; default: %(default)s")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), metavar="T", help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=15, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    device = usable_device(options.device)
    os.environ[VARIABLE] = ext_trainer_value(os.environ.get(VARIABLE))
    prepared = PreparedDataset.open(dataset=options.d, plans_name=options.p, configuration=options.c)
    speeds = []
    for name in options.trainers:
        speeds.append(
            measure(
                prepared,
                name,
                fold=options.f,
                device=device,
                iterations=options.iterations,
                warm_up=options.warm_up,
            )
        )
        print(report(speeds), flush=True)


if __name__ == "__main__":
    # Before nnU-Net is imported, which reads it then: what a trainer writes is not kept.
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results
        sys.exit(main())
