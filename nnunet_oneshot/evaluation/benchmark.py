"""Compares one-shot methods on identical cases, atlases and budgets, through nnU-Net's own training and evaluation.

OUT/benchmark.json                                       what is compared; a later call must agree
OUT/runs/<method>/<atlas>/fold_<f>/seed_<s>/run.json     one finished run, with its scores
OUT/runs/<method>/<atlas>/fold_<f>/seed_<s>.lock         held by the process that is at a run
OUT/results.json  summary.csv  summary.md  figures/      see `nnunet_oneshot.evaluation.report`
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_oneshot.config import BLOCK, OneShotConfig, environment_overrides, merge_settings
from nnunet_oneshot.data.atlas import check_labelled, resolve_atlases
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.methods import (
    CEILING,
    Method,
    default_methods,
    parse_method,
    parse_settings,
    trainer_name,
)
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS
from nnunet_oneshot.evaluation.report import write_benchmark_report
from nnunet_oneshot.evaluation.runs import (
    Run,
    claim_folder,
    claimed,
    discard_unfinished,
    execute_run,
    finished_records,
    load_record,
    lock_file,
)

SETTINGS = "benchmark.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        methods: The methods.
        atlases: Labelled cases, each of them an atlas of its own runs; None is the program's choice for each fold.
        folds: Folds whose validation cases are scored.
        seeds: Seeds of every training.
        epochs: Of 250 iterations, of every training; None is nnU-Net's 1000.
        overrides: Settings of the ``oneshot`` block for all methods.
    """

    methods: Sequence[Method]
    atlases: Sequence[str] | None
    folds: Sequence[str]
    seeds: Sequence[int]
    epochs: int | None
    overrides: dict[str, Any]


def run_benchmark(
    *,
    dataset: str,
    out: str | Path,
    atlases: Sequence[str] | None = None,
    folds: Sequence[str] = ("0",),
    seeds: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    plans_name: str = "nnUNetOneShotPlans",
    configuration: str = "3d_fullres",
    epochs: int | None = None,
    settings: Sequence[str] = (),
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs what is not finished yet, and writes tables and figures after every run.

    Args:
        dataset: Name or number of a dataset that is planned and preprocessed, with labelled validation cases.
        out: The benchmark's folder; a benchmark of the same settings is continued.
        atlases: Labelled cases, each of them an atlas of its own runs; None is the program's choice for each fold. An
            atlas is left out of the folds in which it is a validation case.
        folds: Folds whose validation cases are scored.
        seeds: Seeds of every training; None is the plans' seed.
        methods: See `nnunet_oneshot.evaluation.methods`; None is every method that can run here.
        plans_name: Of all methods, the ceiling's too.
        configuration: Such as ``3d_fullres``.
        epochs: Of 250 iterations, of every training; None is nnU-Net's 1000.
        settings: ``key.sub=value`` for the ``oneshot`` block of all methods.
        device: ``cpu``, ``cuda`` or ``mps``.
        log: Receives each line that is shown.

    Returns:
        The records of all finished runs in ``out``, those of earlier calls too.

    Raises:
        OneShotError: Something does not exist, ``out`` holds another benchmark, or runs failed (the others are done).
    """
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    if (first := prepared.configuration_manager.previous_stage_name) is not None:
        raise OneShotError(
            f"{configuration} is the second stage of a cascade, for which a benchmark has no segmentations by the "
            f"first: compare methods with -c {first}, or train both stages with nnUNetv2_train."
        )
    overrides = merge_settings(environment_overrides(), parse_settings(settings))
    config = _checked_config(prepared, overrides)
    for seed in seeds or ():
        _checked_config(prepared, merge_settings(overrides, {"seed": seed}))
    usable_device(device)
    chosen = _methods(methods, prepared, log)
    for method in chosen:
        _checked_config(prepared, merge_settings(overrides, method.overrides))
        if method.trainer:
            trainer_name(method, epochs)
    out = Path(out).absolute()
    _claim(out, prepared, epochs=epochs, overrides=overrides)
    comparison = Comparison(chosen, atlases, folds, seeds or [config.seed], epochs, overrides)
    runs = _plan_runs(prepared, config, comparison, log)
    failures = []
    for number, run in enumerate(runs, start=1):
        try:
            is_new = _run(f"[{number}/{len(runs)}] {run.description}", run, prepared, out, device, log)
        except OneShotError as error:
            log(f"  failed: {error}")
            failures.append(run.description)
            continue
        if is_new:
            write_benchmark_report(out, prepared, finished_records(out), figures=False)
    records = finished_records(out)
    if records:
        write_benchmark_report(out, prepared, records)
        log(f"Wrote {out / 'summary.md'}, summary.csv, results.json and figures")
    if failures:
        raise OneShotError(
            f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}. Their messages are above; the same "
            f"command runs only what is missing."
        )
    return records


def _run(heading: str, run: Run, prepared: PreparedDataset, out: Path, device: str, log: Callable[[str], None]) -> bool:
    """Executes a run that is neither finished nor being executed by another process; says whether it did."""
    with claimed(out, run) as free:
        if not free:
            log(
                f"{heading}: left to another benchmark in this folder, which holds {lock_file(out, run)} (if there "
                f"is none, remove that file and give the command again)"
            )
            return False
        record = load_record(out, run)
        if record is not None:
            log(f"{heading}: finished before, {_mean_dice(record):.4f} mean Dice")
            return False
        log(heading)
        discard_unfinished(out, run)
        start = time.monotonic()
        record = execute_run(run, prepared=prepared, out=out, device=device, log=log)
        log(f"  {_mean_dice(record):.4f} mean Dice, {time.monotonic() - start:.0f} s")
        return True


def _methods(names: Sequence[str] | None, prepared: PreparedDataset, log: Callable[[str], None]) -> list[Method]:
    """The methods asked for, or all that can run; those that cannot are an error when asked for."""
    chosen = []
    for name in dict.fromkeys(names or default_methods()):
        method = parse_method(name)
        try:
            if method.propagation is not None and method.propagation in REGISTRATION_METHODS:
                REGISTRATION_METHODS[method.propagation].require()
            if not method.uses_atlas and set(prepared.labelled) != set(prepared.identifiers):
                raise OneShotError(
                    f"Method {method.base} needs the labels of all cases, and {prepared.name} has "
                    f"{len(prepared.labelled)} of {len(prepared.identifiers)}: leave it out of --methods."
                )
            if method.base == CEILING and prepared.hidden_labels:
                raise OneShotError(
                    f"Method {CEILING} would learn what partly labelled cases do not show as background, and "
                    f"{prepared.name} has {len(prepared.hidden_labels)} such: leave it out of --methods."
                )
        except OneShotError as error:
            if names:
                raise
            log(f"Left out: {error}")
            continue
        chosen.append(method)
    return chosen


def _plan_runs(
    prepared: PreparedDataset, config: OneShotConfig, comparison: Comparison, log: Callable[[str], None]
) -> list[Run]:
    """Every run in the order of execution."""
    if comparison.atlases:
        check_labelled(comparison.atlases, prepared.identifiers, prepared.labelled, "given with --atlas")
    runs: dict[Path, Run] = {}
    for name in comparison.folds:
        fold = prepared.fold(name)
        if not fold.scored:
            raise OneShotError(
                f"Fold {name} of {prepared.name} has no labelled validation case, so there is nothing to compare: "
                f"choose other folds with --fold, or add labels."
            )
        choices = list(_atlas_choices(prepared, config, comparison.atlases, fold, log))
        for seed in comparison.seeds:
            for choice in choices:
                for method in comparison.methods:
                    run = Run(
                        method=method,
                        atlases=choice if method.uses_atlas else None,
                        fold=name,
                        seed=seed if method.trainer else None,
                        epochs=comparison.epochs,
                        overrides=merge_settings(comparison.overrides, method.overrides),
                    )
                    runs.setdefault(run.folder, run)
    return list(runs.values())


def _atlas_choices(
    prepared: PreparedDataset,
    config: OneShotConfig,
    atlases: Sequence[str] | None,
    fold: Fold,
    log: Callable[[str], None],
) -> Iterator[tuple[str, ...]]:
    """The atlases of each run of a fold."""
    if not atlases:
        choice = resolve_atlases(prepared.base, config, fold, prepared.image_in_common_order, kept=prepared.kept)
        log(f"Atlas of fold {fold.number}: {', '.join(choice.atlases)} ({choice.how})")
        yield tuple(choice.atlases)
        return
    for atlas in sorted(set(atlases) - set(fold.train)):
        log(f"Atlas {atlas} is a validation case of fold {fold.number}: left out of that fold.")
    for atlas in dict.fromkeys(atlases):
        if atlas in fold.train:
            yield (atlas,)


def _claim(out: Path, prepared: PreparedDataset, *, epochs: int | None, overrides: dict[str, Any]) -> None:
    """Marks ``out`` with what is compared, or checks that it is the same comparison."""
    wanted = {
        "dataset": prepared.name,
        "plans": prepared.plans_name,
        "configuration": prepared.configuration,
        "epochs": epochs,
        "settings": overrides,
        "plans_checksum": hashlib.sha256(json.dumps(prepared.plans, sort_keys=True).encode()).hexdigest(),
    }
    claim_folder(out / SETTINGS, wanted, "benchmark")


def _checked_config(prepared: PreparedDataset, overrides: dict[str, Any]) -> OneShotConfig:
    """The settings with overrides, checked as the trainers will check them."""
    block = prepared.plans.get(BLOCK, {})
    if isinstance(block, dict):
        block = merge_settings(block, overrides)
    return OneShotConfig.from_plans({**prepared.plans, BLOCK: block})


def _mean_dice(record: dict[str, Any]) -> float:
    values = [s["dice"] for s in record["scores"] if s["dice"] is not None]
    return sum(values) / len(values) if values else float("nan")
