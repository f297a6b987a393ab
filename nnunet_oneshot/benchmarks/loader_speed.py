"""Patches a second of one worker, ours beside nnU-Net's: ``python -m nnunet_oneshot.benchmarks.loader_speed``.

Writes generated cases at full size with generated registrations, and lets the trainers build their loaders as they do for
a training, all transforms included. One process with one thread then makes batches of each loader in turn, so that other
work on the machine slows all of them alike.
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
        standard_error: Of that mean, seconds.
        patches_per_second: Its inverse.
        ratio: Patches a second to nnU-Net's.
    """

    loader: str
    patches: int
    seconds: float
    standard_error: float
    patches_per_second: float
    ratio: float


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
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(warm_up + batches):
        for name, loader in loaders.items():
            seed_everything(seed + number)
            started = time.perf_counter()
            size = len(next(loader)["data"])
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - started) / size)
    means = {name: float(np.mean(times)) for name, times in seconds.items()}
    return [
        LoaderSpeed(
            loader=name,
            patches=batches * size,
            seconds=means[name],
            standard_error=float(np.std(times) / np.sqrt(len(times))),
            patches_per_second=1 / means[name],
            ratio=means[STOCK] / means[name],
        )
        for name, times in seconds.items()
    ]


def report(speeds: Sequence[LoaderSpeed]) -> str:
    """A table with one row for each loader."""
    lines = ["| loader | patches | seconds a patch | standard error | patches a second | to nnU-Net |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for s in speeds:
        numbers = f"{s.seconds:.3f} | {s.standard_error:.3f} | {s.patches_per_second:.2f} | {s.ratio:.2f}"
        lines.append(f"| {s.loader} | {s.patches} | {numbers} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    axes = {"type": int, "nargs": 3, "metavar": "N"}
    parser.add_argument("--shape", default=[256, 256, 200], help="voxels of a volume; default: 256 256 200", **axes)
    parser.add_argument("--patch", default=[128, 128, 128], help="patch size; default: 128 128 128", **axes)
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--cases", type=int, default=5, metavar="N", help="with atlas and validation case; default: %(default)s")
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
    os.environ[VARIABLE] = ext_trainer_value(os.environ.get(VARIABLE))
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(1)
    dataset = LoaderDataset(tuple(options.shape), tuple(options.patch), options.batch_size, options.cases)
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
