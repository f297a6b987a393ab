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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunet_oneshot.config import BLOCK, OneShotConfig, environment_overrides
from nnunet_oneshot.data.atlas import check_labelled, resolve_atlases
from nnunet_oneshot.data.labelled import labelled_cases
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import resolve_fold
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.methods import (
    CEILING,
    METHODS,
    Method,
    merge_settings,
    parse_method,
    parse_settings,
    trainer_name,
)
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
from nnunet_oneshot.evaluation.syn import require_ants

SETTINGS = "benchmark.json"


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
    overrides = merge_settings(environment_overrides(), parse_settings(settings))
    config = _checked_config(prepared, overrides)
    usable_device(device)
    labelled = labelled_cases(str(prepared.base), prepared.dataset_json, prepared.identifiers)
    chosen = _methods(methods, prepared, labelled, log)
    for method in chosen:
        _checked_config(prepared, merge_settings(overrides, method.overrides))
        if method.trainer:
            trainer_name(method, epochs)
    out = Path(out).absolute()
    _claim(out, prepared, epochs=epochs, overrides=overrides)
    runs, cases = _plan_runs(
        prepared, config, chosen, atlases, folds, seeds or [config.seed], epochs, overrides, labelled, log
    )
    failures = []
    for number, run in enumerate(runs, start=1):
        heading = f"[{number}/{len(runs)}] {run.description}"
        with claimed(out, run) as free:
            if not free:
                log(
                    f"{heading}: left to another benchmark in this folder, which holds {lock_file(out, run)} (if there "
                    f"is none, remove that file and give the command again)"
                )
                continue
            record = load_record(out, run)
            if record is not None:
                log(f"{heading}: finished before, {_mean_dice(record):.4f} mean Dice")
                continue
            log(heading)
            discard_unfinished(out, run)
            start = time.monotonic()
            try:
                record = execute_run(run, prepared=prepared, out=out, cases=cases[run.fold], device=device, log=log)
            except OneShotError as error:
                log(f"  failed: {error}")
                failures.append(run.description)
                continue
            log(f"  {_mean_dice(record):.4f} mean Dice, {time.monotonic() - start:.0f} s")
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


def _methods(
    names: Sequence[str] | None, prepared: PreparedDataset, labelled: Sequence[str], log: Callable[[str], None]
) -> list[Method]:
    """The methods asked for, or all that can run; those that cannot are an error when asked for."""
    chosen = []
    for name in dict.fromkeys(names or METHODS):
        method = parse_method(name)
        try:
            if method.base == "syn":
                require_ants()
            if method.base == CEILING and set(labelled) != set(prepared.identifiers):
                raise OneShotError(
                    f"Method {CEILING} needs the labels of all cases, and {prepared.name} has {len(labelled)} of "
                    f"{len(prepared.identifiers)}: leave it out of --methods."
                )
        except OneShotError as error:
            if names:
                raise
            log(f"Left out: {error}")
            continue
        chosen.append(method)
    return chosen


def _plan_runs(
    prepared: PreparedDataset,
    config: OneShotConfig,
    methods: Sequence[Method],
    atlases: Sequence[str] | None,
    folds: Sequence[str],
    seeds: Sequence[int],
    epochs: int | None,
    overrides: dict[str, Any],
    labelled: Sequence[str],
    log: Callable[[str], None],
) -> tuple[list[Run], dict[str, list[str]]]:
    """Every run in the order of execution, and the cases scored in each fold."""
    base = str(prepared.base)
    if atlases:
        check_labelled(atlases, prepared.identifiers, labelled, "given with --atlas")
    runs: list[Run] = []
    cases: dict[str, list[str]] = {}
    for fold in folds:
        train, validation = resolve_fold(base, prepared.identifiers, labelled, int(fold))
        cases[fold] = [case for case in validation if case in labelled]
        if not cases[fold]:
            raise OneShotError(
                f"Fold {fold} of {prepared.name} has no labelled validation case, so there is nothing to compare: "
                f"choose other folds with --fold, or add labels."
            )
        if atlases:
            choices = [(atlas,) for atlas in dict.fromkeys(atlases) if atlas in train]
            for atlas in sorted(set(atlases) - set(train)):
                log(f"Atlas {atlas} is a validation case of fold {fold}: left out of that fold.")
        else:
            choice = resolve_atlases(base, config, train, validation, labelled, int(fold), prepared.image)
            log(f"Atlas of fold {fold}: {', '.join(choice.atlases)} ({choice.how})")
            choices = [tuple(choice.atlases)]
        for seed in seeds:
            for choice in choices:
                for method in methods:
                    run = Run(
                        method=method,
                        atlases=choice if method.uses_atlas else None,
                        fold=fold,
                        seed=seed if method.trainer else None,
                        epochs=epochs,
                        overrides=merge_settings(overrides, method.overrides),
                    )
                    if all(run.folder != other.folder for other in runs):
                        runs.append(run)
    return runs, cases


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
    merged = merge_settings(prepared.plans.get(BLOCK, {}), overrides)
    return OneShotConfig.from_plans({**prepared.plans, BLOCK: merged})


def _mean_dice(record: dict[str, Any]) -> float:
    values = [s["dice"] for s in record["scores"] if s["dice"] is not None]
    return sum(values) / len(values) if values else float("nan")
