"""Figures of a benchmark: box plots, closed gap, number of unlabelled cases, example segmentations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.config import OneShotConfig, merge_settings
from nnunet_oneshot.data.atlas import AtlasChoice
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.roles import assign_roles
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.figures import Example, bar_figure, box_plot_per_label, example_figure, line_figure
from nnunet_oneshot.evaluation.methods import parse_method
from nnunet_oneshot.evaluation.statistics import ClosedGaps, is_number
from nnunet_oneshot.io import require_env

_SHOWN = ("registration", "nnunet-atlas", "synthesis", "distill", "nnunet-full")


def write_benchmark_figures(
    out: Path,
    prepared: PreparedDataset,
    rows: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    gaps: ClosedGaps,
) -> None:
    """Draws what the finished runs allow into ``out/figures``.

    Args:
        out: The benchmark's folder.
        prepared: The dataset.
        rows: Rows of ``results.json``.
        records: Records of the runs.
        gaps: The share of the gap that each method closes.
    """
    folder = out / "figures"
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for metric, name in (("dice", "Dice"), ("hd95", "HD95 (mm)"), ("nsd_2mm", "NSD at 2 mm")):
        scores: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
        for row in rows:
            if is_number(row[metric]):
                scores[row["label"]].setdefault(row["method"], []).append(row[metric])
        box_plot_per_label(folder / f"{metric}_per_label.png", scores, quantity=name)
    if gaps.shares:
        bar_figure(
            folder / "gap_closed.png",
            {method: gap.value for method, gap in gaps.shares.items()},
            intervals={method: (gap.low, gap.high) for method, gap in gaps.shares.items()},
            quantity=f"share of the gap from {gaps.floor} to {gaps.ceiling} that is closed",
        )
    series = _dice_by_unlabelled_cases(prepared, records)
    if series:
        line_figure(
            folder / "dice_by_unlabelled_cases.png",
            series,
            horizontal="unlabelled training cases",
            vertical="mean Dice of a run",
        )
    _write_examples(folder, out, prepared, records)


def _dice_by_unlabelled_cases(
    prepared: PreparedDataset, records: Sequence[Mapping[str, Any]]
) -> dict[str, dict[float, list[float]]]:
    """Method to number of unlabelled cases to the mean Dice of its runs; methods run with one number are left out."""
    series: dict[str, dict[float, list[float]]] = {}
    for record in records:
        method = parse_method(record["method"])
        others = {k: v for k, v in method.overrides.items() if k != "unlabelled_fraction"}
        scored = [s["dice"] for s in record["scores"] if is_number(s["dice"])]
        if method.trainer is None or not method.uses_atlas or others or not scored:
            continue
        block = merge_settings(prepared.plans.get("oneshot", {}), record["overrides"])
        config = OneShotConfig.from_plans({**prepared.plans, "oneshot": block})
        choice = AtlasChoice(list(config.atlases or ()), "")
        roles = assign_roles(choice, prepared.fold(record["fold"]), config)
        series.setdefault(method.base, {}).setdefault(len(roles.unlabelled), []).append(float(np.mean(scored)))
    return {method: points for method, points in series.items() if len(points) > 1}


def _write_examples(folder: Path, out: Path, prepared: PreparedDataset, records: Sequence[Mapping[str, Any]]) -> None:
    """The best, median and worst case of one method, with the segmentations of the main methods beside it.

    Runs whose segmentations were removed are left out: their scores are in their records.
    """
    records = [record for record in records if (out / record["segmentations"]).is_dir()]
    if not records:
        return
    names = [record["method"] for record in records]
    order = [*reversed([m for m in _SHOWN[:4] if m in names]), *names]
    leading = [record for record in records if record["method"] == order[0]][0]
    same = {"fold": leading["fold"]}
    shown: dict[str, Mapping[str, Any]] = {}
    for record in records:
        fits = record["fold"] == same["fold"] and record["atlas"] in (leading["atlas"], None)
        if fits and record["method"] in (*_SHOWN, leading["method"]):
            shown.setdefault(record["method"], record)
    shown = dict(sorted(shown.items(), key=lambda item: parse_method(item[0]).place))
    means = _case_means(leading)
    ranked = sorted(means, key=lambda case: means[case], reverse=True)
    if not ranked:
        return
    chosen = dict.fromkeys([("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])])
    try:
        raw = RawDataset(require_env("nnUNet_raw")[0] / prepared.name)
        examples = [_example(f"{rank}: {case}", case, out, prepared, raw, shown) for rank, case in chosen]
    except (OneShotError, KeyError):
        # The pictures need the raw images, the scores do not: a machine may hold the preprocessed data only.
        return
    values = prepared.score_labels()
    label_names = {int(np.atleast_1d(value)[-1]): name for name, value in values.items()}
    example_figure(folder / "examples.png", examples, label_names=label_names)


def _case_means(record: Mapping[str, Any]) -> dict[str, float]:
    per_case: dict[str, list[float]] = {}
    for score in record["scores"]:
        if is_number(score["dice"]):
            per_case.setdefault(score["case"], []).append(score["dice"])
    return {case: float(np.mean(values)) for case, values in per_case.items()}


def _example(
    title: str,
    case: str,
    out: Path,
    prepared: PreparedDataset,
    raw: RawDataset,
    shown: Mapping[str, Mapping[str, Any]],
) -> Example:
    reader = prepared.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images(raw.images(case))
    file = f"{case}{prepared.file_ending}"
    segmentations = {"reference": reader.read_seg(str(prepared.labels_folder / file))[0][0]}
    for method, record in shown.items():
        segmentation, _ = reader.read_seg(str(out / record["segmentations"] / file))
        segmentations[f"{method}, Dice {_case_means(record)[case]:.2f}"] = segmentation[0]
    return Example(title, image[0], properties["spacing"], segmentations)
