"""Tables for the benchmark of registration methods."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS
from nnunet_oneshot.registration.pair.quality import telling_similarity
from nnunet_oneshot.tables import code, markdown_table, plain

REFERENCE = "syn"
_NOTES = """\
Methods got the same preprocessed images, with the outline that masked normalisation hides; those other than ours,
past the affine stage, the mean of the channels. Labels only score. All methods warp them alike: linear interpolation
of each label's indicator at the place that the method found, then the largest. Dice and HD95 are means over the
labels that the atlas shows, on the preprocessed grid; zeros count, a label that is not found has Dice 0 and as HD95
the diagonal of the image, and a label that neither the warped atlas nor the case shows is left out. Folding is the
share of the case's voxels with a Jacobian determinant <= 0. Seconds are wall-clock time from images in memory to the
transform, CPU seconds those of all threads; labels are warped afterwards. Each method ran its pairs in one process of
its own: peak memory is the largest resident memory of that process, libraries included, and the memory above the
start is without what was resident when the libraries were loaded. SD over atlases is that of the atlases' means.
Ratios are over the pairs that both methods have."""


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of each method, per atlas and over all atlases.

    Args:
        rows: Lines of ``pairs.jsonl``, at least one.

    Returns:
        ``date``, ``atlases``, ``pairs`` (number of distinct pairs), and ``methods``: name to ``all`` and ``atlases``
        (name to figures). Times in seconds, memory in MiB, HD95 in mm; values that cannot be computed are None.
    """
    methods = [method for method in REGISTRATION_METHODS if any(row["method"] == method for row in rows)]
    atlases = sorted({row["atlas"] for row in rows})
    result = {}
    for method in methods:
        per_atlas = {}
        for atlas in atlases:
            here = [row for row in rows if row["atlas"] == atlas]
            if any(row["method"] == method for row in here):
                per_atlas[atlas] = _figures(here, method)
        means = [figures["dice_mean"] for figures in per_atlas.values() if figures["dice_mean"] is not None]
        overall = {
            **_figures(rows, method),
            "dice_mean": _rounded(np.mean, means),
            "dice_sd_atlases": _rounded(_deviation, means),
            "quality_spearman": _rounded(
                np.mean, [v for figures in per_atlas.values() if (v := figures["quality_spearman"]) is not None]
            ),
        }
        result[method] = {"all": overall, "atlases": per_atlas}
    pairs = {(row["atlas"], row["case"]) for row in rows}
    return {"date": date.today().isoformat(), "atlases": atlases, "pairs": len(pairs), "methods": result}


def _figures(rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, Any]:
    """Figures of one method over its rows, compared with the reference's rows for the same pairs."""
    own = {(row["atlas"], row["case"]): row for row in rows if row["method"] == method}
    reference = {(row["atlas"], row["case"]): row for row in rows if row["method"] == REFERENCE}
    common = own.keys() & reference.keys()

    def values(name: str, chosen: Mapping | None = None) -> list[float]:
        chosen = own if chosen is None else chosen
        return [row[name] for row in chosen.values() if row[name] is not None]

    def ratio(name: str, statistic: Any) -> float | None:
        mine, theirs = (values(name, {pair: found[pair] for pair in common}) for found in (own, reference))
        return _rounded(lambda _: statistic(mine) / statistic(theirs), mine if theirs else [])

    dice = values("dice")
    labels = dict.fromkeys(label for row in own.values() for label in row["dice_per_label"])
    above = [
        row["peak_memory_mb"] - row["start_memory_mb"] for row in own.values() if row["start_memory_mb"] is not None
    ]
    return {
        "pairs": len(own),
        "dice_mean": _rounded(np.mean, dice),
        "dice_sd": _rounded(_deviation, dice),
        "dice_median": _rounded(np.median, dice),
        "dice_to_syn": ratio("dice", np.median),
        "dice_per_label": {
            label: _rounded(np.mean, [v for row in own.values() if (v := row["dice_per_label"].get(label)) is not None])
            for label in labels
        },
        "hd95_median": _rounded(np.median, values("hd95")),
        "hd95_to_syn": ratio("hd95", np.median),
        "folding_median": _rounded(np.median, values("folding"), 8),
        "folding_max": _rounded(np.max, values("folding"), 8),
        "seconds_median": _rounded(np.median, values("seconds")),
        "seconds_to_syn": ratio("seconds", np.median),
        "cpu_seconds_median": _rounded(np.median, values("cpu_seconds")),
        "cpu_seconds_to_syn": ratio("cpu_seconds", np.median),
        "peak_memory_mb": _rounded(np.max, values("peak_memory_mb")),
        "peak_memory_to_syn": ratio("peak_memory_mb", np.max),
        "memory_above_start_mb": _rounded(np.max, above),
        "quality_spearman": _rounded(
            _rank_correlation, [row for row in own.values() if row.get("quality") and row["dice"] is not None]
        ),
    }


def _rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float:
    """Spearman's rho of the similarity used to flag pairs and the true Dice; NaN if either is constant."""
    similarity = [telling_similarity(row["quality"]) for row in rows]
    dice = [row["dice"] for row in rows]
    if len(set(similarity)) < 2 or len(set(dice)) < 2:
        return float("nan")
    return float(spearmanr(similarity, dice).statistic)


def summary_markdown(summary: Mapping[str, Any]) -> str:
    """The content of ``summary.md``, from the content of ``summary.json``."""
    methods = summary["methods"]
    found = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    plans, atlases = f"{summary['plans']}, configuration {summary['configuration']}", ", ".join(summary["atlases"])
    lines = [
        f"# {plain(summary['dataset'])}: registration methods compared",
        "",
        f"Plans {plain(plans)}; {summary['pairs']} pairs of "
        f"{len(summary['atlases'])} atlas(es): {plain(atlases)}. {summary['threads']} thread(s), "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, our deformable stage on {summary['device']}. {found}. "
        f"{summary['date']}.",
        "",
        code(summary["command"]),
        "",
        "## Over atlases",
        "",
        *_table({method: content["all"] for method, content in methods.items()}, over_atlases=True),
    ]
    for atlas in summary["atlases"]:
        chosen = {m: content["atlases"][atlas] for m, content in methods.items() if atlas in content["atlases"]}
        lines += ["", f"## Atlas {plain(atlas)}", "", *_table(chosen, over_atlases=False)]
    lines += ["", "## Dice of each label over all pairs", "", *_label_table(methods)]
    for method, content in methods.items():
        if content["all"]["quality_spearman"] is not None:
            values = ", ".join(f"{plain(a)} {_cell(f['quality_spearman'], 2)}" for a, f in content["atlases"].items())
            lines += [
                "",
                "## Quality without labels",
                "",
                f"Spearman's rho of the similarity after registration, by which pairs are flagged, and the true Dice, "
                f"{method}: {_cell(content['all']['quality_spearman'], 2)} in the mean over atlases ({values}).",
            ]
    settings = json.dumps(summary["registration"])
    meanings = [f"- {method}: {' '.join(REGISTRATION_METHODS[method].meaning.split())}" for method in methods]
    return (
        "\n".join([*lines, "", "## Methods", "", *meanings, "", _NOTES, "", f"Our settings: {code(settings)}"]) + "\n"
    )


def _table(methods: Mapping[str, Mapping[str, Any]], *, over_atlases: bool) -> list[str]:
    header = ["method", "pairs", "mean Dice", "SD over pairs", *(["SD over atlases"] if over_atlases else [])]
    header += ["median Dice", "to SyN", "HD95 (mm, median)", "to SyN", "folding (%, median)", "folding (%, max)"]
    header += ["seconds (median)", "to SyN"]
    header += ["CPU seconds (median)", "to SyN", "peak memory (MiB)", "to SyN", "above the start (MiB)"]
    body = []
    for method, figures in methods.items():
        shown = [("dice_mean", 4), ("dice_sd", 4), *([("dice_sd_atlases", 4)] if over_atlases else [])]
        shown += [("dice_median", 4), ("dice_to_syn", 3), ("hd95_median", 2), ("hd95_to_syn", 3)]
        cells = [_cell(figures[name], digits) for name, digits in shown]
        for name in ("folding_median", "folding_max"):
            cells.append(_cell(None if figures[name] is None else 100 * figures[name], 4))
        for value, share in (("seconds_median", "seconds_to_syn"), ("cpu_seconds_median", "cpu_seconds_to_syn")):
            cells += [_cell(figures[value], 2), _cell(figures[share], 3)]
        cells += [_cell(figures["peak_memory_mb"], 0), _cell(figures["peak_memory_to_syn"], 2)]
        body.append([method, str(figures["pairs"]), *cells, _cell(figures["memory_above_start_mb"], 0)])
    return markdown_table(header, body)


def _label_table(methods: Mapping[str, Any]) -> list[str]:
    labels = list(dict.fromkeys(label for content in methods.values() for label in content["all"]["dice_per_label"]))
    body = [
        [method, *[_cell(content["all"]["dice_per_label"].get(label), 4) for label in labels]]
        for method, content in methods.items()
    ]
    return markdown_table(["method", *labels], body)


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _rounded(statistic: Any, values: Sequence[Any], digits: int = 6) -> float | None:
    """A rounded statistic of some values; None if there are no values or the result is not finite."""
    result = float(statistic(values)) if len(values) else float("nan")
    return round(result, digits) if np.isfinite(result) else None
