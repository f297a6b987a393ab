"""Means, paired differences and the closed gap, with bootstrap intervals over cases and atlases.

Rows are those of ``results.json``. A NaN (label absent from reference and prediction) is left out; a label that was
missed counts as 0. Seeds are averaged before anything is resampled: they are repetitions, not a population of interest.
Atlases and cases are crossed (every atlas meets every case), so both are drawn with replacement, independently of each
other (Owen, The pigeonhole bootstrap, Ann. Appl. Stat. 2007).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class ClosedGaps:
    """How much of the gap between two methods the others close.

    Attributes:
        floor: The method at which nothing of it is closed.
        ceiling: The method at which all of it is.
        shares: Each other method with its share; empty where one of the ends was not run.
    """

    floor: str
    ceiling: str
    shares: Mapping[str, Interval]


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one method, averaged over labels and seeds.

    Attributes:
        atlases: Names, the rows of ``values``; one ``None`` for a method that uses every label.
        cases: (fold, case), the columns of ``values``.
        values: (atlases, cases); NaN where a pair was not run.
    """

    atlases: tuple[str | None, ...]
    cases: tuple[tuple[Any, str], ...]
    values: np.ndarray


def score_table(
    rows: Sequence[Mapping[str, Any]], method: str, *, label: str | None = None, metric: str = "dice"
) -> ScoreTable:
    """The scores of a method as a table atlas by case.

    Args:
        rows: Rows of ``results.json``.
        method: Name of the method.
        label: One label, or None: the mean over the labels of each case.
        metric: ``"dice"``, ``"hd95"`` or ``"nsd_2mm"``.
    """
    chosen = [r for r in rows if r["method"] == method and label in (None, r["label"]) and is_number(r[metric])]
    atlases = tuple(dict.fromkeys(r["atlas"] for r in chosen))
    cases = tuple(dict.fromkeys((r["fold"], r["case"]) for r in chosen))
    collected: dict[tuple, dict[Any, list[float]]] = {}
    for row in chosen:
        place = (atlases.index(row["atlas"]), cases.index((row["fold"], row["case"])))
        collected.setdefault(place, {}).setdefault(row["seed"], []).append(row[metric])
    values = np.full((len(atlases), len(cases)), np.nan)
    for place, per_seed in collected.items():
        values[place] = np.mean([np.mean(scores) for scores in per_seed.values()])
    return ScoreTable(atlases, cases, values)


def paired(first: ScoreTable, second: ScoreTable) -> tuple[np.ndarray, np.ndarray]:
    """Values of both tables on their common atlases and cases, (atlases, cases) each.

    A method without an atlas is compared with every atlas of the other.
    """
    atlases = [a for a in first.atlases if a in second.atlases]
    if None in first.atlases or None in second.atlases:
        named = second if None in first.atlases else first
        atlases = list(named.atlases)
    cases = [c for c in first.cases if c in second.cases]
    return _select(first, atlases, cases), _select(second, atlases, cases)


def _select(table: ScoreTable, atlases: Sequence[str | None], cases: Sequence[tuple]) -> np.ndarray:
    rows = [0 if None in table.atlases else table.atlases.index(a) for a in atlases]
    columns = [table.cases.index(c) for c in cases]
    return table.values[np.ix_(rows, columns)] if rows and columns else np.zeros((0, 0))


def mean_score(table: ScoreTable, *, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Mean over atlases and cases with its interval; None where nothing was scored."""
    if not np.isfinite(table.values).any():
        return None
    draws = [np.nanmean(sample) for sample in _resampled(table.values, resamples, seed)]
    return _interval(float(np.nanmean(table.values)), draws)


def mean_difference(first: ScoreTable, second: ScoreTable, *, resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Mean of first minus second over common atlases and cases, with its interval; None where nothing is common."""
    a, b = paired(first, second)
    difference = a - b
    if not np.isfinite(difference).any():
        return None
    draws = [np.nanmean(sample) for sample in _resampled(difference, resamples, seed)]
    return _interval(float(np.nanmean(difference)), draws)


def closed_gap(
    method: ScoreTable, floor: ScoreTable, ceiling: ScoreTable, *, resamples: int = 2000, seed: int = 0
) -> Interval | None:
    """(method - floor) / (ceiling - floor) of the means, with its interval; None where there is no gap or no data."""
    atlases = [a for a in method.atlases if a in floor.atlases] or list(floor.atlases)
    cases = [c for c in method.cases if c in floor.cases and c in ceiling.cases]
    parts = np.stack([_select(t, atlases, cases) for t in (method, floor, ceiling)], axis=-1)
    parts = np.where(np.isfinite(parts).all(axis=-1, keepdims=True), parts, np.nan)
    if parts.size == 0 or not np.isfinite(parts).any():
        return None

    def ratio(values: np.ndarray) -> float:
        m, f, c = np.nanmean(values, axis=(0, 1))
        return (m - f) / (c - f) if c > f else np.nan

    estimate = ratio(parts)
    if not np.isfinite(estimate):
        return None
    return _interval(float(estimate), [ratio(sample) for sample in _resampled(parts, resamples, seed)])


def seed_spread(rows: Sequence[Mapping[str, Any]], method: str) -> float | None:
    """Standard deviation between seeds of the mean Dice; None with fewer than two seeds."""
    seeds = sorted({r["seed"] for r in rows if r["method"] == method and r["seed"] is not None})
    if len(seeds) < 2:
        return None
    tables = [score_table([r for r in rows if r["seed"] == s], method) for s in seeds]
    return float(np.std([np.nanmean(t.values) for t in tables], ddof=1))


def is_number(value: Any) -> bool:
    """Whether a cell of a row holds a score; None and NaN stand for "nothing to score"."""
    return value is not None and np.isfinite(value)


def _resampled(values: np.ndarray, resamples: int, seed: int):
    """Yields the table with atlases (axis 0) and cases (axis 1) drawn with replacement."""
    generator = np.random.default_rng(seed)
    atlases, cases = values.shape[:2]
    for _ in range(resamples):
        rows = generator.integers(0, atlases, atlases)
        columns = generator.integers(0, cases, cases)
        sample = values[np.ix_(rows, columns)]
        if np.isfinite(sample).any():
            yield sample


def _interval(estimate: float, draws: Sequence[float]) -> Interval:
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return Interval(estimate, float(low), float(high))
