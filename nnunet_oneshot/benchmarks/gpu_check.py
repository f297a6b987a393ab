"""All that needs a GPU, in one run of about ten minutes: ``python -m nnunet_oneshot.benchmarks.gpu_check -o OUT``.

Generates phantoms, plans them, and compares what the GPU computes with what the processor does: points and labels that
are warped, a registration, corrected labels, networks in each number format, one training step of each trainer. Then it
times registrations and trainings, compiled and not, beside nnU-Net's own trainer, and compares their memory with the
planner's target. Each part writes a table (CSV); ``record.json`` has the form of the project's evidence. A part that
fails is named and leaves the others as they are.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.io import is_occupied, save_json_atomic
from nnunet_oneshot.versions import versions

_NAME, _CONFIGURATION = "Dataset999_Phantoms", "3d_fullres"
_TRAINERS = ("OneShotAtlasTrainer", "OneShotPropagationTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer")
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
# Largest deviations from the processor: voxels, shares of voxels, Dice, and shares of a loss.
_WARPED, _PLACES, _LABELS, _DICE, _LOSS = 1e-3, (0.05, 0.5), 1e-3, 0.01, 0.03
_FORMATS = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.03}

Row = dict[str, Any]


@dataclass
class Check:
    """What is checked.

    Attributes:
        out: Folder of the record.
        device: The device.
        small: Whether it is only rehearsed: small images and few iterations.
        target: The planner's memory target, GB.
        speeds: What the timed parts found, for the last one.
    """

    out: Path
    device: torch.device
    small: bool
    target: float
    speeds: list[Row] = field(default_factory=list)

    @property
    def plans(self) -> str:
        """Name of the plans."""
        return "nnUNetOneShotCPUPlans" if self.small else "nnUNetOneShotPlans"

    def prepared(self) -> Any:
        """The planned dataset."""
        from nnunet_oneshot.data.prepared import PreparedDataset

        return PreparedDataset.open(dataset=_NAME, plans_name=self.plans, configuration=_CONFIGURATION)

    def synchronised(self) -> float:
        """The time, once the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class DeviationError(OneShotError):
    """Something is above its limit; ``rows`` are what was found."""

    def __init__(self, sentence: str, rows: Sequence[Row]) -> None:
        super().__init__(sentence)
        self.rows = list(rows)


def _judged(rows: list[Row]) -> list[Row]:
    """The rows, each of which has ``value`` and ``limit``.

    Raises:
        DeviationError: A value is above its limit, or no number.
    """
    bad = [row for row in rows if not row["value"] <= row["limit"]]
    if bad:
        shown = "; ".join(f"{row['what']}: {row['value']:.4g}, at most {row['limit']:.4g}" for row in bad)
        raise DeviationError(f"Above the limit: {shown}.", rows)
    return rows


def _row(what: str, value: float | torch.Tensor, limit: float) -> Row:
    return {"what": what, "value": round(float(value), 8), "limit": limit}


def plan(check: Check) -> list[Row]:
    """Generates phantoms, enlarged unless it is small, and plans and preprocesses them."""
    from nnunet_oneshot.demo.phantoms import write_phantom_dataset
    from nnunet_oneshot.evaluation.commands import command_environment, run_command

    raw = Path(os.environ["nnUNet_raw"]) / _NAME
    write_phantom_dataset(raw, training_cases=4 if check.small else 8, test_cases=0, labelled=8)
    if not check.small:
        _enlarge(raw, 5)
    command = ["nnunet_oneshot", "plan_and_preprocess", "-d", "999", "-c", _CONFIGURATION, "--no_pbar", "-np", "1"]
    command += ["--no_estimate", "-pl", "OneShotCPUPlanner" if check.small else "OneShotPlanner"]
    command += [] if check.small else ["-gpu_memory_target", str(check.target)]
    done = run_command(command, environment=command_environment(), log_file=check.out / "plan_and_preprocess.log")
    manager = check.prepared().configuration_manager
    patch = "x".join(str(n) for n in manager.patch_size)
    return [{"patch": patch, "batch": manager.batch_size, "target_gb": check.target, "seconds": round(done.seconds, 1)}]


def _enlarge(raw: Path, factor: int) -> None:
    """Resamples all images and labels to voxels of a fraction of their size."""
    import SimpleITK as sitk

    for path in raw.glob("*Tr/*.nii.gz"):
        image = sitk.ReadImage(str(path))
        method = sitk.sitkNearestNeighbor if path.parent.name == "labelsTr" else sitk.sitkLinear
        size, spacing = ([f(n) for n in values] for f, values in _scaled(image, factor))
        sitk.WriteImage(
            sitk.Resample(image, size, sitk.Transform(), method, image.GetOrigin(), spacing, image.GetDirection()),
            str(path),
        )


def _scaled(image: Any, factor: int) -> list[tuple[Callable[[float], float], Sequence[float]]]:
    return [(lambda n: n * factor, image.GetSize()), (lambda n: n / factor, image.GetSpacing())]


def _phantoms() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two images (1, X, Y, Z) float32 and their labels (1, X, Y, Z)."""
    from nnunet_oneshot.demo.phantoms import make_phantom

    made = [make_phantom(np.random.default_rng(seed)) for seed in range(2)]
    return [image[None].astype(np.float32) for image, _, _ in made], [label[None] for _, label, _ in made]


def warped(check: Check) -> list[Row]:
    """A volume warped by a flow, and the gradient of the velocity."""
    from nnunet_oneshot.registration.pair.functional import integrate_on, warp

    image = torch.from_numpy(_phantoms()[0][0])[None] / 1000
    velocity = 2 * torch.randn((1, 3, 8, 8, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for device in (torch.device("cpu"), check.device):
        field_ = velocity.to(device).requires_grad_()
        moved = warp(image.to(device), integrate_on(field_, image.shape[2:]))
        (gradient,) = torch.autograd.grad(moved.square().mean(), field_)
        found.append((moved.detach().cpu(), gradient.cpu()))
    gaps = [(a - b).abs().max() / a.abs().max() for a, b in zip(*found, strict=True)]
    return _judged([_row("warped image", gaps[0], _WARPED), _row("gradient", gaps[1], 10 * _WARPED)])


def registered(check: Check) -> list[Row]:
    """A pair registered on both: where it leads, and the Dice of its labels."""
    from nnunet_oneshot.config import RegistrationConfig
    from nnunet_oneshot.demo.phantoms import SPACING
    from nnunet_oneshot.registration.pair.registrar import register_arrays
    from nnunet_oneshot.registration.pair.warp import atlas_coordinates, sample_labels

    (atlas, case), (atlas_labels, case_labels) = _phantoms()
    config = RegistrationConfig(refine_iterations=(3, 3, 3)) if check.small else RegistrationConfig()
    places, scores = [], []
    for device in ("cpu", str(check.device)):
        pair = register_arrays(
            atlas, case, atlas_spacing=(SPACING,) * 3, case_spacing=(SPACING,) * 3, config=config, device=device
        )
        places.append(atlas_coordinates(pair))
        labels = sample_labels(torch.from_numpy(atlas_labels.astype(np.int16)), places[-1]).numpy()
        scores.append(_mean_dice(labels, case_labels))
    distance = (places[0] - places[1]).norm(dim=0).flatten()
    return _judged(
        [
            _row("median distance (voxels)", distance.median(), _PLACES[0]),
            _row("99th percentile (voxels)", distance.quantile(0.99), _PLACES[1]),
            _row("Dice difference", abs(scores[0] - scores[1]), _DICE),
        ]
    )


def _mean_dice(found: np.ndarray, truth: np.ndarray) -> float:
    pairs = [(found == label, truth == label) for label in np.unique(truth)[1:]]
    return float(np.mean([2 * (a & b).sum() / max(a.sum() + b.sum(), 1) for a, b in pairs]))


def corrected(check: Check) -> list[Row]:
    """Labels that are corrected by an image's intensities: share of voxels that differ."""
    from nnunet_oneshot.self_training.posterior import posterior_labels

    images, labels = _phantoms()
    image, label = (torch.from_numpy(np.roll(a, s, 1))[None] for a, s in ((images[0], 0), (labels[0].astype(int), 1)))
    found = [
        posterior_labels(image.to(device), label.to(device), blur=1.0, strength=0.6).cpu()
        for device in ("cpu", check.device)
    ]
    return _judged([_row("other labels", (found[0] != found[1]).float().mean(), _LABELS)])


def formats(check: Check) -> list[Row]:
    """The plan's network in each number format, against float32 on the processor: largest deviation of its output."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    manager = check.prepared().configuration_manager
    torch.manual_seed(0)
    network = get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        1,
        5,
        deep_supervision=False,
    ).eval()
    patch = torch.randn((1, 1, *manager.patch_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(patch)
        rows = []
        for name, limit in _FORMATS.items():
            dtype = getattr(torch, name)
            with torch.autocast(check.device.type, dtype=dtype, enabled=name != "float32"):
                output = network.to(check.device)(patch.to(check.device))
            rows.append(_row(name, (output.float().cpu() - expected).abs().max() / expected.abs().max(), limit))
    return _judged(rows)


def registrations(check: Check) -> list[Row]:
    """``nnunet_oneshot register`` of all cases: seconds a pair."""
    from nnunet_oneshot.registration.dataset.command import register

    started = check.synchronised()
    (cache,) = register(
        dataset=_NAME, configuration=_CONFIGURATION, plans_name=check.plans, device=str(check.device), num_processes=1
    )
    pairs = len(list(cache.folder.glob("*/*.npz")))
    seconds = check.synchronised() - started
    return [{"pairs": pairs, "seconds_a_pair": round(seconds / max(pairs, 1), 3)}]


def steps(check: Check) -> list[Row]:
    """One training step of each trainer on both: relative difference of each loss."""
    rows = []
    for name in _TRAINERS:
        losses, batch = [], None
        for device in (torch.device("cpu"), check.device):
            trainer = _trainer(check, name, device)
            batch = next(trainer.dataloader_train) if batch is None else batch
            losses.append(trainer.train_step(batch))
            trainer.on_train_end()
        rows += [
            _row(f"{name}, {term}", abs(losses[1][term] - own) / max(abs(float(own)), 1e-3), _LOSS)
            for term, own in losses[0].items()
        ]
    return _judged(rows)


def _trainer(check: Check, name: str, device: torch.device) -> Any:
    """A trainer before its first step."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    prepared = check.prepared()
    trainer = recursive_find_trainer_class_by_name(name)(
        plans={**prepared.plans, "continue_training": False},
        configuration=_CONFIGURATION,
        fold=0,
        dataset_json=prepared.dataset_json,
        device=device,
    )
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def eager(check: Check) -> list[Row]:
    """Seconds of an iteration and memory of each trainer, without compiling."""
    return _timed(check, "f")


def compiled(check: Check) -> list[Row]:
    """The same with ``torch.compile``, which nnU-Net uses on CUDA."""
    return _timed(check, "t")


def _timed(check: Check, compile_: str) -> list[Row]:
    from nnunet_oneshot.benchmarks.training_speed import TRAINERS, measure

    os.environ["nnUNet_compile"] = compile_
    rows = []
    for name in TRAINERS[::2] if check.small else TRAINERS:
        speed = measure(
            check.prepared(),
            name,
            fold="0",
            device=check.device,
            iterations=1 if check.small else 30,
            warm_up=1 if check.small else 15,
        )
        seconds = {"step_s": round(speed.step, 4), "wait_s": round(speed.wait, 4)}
        memory = None if speed.memory is None else round(speed.memory)
        rows.append({"trainer": name, "compiled": compile_ == "t", **seconds, "memory_mib": memory})
    check.speeds += rows
    return rows


def memory(check: Check) -> list[Row]:
    """Peak memory of the timed trainings against the planner's target; nothing where the device does not tell.

    nnU-Net's own trainer uses these plans without a teacher.
    """
    told = [row for row in check.speeds if row["memory_mib"] is not None]
    names = [f"{row['trainer']}, {'compiled' if row['compiled'] else 'eager'} (MiB)" for row in told]
    limit = check.target * 2**10
    return _judged([_row(name, row["memory_mib"], limit) for name, row in zip(names, told, strict=True)])


PARTS: dict[str, Callable[[Check], list[Row]]] = {
    part.__name__: part
    for part in (plan, warped, registered, corrected, formats, registrations, steps, eager, compiled, memory)
}


def run(check: Check, parts: Sequence[str]) -> list[str]:
    """Runs the parts and writes their tables and the record; returns the names of those that failed."""
    summary: list[Row] = []
    for name in parts:
        started, error, rows = time.perf_counter(), "", []
        try:
            with open(check.out / f"{name}.log", "w", encoding="utf-8") as log, redirect_stdout(log):
                rows = PARTS[name](check)
        except DeviationError as deviation:
            error, rows = str(deviation), deviation.rows
        except Exception as failure:  # whatever it is, the other parts are worth their time
            error = f"{type(failure).__name__}: {failure}".splitlines()[0]
            (check.out / f"{name}.error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        if rows:
            _write(rows, check.out / f"{name}.csv")
        seconds = round(time.perf_counter() - started, 1)
        summary.append({"part": name, "passed": not error, "seconds": seconds, "error": error})
        _write(summary, check.out / "table.csv")
        save_json_atomic(_record(check, summary), check.out / "record.json")
        print(f"{name}: {error or 'ok'} ({seconds} s)", flush=True)
    return [row["part"] for row in summary if not row["passed"]]


def _write(rows: Sequence[Row], path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _record(check: Check, summary: Sequence[Row]) -> dict[str, Any]:
    failed = [row["part"] for row in summary if not row["passed"]]
    machine = platform.processor() or platform.machine()
    if check.device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(check.device)}, CUDA {torch.version.cuda}, {machine}"
    said = f"All but {', '.join(failed)} pass" if failed else "All parts pass"
    return {
        "id": f"gpu_check_{check.device.type}",
        "topic": "Cost and checks",
        "claim": f"{said} on {machine}.",
        "command": f"python -m nnunet_oneshot.benchmarks.gpu_check -o OUT{' --small' if check.small else ''}",
        "commit": _commit(),
        "versions": versions(),
        "machine": f"{machine}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "note": "A rehearsal on small images." if check.small else f"Memory target of the plans: {check.target} GB.",
    }


def _commit() -> str | None:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return found.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit status, which is 1 if a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_oneshot.benchmarks.gpu_check",
        description="Compares the GPU with the processor, times it, and writes tables and a record.",
    )
    parser.add_argument("-o", required=True, metavar="OUT", help="a new folder for tables and record")
    parser.add_argument("--small", action="store_true", help="only rehearse: small images, few iterations")
    parser.add_argument("-device", "--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--target", type=float, default=8, metavar="GB", help="of the plans (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="default: all")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    out = Path(options.o).absolute()
    if is_occupied(out):
        raise OneShotError(f"{out} is not empty: give -o a new folder.")
    device = usable_device(options.device)
    for name in _FOLDERS:
        (out / "work" / name).mkdir(parents=True)
        os.environ[name] = str(out / "work" / name)
    os.environ[VARIABLE] = ext_trainer_value(os.environ.get(VARIABLE))
    os.environ.setdefault("nnUNet_n_proc_DA", "0" if options.small else "8")
    failed = run(Check(out, device, options.small, options.target), options.parts)
    shutil.rmtree(out / "work", ignore_errors=True)
    if failed:
        raise OneShotError(f"These parts failed: {', '.join(failed)}; see table.csv and *.error.txt in {out}.")


if __name__ == "__main__":
    sys.exit(main())
