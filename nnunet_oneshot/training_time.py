"""How long a training will take on this machine, from a few of its iterations, before it is started.

The iterations are the trainer's own, with nnU-Net's workers, on patches of the preprocessed images. Registrations need
not be there: others stand in, which move nothing and cost the same. All runs in a process of its own, so that neither a
lack of memory nor a crash reaches the caller, and writes to a folder that is removed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.evaluation.commands import Watch, command_environment, run_command
from nnunet_oneshot.io import Shape, load_json_checked, save_json_atomic
from nnunet_oneshot.progress import duration
from nnunet_oneshot.schedules import DEFAULT_EPOCHS, SHORTER, variant

TRAINER = "OneShotDistillTrainer"
# The length that the documentation recommends without a GPU.
_SHORT = 20
_NIGHT = 10 * 3600.0
# Iterations are timed for so long (s), or until there are so many.
_SECONDS, _ITERATIONS = 8.0, 60
_VALIDATION_SECONDS, _VALIDATIONS = 2.0, 10
# After so long (s) the process is ended, and what it has found by then is used.
_PATIENCE = 60.0
# A batch of more voxels is meant for a GPU: on a processor one step would take minutes.
_MOST_VOXELS = 1_000_000
_CASES = 8
_FILE = "times.json"
_TIMES: Shape = {
    "device": str,
    "reason?": str,
    "batch?": int,
    "workers?": int,
    "per_epoch?": [int],
    "interval?": int,
    "training?": [[float]],
    "validation?": [[float]],
    "end?": float,
}


@dataclass(frozen=True)
class Iteration:
    """What one iteration cost, in seconds.

    Attributes:
        wait: Until the batch was there.
        step: The step, transfers to the device included.
        teaches: Whether a teacher took part.
    """

    wait: float
    step: float
    teaches: bool


def timed_iteration(loader: Iterator[dict], step: Callable[[dict], dict], synchronise: Callable[[], None]) -> Iteration:
    """Takes a batch, runs a step of a trainer and tells what both cost.

    Args:
        loader: Of batches.
        step: ``train_step`` or ``validation_step``.
        synchronise: Waits until the device has computed what it was given.
    """
    started = time.perf_counter()
    batch = next(loader)
    ready = time.perf_counter()
    outputs = step(batch)
    synchronise()
    return Iteration(ready - started, time.perf_counter() - ready, "hint" in outputs)


def synchroniser(device: Any) -> Callable[[], None]:
    """A function that waits until a torch device has computed what it was given."""
    import torch

    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None


@contextmanager
def first_epoch(trainer: Any) -> Iterator[None]:
    """The first epoch of a trainer that was started; the processes that make its patches end with the block."""
    from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter

    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    try:
        yield
    finally:
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if isinstance(loader, MultiThreadedAugmenter):
                loader._finish()


def training_time(dataset: str | int, plans_name: str, configuration: str) -> str:
    """How long trainings of `TRAINER` take on this machine, in sentences; or why that is not known.

    Nothing is changed, and nothing is raised but an interruption by the user.

    Args:
        dataset: Number or name of a preprocessed dataset.
        plans_name: Name of its plans.
        configuration: Which is preprocessed.
    """
    what = f"Training time for {configuration} on this machine"
    with tempfile.TemporaryDirectory(prefix="nnunet_oneshot_", ignore_cleanup_errors=True) as folder:
        variables = {"nnUNet_compile": "f", "nnUNet_wandb_enabled": "0"}
        command = [sys.executable, "-m", __name__, "-d", str(dataset), "-c", configuration, "-p", plans_name, folder]
        reason = ""
        try:
            run_command(
                command,
                environment=command_environment(results=folder, variables=variables),
                log_file=Path(folder) / "log.txt",
                limit=_PATIENCE,
                watch=Watch(lambda _: "timing some iterations of a training", pause=10),
            )
        except TimeoutError:
            reason = f"one step takes longer than {duration(_PATIENCE)}"
        except (OneShotError, OSError) as error:
            reason = f"it ended early ({str(error).strip().splitlines()[-1].strip()})"
        try:
            times = load_json_checked(Path(folder) / _FILE, "the times", _TIMES)
        except OneShotError:
            return f"{what} was not estimated: {reason or 'nothing was measured'}."
    if not times.get("training"):
        return f"{what} was not estimated: {times.get('reason') or reason or 'nothing was measured'}."
    return f"{what} ({times['device']}): {_sentences(times)}"


def tell_training_time(
    dataset: str | int, plans_file: Path, configurations: Sequence[str], log: Callable[[str], None] = print
) -> None:
    """Tells the `training_time` of one of the configurations that are planned, ``3d_fullres`` if it is among them."""
    plans = load_json_checked(plans_file, "the plans file", {"configurations": dict})
    planned = [name for name in sorted(configurations, key="3d_fullres".__ne__) if name in plans["configurations"]]
    if planned:
        log(training_time(dataset, plans_file.stem, planned[0]))


def epoch_seconds(times: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds of an iteration, of waiting in it, and of a whole epoch.

    The first half of what was timed is left out: what is made only once falls into it, and batches that were made
    before.

    Args:
        times: ``training`` and ``validation`` list ``[wait, step, teaches]`` of iterations, ``interval`` tells how many
            steps there are to one with a teacher (0 without), ``per_epoch`` how many iterations of both kinds an epoch
            has, and ``end`` what else an epoch costs.
    """
    training = [Iteration(wait, step, bool(teaches)) for wait, step, teaches in times["training"]]
    settled = training[len(training) // 2 :]
    # With few steps, the only one with a teacher may be the first.
    alone, taught = (
        [one.step for one in settled if one.teaches is kind] or [one.step for one in training if one.teaches is kind]
        for kind in (False, True)
    )
    interval = times.get("interval", 0)
    share = 1 / interval if interval and taught else 0.0
    step = (1 - share) * np.mean(alone or taught) + (share * np.mean(taught) if share else 0.0)
    wait = np.mean([one.wait for one in settled])
    validation = times.get("validation") or [[0.0, 0.0, 0.0]]
    checks = np.mean([wait + step for wait, step, _ in validation[len(validation) // 2 :]])
    number, checked = times["per_epoch"]
    return float(step + wait), float(wait), float(number * (step + wait) + checked * checks + times.get("end", 0.0))


def _sentences(times: dict[str, Any]) -> str:
    iteration, wait, epoch = epoch_seconds(times)
    interval = times.get("interval", 0)
    teacher = f", the teacher's part in one of {interval} counted in" if interval > 1 else ""
    lengths = [n for n in (*SHORTER, DEFAULT_EPOCHS) if n * epoch <= _NIGHT]
    night = (
        f"Into a night of {duration(_NIGHT)} fits {variant(TRAINER, lengths[-1])} ({duration(lengths[-1] * epoch)})."
        if lengths
        else f"Not even {variant(TRAINER, SHORTER[0])} fits into a night of {duration(_NIGHT)}."
    )
    if lengths and lengths[-1] == DEFAULT_EPOCHS:
        night = f"All of it fits into a night of {duration(_NIGHT)}."
    slow = ""
    if wait > 0.25 * iteration:
        slow = (
            f" Patches are the bottleneck: {times['batch'] / iteration:.2g} a second are made (processes: "
            f"{times['workers']}; nnUNet_n_proc_DA sets how many)."
        )
    return (
        f"about {iteration:.2g} s an iteration{teacher}. {TRAINER} ({DEFAULT_EPOCHS} epochs) would take about "
        f"{duration(DEFAULT_EPOCHS * epoch)}, {variant(TRAINER, _SHORT)} {duration(_SHORT * epoch)}; registration, "
        f"rounds and the final validation come on top. {night}{slow}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Times iterations and writes them into a folder, which is that of nnU-Net's results too; returns the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("-d", "-c", "-p"):
        parser.add_argument(name, required=True)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    os.environ[VARIABLE] = ext_trainer_value(os.environ.get(VARIABLE))
    return exit_status(lambda: _measure(options.d, options.p, options.c, options.folder))


def _measure(dataset: str, plans_name: str, configuration: str, folder: Path) -> None:
    """Times iterations; all that is known is written after each."""
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    from nnunet_oneshot.data.prepared import PreparedDataset

    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    device, name = _device()
    times: dict[str, Any] = {"device": name}
    planned = prepared.configuration_manager
    voxels = planned.batch_size * int(np.prod(planned.patch_size))
    if device.type == "cpu" and voxels > _MOST_VOXELS:
        times["reason"] = (
            f"its batches of {planned.batch_size} patches of {list(planned.patch_size)} voxels are for a GPU, of which "
            f"torch finds none. -pl OneShotCPUPlanner plans for a processor"
        )
        save_json_atomic(times, folder / _FILE)
        return
    trainer = _standing_trainer(prepared, device, folder)
    distillation = trainer.config.distillation
    trainer.on_train_start()
    times.update(
        batch=trainer.batch_size,
        workers=get_allowed_n_proc_DA(),
        interval=distillation.hint_interval if trainer.distiller.teaches else 0,
        per_epoch=[trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch],
    )
    with first_epoch(trainer):
        _time_epoch(trainer, times, lambda: save_json_atomic(times, folder / _FILE))


def _time_epoch(trainer: Any, times: dict[str, Any], save: Callable[[], None]) -> None:
    """Adds to ``times`` what the parts of an epoch cost."""
    import matplotlib.pyplot  # noqa: F401  (so that the end of the epoch does not wait for it)
    import torch

    def timed(kind: str, loader: Iterator[dict], step: Callable[[dict], dict], most: int, seconds: float) -> list[dict]:
        outputs: list[dict] = []

        def noted(batch: dict) -> dict:
            outputs.append(step(batch))
            return outputs[-1]

        times[kind] = []
        started = time.perf_counter()
        while not outputs or (len(outputs) < most and time.perf_counter() - started < seconds):
            one = timed_iteration(loader, noted, synchronise)
            times[kind].append([one.wait, one.step, float(one.teaches)])
            save()
        return outputs

    synchronise = synchroniser(trainer.device)
    trained = timed("training", trainer.dataloader_train, trainer.train_step, _ITERATIONS, _SECONDS)
    started = time.perf_counter()
    trainer.on_train_epoch_end(trained)
    spent = time.perf_counter() - started
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        checked = timed(
            "validation", trainer.dataloader_val, trainer.validation_step, _VALIDATIONS, _VALIDATION_SECONDS
        )
        started = time.perf_counter()
        trainer.on_validation_epoch_end(checked)
    trainer.on_epoch_end()
    times["end"] = spent + time.perf_counter() - started
    save()


def _device() -> tuple[Any, str]:
    """The fastest device here, and its name."""
    import torch

    from nnunet_oneshot.devices import usable_cores

    if torch.cuda.is_available():
        return torch.device("cuda"), f"{torch.cuda.get_device_name()}, without torch.compile"
    # As nnUNetv2_train sets them.
    torch.set_num_threads(os.cpu_count() or 1)
    if torch.backends.mps.is_available():
        return torch.device("mps"), "mps"
    cores = usable_cores()
    return torch.device("cpu"), f"{cores} processor core{'s' if cores > 1 else ''}, as busy as now"


def _standing_trainer(prepared: Any, device: Any, folder: Path) -> Any:
    """The trainer on all cases, of which it takes a few, with registrations that move nothing."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    found = recursive_find_trainer_class_by_name(TRAINER)

    def few(trainer: Any) -> Any:
        roles = found.roles.fget(trainer)
        return replace(roles, unlabelled=roles.unlabelled[:_CASES], progress=roles.progress[:1])

    stand_in = property(lambda trainer: _Registrar(prepared, trainer.roles.atlases, folder))
    standing = type(found.__name__, (found,), {"registrar": stand_in, "roles": property(few)})
    # All cases are training cases, so that no validation case is looked at.
    trainer = standing(
        {**prepared.plans, "continue_training": False}, prepared.configuration, "all", prepared.dataset_json, device
    )
    # A teacher that is trained before the student is not waited for.
    distillation = replace(trainer.config.distillation, teacher_first=0.0)
    trainer.config = replace(trainer.config, distillation=distillation)
    return trainer


@dataclass(frozen=True)
class _Registrar:
    """Takes the place of a trainer's registrar; its registrations move nothing."""

    prepared: Any
    atlases: Sequence[str]
    folder: Path

    def register(self, cases: Sequence[str], *, fold: int | str | None = None) -> Any:
        from nnunet_oneshot.registration.dataset.cache import RegistrationCache
        from nnunet_oneshot.registration.pair.registration import Registration

        cache = RegistrationCache(self.folder / "registrations")
        quality = {"similarity_before": 1.0, "similarity_after": 1.0, "folding": 0.0, "affine_start": "none"}
        for atlas in self.atlases:
            shape = self.prepared.shape(atlas)
            # At half resolution, as registrations are.
            still = np.zeros((3, *(-(-size // 2) for size in shape)), np.float32)
            for case in cases:
                if case != atlas:
                    pair = Registration(atlas, case, np.eye(4), still, shape, self.prepared.shape(case), quality)
                    cache.save(pair, key="", sources={}, parameters={}, versions={})
        return cache


if __name__ == "__main__":
    sys.exit(main())
