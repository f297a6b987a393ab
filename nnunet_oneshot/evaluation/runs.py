"""One run of a benchmark: a method with its atlases, fold and seed, executed by commands, scored and recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_oneshot.config import OVERRIDES_VARIABLE, merge_settings
from nnunet_oneshot.data.fingerprint import lent_fingerprint
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.commands import CommandResult, command_environment, run_command
from nnunet_oneshot.evaluation.methods import CEILING, Method, parse_method, trainer_name
from nnunet_oneshot.evaluation.metrics import score_segmentation
from nnunet_oneshot.evaluation.propagation import read_reference
from nnunet_oneshot.io import Maybe, Shape, is_occupied, load_json_checked, save_json_atomic, writing
from nnunet_oneshot.locks import free, take
from nnunet_oneshot.versions import versions

RECORD = "run.json"
TOLERANCE_MM = 2.0
_RECORD_SHAPE: Shape = {
    **dict.fromkeys(("dataset", "plans", "method", "fold", "command", "device", "segmentations"), str),
    "atlas": Maybe(str),
    "seed": Maybe(int),
    "epochs": Maybe(int),
    "seconds": float,
    "peak_memory_mb": Maybe(float),
    "resumed": bool,
    "overrides": dict,
    "versions": dict,
    "scores": [{"case": str, "label": str, **dict.fromkeys(("dice", "hd95", "nsd_2mm"), Maybe(float))}],
}


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        method: The method.
        atlases: Labelled cases that are warped or trained on; None for a method that uses every label.
        fold: Whose validation cases are scored.
        seed: None for a method without randomness.
        epochs: Of a training; None is the trainer's own length.
        overrides: Settings that differ from the plans, the method's own included.
    """

    method: Method
    atlases: tuple[str, ...] | None
    fold: str
    seed: int | None
    epochs: int | None
    overrides: Mapping[str, Any]

    @property
    def atlas_name(self) -> str | None:
        """One name for the atlases, as in every table."""
        return "+".join(self.atlases) if self.atlases else None

    @property
    def folder(self) -> Path:
        """Where it is kept, relative to the benchmark's folder."""
        atlas = self.atlas_name or "all_labels"
        if len(atlas) > 80:
            atlas = f"{atlas[:60]}..._{len(self.atlases or ())}_atlases"
        seed = "unseeded" if self.seed is None else f"seed_{self.seed}"
        return Path("runs") / self.method.folder / atlas / f"fold_{self.fold}" / seed

    @property
    def description(self) -> str:
        parts = [self.method.name, f"atlas {self.atlas_name}" if self.atlases else "all labels", f"fold {self.fold}"]
        return ", ".join([*parts, f"seed {self.seed}"] if self.seed is not None else parts)


def load_record(out: Path, run: Run) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    path = out / run.folder / RECORD
    return _read_record(path) if path.is_file() else None


def finished_records(out: Path) -> list[dict[str, Any]]:
    """The records of all finished runs of a benchmark, in the order of the methods."""
    records = [_read_record(path) for path in sorted((out / "runs").rglob(RECORD))]
    return sorted(records, key=lambda record: (parse_method(record["method"]).place, record["method"]))


def _read_record(path: Path) -> dict[str, Any]:
    record = load_json_checked(path, "the record of a run", _RECORD_SHAPE)
    try:
        parse_method(record["method"])
    except OneShotError as error:
        raise OneShotError(f"The record of a run {path} is of no method that is known here: {error}") from error
    return record


def lock_file(out: Path, run: Run) -> Path:
    """The file that is locked while a process is at a run."""
    return (out / run.folder).with_suffix(".lock")


@contextmanager
def claimed(out: Path, run: Run) -> Iterator[bool]:
    """Keeps other benchmarks that write to the same folder from a run while it lasts.

    The lock of a process that was killed is free; on a file system without locks every run is.

    Yields:
        Whether the run was free; if not, another process is at it.

    Raises:
        OneShotError: The lock file cannot be written.
    """
    path = lock_file(out, run)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    is_free = take(path, again=False)
    try:
        yield is_free
    finally:
        if is_free:
            free(path)


def execute_run(
    run: Run, *, prepared: PreparedDataset, out: Path, device: str, log: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the commands of a run (resuming a training that was interrupted), scores it and writes its record.

    Args:
        run: What is run.
        prepared: The dataset.
        out: The benchmark's folder.
        device: ``cpu``, ``cuda`` or ``mps``.
        log: Receives each command.

    Returns:
        The record: settings, cost, folder of the segmentations and scores.

    Raises:
        OneShotError: A command failed or left a case without a segmentation.
    """
    folder = out / run.folder
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    overrides = merge_settings(run.overrides, {} if run.atlases is None else {"atlases": list(run.atlases)})
    if run.seed is not None:
        overrides = merge_settings(overrides, {"seed": run.seed})
    environment = command_environment(
        results=folder / "results", variables={OVERRIDES_VARIABLE: json.dumps(overrides)} if overrides else {}
    )
    command, segmentations = _command(run, prepared, folder, device)
    resumed = "--c" in command
    log("$ " + " ".join(command))
    # nnU-Net's own trainer copies the fingerprint to the results, and stops where there is none.
    with lent_fingerprint(prepared.base) if run.method.base == CEILING else nullcontext():
        cost = run_command(command, environment=environment, log_file=folder / "log.txt")
    record = {
        "dataset": prepared.name,
        "plans": prepared.plans_name,
        "configuration": prepared.configuration,
        "method": run.method.name,
        "atlas": run.atlas_name,
        "fold": run.fold,
        "seed": run.seed,
        "epochs": run.epochs if run.method.trainer else None,
        **_cost(cost, resumed=resumed),
        "device": device,
        "overrides": overrides,
        "versions": versions(),
        "segmentations": str(segmentations.relative_to(out)),
        "scores": score_cases(prepared, segmentations, prepared.fold(run.fold).scored),
    }
    save_json_atomic(record, folder / RECORD)
    return record


def _command(run: Run, prepared: PreparedDataset, folder: Path, device: str) -> tuple[list[str], Path]:
    """The command of a run, and where it writes the segmentations of the validation cases."""
    if run.method.propagation:
        segmentations = folder / "segmentations"
        command = ["nnunet_oneshot", "propagate", "-d", prepared.name, "-c", prepared.configuration]
        command += ["-p", prepared.plans_name, "-f", run.fold, "--method", run.method.propagation]
        return [*command, "-o", str(segmentations), "--device", device], segmentations
    trainer = trainer_name(run.method, run.epochs)
    model = folder / "results" / prepared.name / f"{trainer}__{prepared.plans_name}__{prepared.configuration}"
    resumed = any((model / f"fold_{run.fold}").glob("checkpoint_*.pth"))
    command = ["nnUNetv2_train", prepared.name, prepared.configuration, run.fold, "-tr", trainer]
    command += ["-p", prepared.plans_name, "-device", device, *(["--c"] if resumed else [])]
    return command, model / f"fold_{run.fold}" / "validation"


def _cost(result: CommandResult, *, resumed: bool) -> dict[str, Any]:
    """Time and memory; those of a resumed training are of its last part."""
    memory = None if result.peak_memory_mb is None else round(result.peak_memory_mb)
    return {
        "command": result.line,
        "seconds": round(result.seconds, 1),
        "peak_memory_mb": memory,
        "resumed": resumed,
    }


def score_cases(prepared: PreparedDataset, folder: Path, cases: Sequence[str]) -> list[dict[str, Any]]:
    """Dice, HD95 and NSD of every label of every case; what there is nothing to score of is None.

    Raises:
        OneShotError: A case has no segmentation in ``folder``.
    """
    reader = prepared.plans_manager.image_reader_writer_class()
    rows = []
    for case in cases:
        file = folder / f"{case}{prepared.file_ending}"
        if not file.is_file():
            raise OneShotError(f"{file} was not written by the run; see log.txt in the run's folder.")
        reference, properties, _ = read_reference(prepared, case)
        prediction, _ = reader.read_seg(str(file))
        scores = score_segmentation(
            prediction[0],
            reference[0],
            labels=prepared.score_labels(),
            spacing=properties["spacing"],
            tolerance=TOLERANCE_MM,
            ignore_label=prepared.label_manager.ignore_label,
        )
        for label, score in scores.items():
            values = {"dice": score.dice, "hd95": score.hd95, "nsd_2mm": score.nsd}
            rows.append({"case": case, "label": label, **{k: None if v != v else v for k, v in values.items()}})
    return rows


def rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``results.json`` of one run."""
    shared = ("dataset", "method", "atlas", "fold", "seed", "epochs")
    cost = ("seconds", "peak_memory_mb", "versions")
    return [{**{k: record[k] for k in shared}, **scores, **{k: record[k] for k in cost}} for scores in record["scores"]]


def discard_unfinished(out: Path, run: Run) -> None:
    """Removes segmentations that an interrupted label propagation left; trainings are resumed instead."""
    if run.method.propagation and load_record(out, run) is None:
        shutil.rmtree(out / run.folder, ignore_errors=True)


def claim_folder(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Marks the folder of a comparison with what is compared, or checks that it is the same comparison.

    Args:
        path: JSON file in that folder.
        settings: What is compared, as plain JSON types.
        what: What the folder is for, such as ``"benchmark"``.

    Raises:
        OneShotError: The folder holds a comparison of other settings, or something else.
    """
    out = path.parent
    if path.is_file():
        found = load_json_checked(path, "the benchmark's settings", dict)
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            shown = "; ".join(f"{key}: {found.get(key)!r}, now {settings[key]!r}" for key in differing)
            raise OneShotError(f"{out} holds a benchmark of other settings ({shown}): give -o another folder.")
        return
    if is_occupied(out):
        raise OneShotError(f"{out} is not empty and holds no {what}: give -o a new folder.")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    save_json_atomic(settings, path)
