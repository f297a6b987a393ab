"""What an iteration of each trainer costs: ``python -m nnunet_oneshot.benchmarks.training_speed``.

Sets up trainers as ``nnUNetv2_train`` does, one after the other in one process, and runs some iterations. Only the
registrations are kept, in their cache. ``nnUNet_oneshot_overrides`` changes settings as it does for a training.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_oneshot.data.fingerprint import lent_fingerprint
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.errors import exit_status
from nnunet_oneshot.tables import markdown_table
from nnunet_oneshot.training_time import first_epoch, synchroniser, timed_iteration

TRAINERS = ("nnUNetTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer")


@dataclass(frozen=True)
class Speed:
    """Cost of a trainer's iterations.

    Attributes:
        trainer: Name of the trainer.
        step: Mean seconds of a training step, including transfers to the device. Not all steps involve a teacher.
        wait: Mean seconds that the training waits for its next batch.
        memory: Peak memory of tensors on a GPU, MiB; None on other devices.
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
        name: Name of a trainer of nnU-Net or ours.
        fold: Fold.
        device: Device for training.
        iterations: Number of timed iterations.
        warm_up: Number of iterations before them, in which networks are compiled and memory is allocated.
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
    # nnU-Net's own trainer needs its fingerprint; ours do not.
    with lent_fingerprint(prepared.base):
        trainer.on_train_start()
    synchronise = synchroniser(device)
    with first_epoch(trainer):
        timed = [
            timed_iteration(trainer.dataloader_train, trainer.train_step, synchronise)
            for _ in range(warm_up + iterations)
        ][warm_up:]
    memory = torch.cuda.max_memory_allocated(device) / 2**20 if is_cuda else None
    step, wait = (float(np.mean(seconds)) for seconds in zip(*((one.step, one.wait) for one in timed), strict=True))
    return Speed(name, step, wait, memory)


def report(speeds: Sequence[Speed]) -> str:
    """A table; ratios compare whole iterations with those of the first trainer."""
    header = ["trainer", "step (s)", "waits for a batch (s)", "iteration to the first", "GPU memory (MiB)"]
    first = speeds[0].step + speeds[0].wait
    body = []
    for s in speeds:
        memory = "" if s.memory is None else f"{s.memory:.0f}"
        body.append([s.trainer, f"{s.step:.4f}", f"{s.wait:.4f}", f"{(s.step + s.wait) / first:.2f}", memory])
    return "\n".join(markdown_table(header, body))


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
    # Set before nnU-Net is imported, which reads it on import. The trainers' output is discarded.
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results
        sys.exit(main())
