"""Tables and figures of a benchmark: ``results.json``, ``summary.csv``, ``summary.md`` and ``figures/``."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.evaluation.benchmark_figures import write_benchmark_figures
from nnunet_oneshot.evaluation.methods import CEILING, FAIR_CEILING, FAIR_FLOOR, FLOOR
from nnunet_oneshot.evaluation.runs import rows_of
from nnunet_oneshot.evaluation.statistics import (
    ClosedGaps,
    ScoreTable,
    closed_gap,
    is_number,
    mean_difference,
    score_table,
    seed_spread,
)
from nnunet_oneshot.io import save_json_atomic, save_text_atomic
from nnunet_oneshot.tables import Markup, code, csv_table, markdown_table, plain

MEAN = "mean over labels"
_CONVENTIONS = (
    "Dice, HD95 (mm) and NSD at 2 mm of every validation case in its original grid. A label that is in the reference "
    "and was not found counts as Dice 0, NSD 0 and HD95 = the diagonal of the image; so does a label that was found "
    "and is not in the reference. A label that is in neither is left out. No case and no zero is dropped. Intervals "
    "are 95 % bootstrap intervals over atlases and cases, seeds averaged first; with one atlas they are over cases "
    "only and say nothing about another atlas."
)


def write_benchmark_report(
    out: Path, prepared: PreparedDataset, records: Sequence[Mapping[str, Any]], *, figures: bool = True
) -> None:
    """Writes tables, and figures where wanted, from the records of finished runs.

    Args:
        out: The benchmark's folder.
        prepared: The dataset.
        records: Records of `nnunet_oneshot.evaluation.runs.execute_run`, at least one.
        figures: Whether to draw.
    """
    rows = [row for record in records for row in rows_of(record)]
    save_json_atomic(rows, out / "results.json")
    save_text_atomic(_summary_csv(rows, records), out / "summary.csv")
    gaps = _gaps(rows)
    save_text_atomic(_summary_markdown(rows, records, gaps), out / "summary.md")
    if figures:
        write_benchmark_figures(out, prepared, rows, records, gaps)


def methods_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods of the rows in order of appearance."""
    return list(dict.fromkeys(row["method"] for row in rows))


def _summary_csv(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> str:
    """One line a method and label, over all atlases, folds, seeds and cases."""
    header = ["method", "label", "scores", "not_found", "dice_mean", "dice_sd", "dice_median"]
    header += ["hd95_mean", "nsd_2mm_mean", "runs", "seconds_mean", "peak_memory_mb_max"]
    body: list[list[object]] = []
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for method in methods_in(rows):
        runs = [r for r in records if r["method"] == method]
        memory = [r["peak_memory_mb"] for r in runs if r["peak_memory_mb"] is not None]
        cost = [len(runs), f"{np.mean([r['seconds'] for r in runs]):.1f}", max(memory, default="")]
        for label in [*labels, MEAN]:
            chosen = [r for r in rows if r["method"] == method and label in (MEAN, r["label"]) and is_number(r["dice"])]
            if chosen:
                dice, hd95, nsd = (np.array([r[m] for r in chosen], float) for m in ("dice", "hd95", "nsd_2mm"))
                figures = [dice.mean(), dice.std(), np.median(dice), hd95.mean(), nsd.mean()]
                shown = [f"{value:.4f}" for value in figures]
                body.append([method, label, len(chosen), int((dice == 0).sum()), *shown, *cost])
    return csv_table(header, body)


def _gaps(rows: Sequence[Mapping[str, Any]]) -> ClosedGaps:
    """Share of the gap from the atlas alone to all labels that each method closes.

    Each end is the training with our own optimiser where that was run, else the stock one.
    """
    methods = methods_in(rows)
    floor = FAIR_FLOOR if FAIR_FLOOR in methods else FLOOR
    ceiling = FAIR_CEILING if FAIR_CEILING in methods else CEILING
    if floor not in methods or ceiling not in methods:
        return ClosedGaps(floor, ceiling, {})
    tables = {method: score_table(rows, method) for method in methods}
    found = {
        method: closed_gap(tables[method], tables[floor], tables[ceiling])
        for method in methods
        if method not in (floor, ceiling)
    }
    return ClosedGaps(floor, ceiling, {method: gap for method, gap in found.items() if gap is not None})


def _summary_markdown(rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], gaps: ClosedGaps) -> str:
    methods = methods_in(rows)
    tables = {method: score_table(rows, method) for method in methods}
    first = records[0]
    lines = [f"# {plain(first['dataset'])}: one-shot methods compared", ""]
    lines += [_how(records), "", _CONVENTIONS, "", "## Dice", ""]
    lines += _score_lines(rows, tables, gaps)
    if gaps.shares:
        lines += ["", f"Gap closed: 0 is {code(gaps.floor)}, 1 is {code(gaps.ceiling)}."]
    lines += ["", "## Differences", "", *_difference_lines(tables), "", "## Runs", ""]
    header = ["method", "atlas", "fold", "seed", "epochs", "plans", "seconds", "peak memory (MB)", "mean Dice"]
    body = []
    for record in records:
        scored = [s["dice"] for s in record["scores"] if is_number(s["dice"])]
        cells = [record[k] for k in ("method", "atlas", "fold", "seed", "epochs", "plans")]
        seconds = f"{record['seconds']:.0f}" + (" (resumed)" if record["resumed"] else "")
        mean = f"{np.mean(scored):.4f}" if scored else ""
        body.append([*["" if c is None else str(c) for c in cells], seconds, str(record["peak_memory_mb"] or ""), mean])
    lines += markdown_table(header, body)
    lines += ["", "## Commands", ""]
    for record in records:
        changed = f" (settings: {code(json.dumps(record['overrides']))})" if record["overrides"] else ""
        lines.append(f"- {code(record['command'])}{changed}")
    return "\n".join(lines) + "\n"


def _how(records: Sequence[Mapping[str, Any]]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    devices = ", ".join(sorted({r["device"] for r in records}))
    plans = f"{first['plans']}, configuration {first['configuration']}"
    return (
        f"Made with `nnunet_oneshot benchmark` on {date.today().isoformat()}: plans {plain(plans)}, {len(records)} "
        f"runs on {devices} ({platform.machine()}, {os.cpu_count()} CPU cores); {versions}. An epoch is 250 "
        f"iterations; peak memory is the main memory of the largest process."
    )


def _score_lines(rows: Sequence[Mapping[str, Any]], tables: Mapping[str, ScoreTable], gaps: ClosedGaps) -> list[str]:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    header = ["method", *labels, "mean", "between seeds (SD)", "HD95 (mm)", "NSD 2 mm", "gap closed"]
    body = []
    for method, table in tables.items():
        per_label = [_mean(score_table(rows, method, label=label)) for label in labels]
        spread = seed_spread(rows, method)
        body.append(
            [
                method,
                *[f"{value:.3f}" for value in per_label],
                Markup(f"**{_mean(table):.3f}**"),
                "" if spread is None else f"{spread:.3f}",
                f"{_mean(score_table(rows, method, metric='hd95')):.2f}",
                f"{_mean(score_table(rows, method, metric='nsd_2mm')):.3f}",
                Markup(gaps.shares[method]) if method in gaps.shares else "",
            ]
        )
    return markdown_table(header, body)


def _difference_lines(tables: Mapping[str, ScoreTable]) -> list[str]:
    """The difference of every two methods in mean Dice, on the atlases and cases that both have."""
    methods = list(tables)
    if len(methods) < 2:
        return ["There is one method only."]
    body = []
    for place, second in enumerate(methods):
        for first in methods[place + 1 :]:
            difference = mean_difference(tables[first], tables[second])
            if difference is not None:
                clear = "yes" if difference.low > 0 or difference.high < 0 else "no"
                body.append([f"{first} - {second}", Markup(difference), clear])
    return markdown_table(["difference in mean Dice", "estimate [95 % interval]", "excludes 0"], body)


def _mean(table: ScoreTable) -> float:
    return float(np.nanmean(table.values)) if np.isfinite(table.values).any() else float("nan")
