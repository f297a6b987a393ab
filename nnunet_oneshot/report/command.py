"""Implements ``nnunet_oneshot report``: one page about registrations and training of the user's own data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.atlas import AtlasChoice, resolve_atlases
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import OneShotError, listed
from nnunet_oneshot.names import check_name
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.ratings import (
    FORMAT,
    RATINGS,
    RATINGS_FILE,
    Rating,
    folder_name,
    keep_ratings,
    stored_ratings,
)
from nnunet_oneshot.registration.dataset.register import cache_of
from nnunet_oneshot.report.conclusion import conclusion
from nnunet_oneshot.report.drawing import chart_svg, style_of
from nnunet_oneshot.report.facts import changed_settings, commands, plan_rows, time_rows, version_rows
from nnunet_oneshot.report.gallery import patches
from nnunet_oneshot.report.labels import labels_of
from nnunet_oneshot.report.page import render, save_page
from nnunet_oneshot.report.registrations import CutMaker, Pair, pairs_of
from nnunet_oneshot.report.training import Training, charts_of, read_training
from nnunet_oneshot.report.validation import Scored, prediction_stack, read_scores
from nnunet_oneshot.self_training.guide import guided_by

# Bytes of all cuts of a page; beyond them only the worst registrations have cuts.
_CUT_BUDGET = 40_000_000


@dataclass(frozen=True)
class _Subject:
    """What a page is about.

    Attributes:
        prepared: The dataset.
        config: Settings in force.
        fold: The fold's cases.
        choice: Its atlases.
        cache: Its registrations.
        trainer: Name of the trainer.
        log: Called with messages.
    """

    prepared: PreparedDataset
    config: OneShotConfig
    fold: Fold
    choice: AtlasChoice
    cache: RegistrationCache
    trainer: str
    log: Callable[[str], None]


def report(
    *,
    dataset: str,
    configuration: str = "3d_fullres",
    plans_name: str = "nnUNetOneShotPlans",
    fold: str = "0",
    trainer: str = "OneShotDistillTrainer",
    out: str | os.PathLike = "report.html",
    ratings: str | os.PathLike | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Writes the page of a fold, after registration or after training.

    Labels of validation cases are read for the scores alone, and only where nnU-Net's validation has been run.

    Args:
        dataset: Name or number of the dataset.
        configuration: For example ``3d_fullres``.
        plans_name: For example ``nnUNetOneShotPlans``.
        fold: A number or ``"all"``.
        trainer: Name of the trainer whose training is shown, if there is one.
        out: The page.
        ratings: A file that such a page exported; it is added to the dataset's ratings first.
        log: Called with messages.

    Returns:
        The page's path.

    Raises:
        OneShotError: The dataset, plans or fold is missing or invalid, nothing is registered yet, a file is damaged, or
            ``out`` is another file or cannot be written.
    """
    check_name(trainer, "trainer", "-tr")
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    if ratings is not None:
        log(f"{keep_ratings(prepared.kept, ratings)} ratings are kept in {prepared.kept / RATINGS_FILE}.")
    config = OneShotConfig.from_plans(prepared.plans)
    cases = prepared.fold(fold)
    choice = resolve_atlases(prepared.base, config, cases, prepared.image_in_common_order, kept=prepared.kept)
    guide = guided_by(config.registration, prepared, fold=cases.number, device=torch.device("cpu"))
    subject = _Subject(prepared, config, cases, choice, cache_of(prepared, guide), trainer, log)
    text = render("report.html", _content(subject, stored_ratings(prepared.kept)))
    save_page(text, out)
    log(f"The page is {Path(out).resolve()} ({len(text.encode()) / 1e6:.1f} MB). Open it in a browser.")
    return Path(out)


def _content(subject: _Subject, ratings: Sequence[Rating]) -> dict[str, Any]:
    """Everything that the template shows."""
    prepared, config, fold = subject.prepared, subject.config, subject.fold
    pairs, missing = pairs_of(subject.cache, subject.choice.atlases, fold, ratings, prepared)
    lines = commands(prepared, str(fold.number), subject.trainer)
    if not pairs:
        raise OneShotError(
            f"No registration of {listed(subject.choice.atlases)} to a case of fold {fold.number} lies in "
            f"{subject.cache.folder}: run `{lines[1]}` first."
        )
    training = read_training(_training_folder(subject))
    shown, cuts, notes = _registration_entries(subject, pairs)
    scored, predictions = _predictions(subject, training, notes)
    gallery = _gallery(subject, pairs, notes)
    return {
        "title": f"{prepared.name}, fold {fold.number}",
        "sentences": conclusion(prepared, fold, subject.choice, pairs, training, scored, subject.trainer),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "atlases": subject.choice.atlases,
        "how": subject.choice.how,
        "labels": labels_of(prepared),
        "label_list": [asdict(label) for label in labels_of(prepared)],
        "pairs": shown,
        "missing": [case for _, case in missing],
        "register_command": lines[1],
        "cuts": {**cuts, **predictions},
        "predictions": [] if scored is None else [(r, c, scored.cases[c]) for r, c in scored.chosen],
        "prediction_cuts": sorted(predictions),
        "scored": scored,
        "charts": [] if training is None else _charts(subject, training),
        "training": training,
        "trainer": subject.trainer,
        "label_names": _ordered_names(prepared),
        "gallery": gallery,
        "notes": notes,
        "channels": prepared.num_channels,
        "plan": plan_rows(prepared),
        "settings": changed_settings(config, training),
        "seed": config.seed,
        "versions": version_rows(pairs, training),
        "times": time_rows(pairs, training),
        "commands": lines,
        "ratings": _ratings_setup(subject),
    }


def _training_folder(subject: _Subject) -> Path:
    """``fold_F`` of the training, which need not exist."""
    root = os.environ.get("nnUNet_results")
    results = Path(root) if root else Path(os.devnull)
    prepared = subject.prepared
    name = f"{subject.trainer}__{prepared.plans_name}__{prepared.configuration}"
    return results / prepared.name / name / f"fold_{subject.fold.number}"


def _registration_entries(
    subject: _Subject, pairs: Sequence[Pair]
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """The pairs for the template, their cuts by identifier, and sentences on what is left out."""
    maker = CutMaker(subject.prepared, subject.cache, labels_of(subject.prepared))
    shown: list[dict[str, Any]] = []
    cuts: dict[str, Any] = {}
    notes: list[str] = []
    size, without = 0, 0
    for number, pair in enumerate(tqdm(pairs, desc="Pictures", disable=len(pairs) < 3)):
        thumbnail = ""
        try:
            pictures = maker.pictures(pair)
            thumbnail = pictures["thumbnail"]
            size += sum(len(src) for image in pictures["stack"]["images"] for src in image["src"])
            if size <= _CUT_BUDGET:
                cuts[f"r{number}"] = pictures["stack"]
            else:
                without += 1
        except OneShotError as error:
            notes.append(str(error))
        shown.append({"id": f"r{number}", "pair": pair, "thumbnail": thumbnail})
    if without:
        notes.append(
            f"The {without} best registrations are shown without cuts, so that the page stays small: their pictures "
            f"lie beside the registrations in {subject.cache.folder}."
        )
    return shown, cuts, notes


def _predictions(
    subject: _Subject, training: Training | None, notes: list[str]
) -> tuple[Scored | None, dict[str, Any]]:
    """Scores and cuts of the best, median and worst validation case."""
    if training is None:
        return None, {}
    folder = training.folder / "validation"
    values = [label.value for label in labels_of(subject.prepared)]
    scored, cuts = None, {}
    try:
        scored = read_scores(subject.prepared, folder)
        for rank, case in [] if scored is None else scored.chosen:
            cuts[f"p-{rank}"] = prediction_stack(subject.prepared, folder, case, values)
    except (OneShotError, KeyError) as error:
        # The scores need no raw image, and a machine may hold the preprocessed data only.
        notes.append(f"Pictures of predictions are left out: {error}")
    return scored, cuts


def _gallery(subject: _Subject, pairs: Sequence[Pair], notes: list[str]) -> list[dict[str, Any]]:
    """Patches of training pairs that are not rated bad."""
    usable = [(p.atlas, p.case) for p in pairs if p.part == "training" and p.rating != "bad"]
    if not usable:
        notes.append("There are no patches to show: no registration to a training case is left.")
        return []
    values = [label.value for label in labels_of(subject.prepared)]
    try:
        return patches(subject.prepared, subject.cache, subject.config, usable, values)
    except OneShotError as error:
        notes.append(f"Patches are left out: {error}")
        return []


def _charts(subject: _Subject, training: Training) -> list[dict[str, Any]]:
    """Drawing, title, explanation and legend of every chart."""
    charts = charts_of(training, _ordered_names(subject.prepared))
    return [
        {"svg": chart_svg(chart), "chart": chart, "legend": [(n, style_of(k)) for k, n in enumerate(chart.series)]}
        for chart in charts
        if chart_svg(chart)
    ]


def _ordered_names(prepared: PreparedDataset) -> list[str]:
    """Names of labels or regions in the order in which nnU-Net logs them."""
    labels = prepared.score_labels()
    if prepared.label_manager.has_regions:
        return list(labels)
    return sorted(labels, key=lambda name: int(np.atleast_1d(labels[name])[0]))


def _ratings_setup(subject: _Subject) -> dict[str, Any]:
    """What the page needs to keep and to export ratings."""
    return {
        "format": FORMAT,
        "dataset": subject.prepared.name,
        "registrations": folder_name(subject.prepared.kept, subject.cache),
        "file": RATINGS_FILE,
        "values": list(RATINGS),
        "target": str(subject.prepared.kept / RATINGS_FILE),
    }
