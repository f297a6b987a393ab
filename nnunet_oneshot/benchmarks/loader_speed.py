"""Patches a second of one worker, ours beside nnU-Net's: ``python -m nnunet_oneshot.benchmarks.loader_speed``.

Writes generated cases at full size with generated registrations, and lets the trainers build their loaders as they do
for a training, all transforms included. One process with one thread then makes batches of each loader in turn, so that
other work on the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.benchmarks.loader_dataset import CONFIGURATION, LoaderDataset
from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.io import save_json_atomic
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.seeding import seed_everything

STOCK = "nnU-Net"
_AS_REGISTERED = {"p_scale": 0.0, "p_mix": 0.0, "p_random": 0.0}
_DEFORMED = {"p_scale": 1.0, "p_mix": 1.0, "p_random": 1.0}
# Name of a row: the trainer and its settings for the deformation.
LOADERS: Mapping[str, tuple[str, Mapping[str, float]]] = {
    STOCK: ("nnUNetTrainer", {}),
    "synthetic": ("OneShotSynthesisTrainer", {}),
    "synthetic, as registered": ("OneShotSynthesisTrainer", _AS_REGISTERED),
    "synthetic, always deformed": ("OneShotSynthesisTrainer", _DEFORMED),
    "real": ("OneShotPropagationTrainer", {}),
}


@dataclass(frozen=True)
class LoaderSpeed:
    """What the patches of a loader cost one worker.

    Attributes:
        loader: Name in `LOADERS`.
        patches: Number of timed patches.
        seconds: Mean time of a patch.
        cpu_seconds: Mean processor time of a patch, on which other work on the machine has less influence.
        standard_error: Of the mean processor time, seconds.
        patches_per_second: Inverse of ``seconds``.
        ratio: Patches a second to nnU-Net's.
        cpu_ratio: The same by processor time.
    """

    loader: str
    patches: int
    seconds: float
    cpu_seconds: float
    standard_error: float
    patches_per_second: float
    ratio: float
    cpu_ratio: float


@dataclass(frozen=True)
class _Registered:
    """Takes the place of a trainer's registrar: everything is registered already."""

    cache: RegistrationCache

    def register(self, cases: Sequence[str], *, fold: int | str | None = None) -> RegistrationCache:
        return self.cache


def build_loader(name: str, dataset: LoaderDataset, cache: RegistrationCache) -> Any:
    """The loader of training patches that a trainer builds, in this process.

    Args:
        name: Name in `LOADERS`.
        dataset: The dataset, already written.
        cache: Its registrations.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    trainer_name, synthesis = LOADERS[name]
    found = recursive_find_trainer_class_by_name(trainer_name)
    trainer_class = type(found.__name__, (found,), {"registrar": property(lambda trainer: _Registered(cache))})
    plans = {**dataset.plans, "continue_training": False}
    if name != STOCK:
        plans["oneshot"] = {"synthesis": dict(synthesis)}
    trainer = trainer_class(plans, CONFIGURATION, 0, dataset.dataset_json, torch.device("cpu"))
    # Networks are not needed: this is all that a loader takes from `initialize`.
    trainer.batch_size = dataset.batch_size
    patches, _ = trainer.get_dataloaders()
    return patches


def measure(loaders: Mapping[str, Any], *, batches: int, warm_up: int, seed: int) -> list[LoaderSpeed]:
    """Times the loaders in turn, batch by batch.

    Args:
        loaders: Name -> iterator of batches; one is called `STOCK`.
        batches: Number of timed batches of each.
        warm_up: Number of batches before them.
        seed: Seed of the first round; all loaders of a round start from the same one.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(warm_up + batches):
        for name, loader in loaders.items():
            seed_everything(seed + number)
            started = time.perf_counter(), time.process_time()
            size = len(next(loader)["data"])
            if number >= warm_up:
                times[name].append(
                    ((time.perf_counter() - started[0]) / size, (time.process_time() - started[1]) / size)
                )
    means = {name: np.mean(found, axis=0).tolist() for name, found in times.items()}
    return [
        LoaderSpeed(
            loader=name,
            patches=batches * size,
            seconds=means[name][0],
            cpu_seconds=means[name][1],
            standard_error=float(np.std([cpu for _, cpu in found]) / np.sqrt(len(found))),
            patches_per_second=1 / means[name][0],
            ratio=means[STOCK][0] / means[name][0],
            cpu_ratio=means[STOCK][1] / means[name][1],
        )
        for name, found in times.items()
    ]


def report(speeds: Sequence[LoaderSpeed]) -> str:
    """A table with one row for each loader."""
    columns = ["loader", "patches", "seconds", "CPU seconds", "error", "patches a second", "to nnU-Net", "by CPU"]
    lines = [" | ".join(["", *columns, ""]).strip(), "| --- " * len(columns) + "|"]
    for s in speeds:
        times = f"{s.seconds:.3f} | {s.cpu_seconds:.3f} | {s.standard_error:.3f} | {s.patches_per_second:.2f}"
        lines.append(f"| {s.loader} | {s.patches} | {times} | {s.ratio:.2f} | {s.cpu_ratio:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, what, sizes in (("--shape", "volume", [256, 256, 200]), ("--patch", "patch", [128, 128, 128])):
        shown = f"voxels of a {what}; default: %(default)s"
        parser.add_argument(name, type=int, nargs=3, metavar="N", default=sizes, help=shown)
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--labels", type=int, default=10, metavar="N", help="1 to 10; default: %(default)s")
    parser.add_argument("--cases", type=int, default=5, metavar="N", help="of all kinds; default: %(default)s")
    parser.add_argument("--batches", type=int, default=20, metavar="N", help="timed for each; default: %(default)s")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the patches; default: %(default)s")
    parser.add_argument("--loaders", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="NAME")
    parser.add_argument("--json", metavar="FILE", help="writes the figures to this file, too")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if min(*options.shape, *options.patch, options.batch_size, options.batches) < 1 or options.cases < 3:
        raise OneShotError("Give sizes and numbers of at least 1, and at least 3 cases.")
    if not 1 <= options.labels <= 10:
        raise OneShotError(f"{options.labels} labels were asked for: give a number from 1 to 10.")
    os.environ[VARIABLE] = ext_trainer_value(os.environ.get(VARIABLE))
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(1)
    dataset = LoaderDataset(
        tuple(options.shape), tuple(options.patch), options.batch_size, options.labels, options.cases
    )
    with tempfile.TemporaryDirectory() as folder:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ[variable] = str(Path(folder) / variable)
        cache = dataset.write(Path(folder) / "nnUNet_preprocessed")
        names = dict.fromkeys([STOCK, *options.loaders])
        loaders = {name: build_loader(name, dataset, cache) for name in names}
        speeds = measure(loaders, batches=options.batches, warm_up=options.warm_up, seed=options.seed)
    print(report(speeds))
    if options.json:
        content = {"options": vars(options), "loaders": [asdict(speed) for speed in speeds]}
        save_json_atomic(content, Path(options.json))


if __name__ == "__main__":
    sys.exit(main())
