"""Implements ``nnunet_oneshot suggest-atlas``: which scan to label first, by images alone, and which to label next."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot import __version__
from nnunet_oneshot.data.fingerprint import survey_images
from nnunet_oneshot.data.image_folder import ImageFolder
from nnunet_oneshot.data.parallel import default_processes
from nnunet_oneshot.data.raw import RawDataset, find_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, save_json_atomic, save_text_atomic, writing
from nnunet_oneshot.registration.dataset.agreement import StudentRun, agreement_with_registration
from nnunet_oneshot.registration.dataset.ranking import NextCase, RankedCase, rank_cases, rank_next
from nnunet_oneshot.registration.dataset.suggestion_figure import Ranked, contact_sheet
from nnunet_oneshot.tables import csv_table

_SHOWN = 10


def suggest_atlas(
    *,
    dataset: str | None = None,
    images: str | os.PathLike | None = None,
    file_ending: str = ".nii.gz",
    out: str | os.PathLike = ".",
    num_processes: int | None = None,
    show_progress: bool = True,
    log: Callable[[str], None] = print,
) -> list[RankedCase]:
    """Ranks the images of a raw data set or a folder, and writes the ranking as CSV, JSON and a picture.

    Args:
        dataset: Number or name of a data set in ``nnUNet_raw``; its labels are not opened and need not exist.
        images: Alternatively a folder of images, see `nnunet_oneshot.data.image_folder.ImageFolder`.
        file_ending: Suffix of the images of that folder.
        out: Folder for ``atlas_ranking.csv``, ``.json`` and ``.png``; created if it does not exist.
        num_processes: Worker processes; None for the default.
        show_progress: Whether to show progress bars.
        log: Called with messages for the user.

    Raises:
        OneShotError: Neither a data set nor a folder is given, there are fewer than 3 cases, or an image is unusable.
    """
    raw: RawDataset
    if dataset is not None:
        raw = find_dataset(dataset)
    elif images is not None:
        raw = ImageFolder(images, file_ending=file_ending)
    else:
        raise OneShotError("There are no images to rank: name a data set, or a folder of images.")
    if len(raw.cases) < 3:
        raise OneShotError(
            f"{raw.folder} has {len(raw.cases)} case(s) ({', '.join(raw.cases)}): at least 3 are needed to tell which "
            f"represents the others best. Files named CASE_0000, CASE_0001 are channels of one case."
        )
    processes = num_processes or default_processes()
    ranking = rank_cases(
        _thumbnails(raw, processes, show_progress, log), num_processes=processes, show_progress=show_progress
    )
    how = "mean correlation to the other images after affine alignment at 24 cells an axis; no label seen"
    title = "Most typical (above) and least typical cases: mean correlation to the others"
    _write(ranking, raw, Path(out), name="atlas_ranking", title=title, content={"how": how})
    log(_table(ranking, raw))
    log(f"Label {ranking[0].case} first: it represents the others best. The ranking is in {Path(out).resolve()}.")
    return ranking


def suggest_next(
    *,
    dataset: str,
    student: StudentRun | None = None,
    out: str | os.PathLike = ".",
    num_processes: int | None = None,
    show_progress: bool = True,
    log: Callable[[str], None] = print,
) -> list[NextCase]:
    """Ranks the unlabelled images of a data set by what their label would add; writes CSV, JSON and a picture.

    Args:
        dataset: Number or name of a data set in ``nnUNet_raw`` of which some cases are labelled.
        student: A trained student, whose disagreement with registration then counts too; None ranks by images alone.
        out: Folder for ``next_ranking.csv``, ``.json`` and ``.png``; created if it does not exist.
        num_processes: Worker processes; None for the default.
        show_progress: Whether to show progress bars.
        log: Called with messages for the user.

    Raises:
        OneShotError: No case is labelled, or fewer than two are not, an image is unusable, or the student cannot be
            used.
    """
    raw = find_dataset(dataset)
    unlabelled = sorted(set(raw.cases) - set(raw.labelled))
    if not raw.labelled or len(unlabelled) < 2:
        raise OneShotError(
            f"{raw.folder} has {len(raw.labelled)} labelled and {len(unlabelled)} unlabelled cases: at least 1 and 2 "
            f"are needed to tell which to label next. Without --next, all are ranked as if none were labelled."
        )
    processes = num_processes or default_processes()
    agreement = None if student is None else agreement_with_registration(student, unlabelled, processes, log)
    ranking = rank_next(
        _thumbnails(raw, processes, show_progress, log),
        raw.labelled,
        None if agreement is None else {case: found.mean for case, found in agreement.items()},
        num_processes=processes,
        show_progress=show_progress,
    )
    how = (
        "gain in the mean correlation of all images to the most similar labelled one, after affine alignment at 24 "
        "cells an axis"
    )
    content: dict[str, Any] = {"how": how, "labelled": raw.labelled}
    if agreement is not None and student is not None:
        content["how"] += "; and low Dice between the student and the corrected label that registration carries"
        content["student"] = str(student.folder)
        content["agreement"] = {case: found.labels for case, found in agreement.items()}
    title = "To be labelled first (above) and last: gain in similarity to the labelled cases"
    _write(ranking, raw, Path(out), name="next_ranking", title=title, content=content)
    log(_next_table(ranking))
    log(f"Label {ranking[0].case} next. The ranking is in {Path(out).resolve()}.")
    return ranking


def _thumbnails(
    raw: RawDataset, processes: int, show_progress: bool, log: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """Small copies of all images; see `nnunet_oneshot.data.thumbnails.pool_volume`."""
    surveys = survey_images(raw, num_processes=processes, show_progress=show_progress)
    for survey in surveys.values():
        for warning in survey.warnings:
            log(f"Warning: {warning}")
    return {case: survey.thumbnail for case, survey in surveys.items()}


def _write(
    ranking: Sequence[RankedCase] | Sequence[NextCase],
    raw: RawDataset,
    folder: Path,
    *,
    name: str,
    title: str,
    content: Mapping[str, Any],
) -> None:
    """Writes a ranking as ``name.csv``, ``name.png`` and ``name.json``."""
    rows = [asdict(case) for case in ranking]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        table = csv_table(list(rows[0]), [list(row.values()) for row in rows])
        save_text_atomic(table, folder / f"{name}.csv")
        with atomic_path(folder / f"{name}.png") as temporary:
            contact_sheet(temporary, raw, _first_and_last(ranking), title=title)
    whole = {"ranking": rows, **content, "images": str(raw.folder), "version": __version__}
    save_json_atomic(whole, folder / f"{name}.json")


def _first_and_last(ranking: Sequence[Ranked]) -> tuple[list[Ranked], list[Ranked]]:
    count = min(5, len(ranking) // 2)
    return list(ranking[:count]), list(ranking[-count:])


def _next_table(ranking: Sequence[NextCase]) -> str:
    width = max(len(case.case) for case in ranking)
    agrees = ranking[0].agreement is not None
    lines = [f"rank  {'case':{width}}    gain  similarity{'  agreement' if agrees else ''}  nearest labelled"]
    for case in ranking[: 2 * _SHOWN]:
        agreement = f"  {case.agreement:9.3f}" if case.agreement is not None else ""
        figures = f"{case.gain:6.4f}  {case.similarity:10.3f}{agreement}"
        lines.append(f"{case.rank:4d}  {case.case:{width}}  {figures}  {case.nearest}")
    if len(ranking) > 2 * _SHOWN:
        lines.append(f"      ... {len(ranking) - 2 * _SHOWN} more in next_ranking.csv")
    return "\n".join(lines)


def _table(ranking: Sequence[RankedCase], raw: RawDataset) -> str:
    width = max(len(case.case) for case in ranking)
    lines = [f"rank  {'case':{width}}  correlation  before alignment"]
    shown = ranking if len(ranking) <= 2 * _SHOWN else [*ranking[:_SHOWN], None, *ranking[-_SHOWN:]]
    for case in shown:
        if case is None:
            lines.append(f"      ... {len(ranking) - 2 * _SHOWN} more in atlas_ranking.csv")
            continue
        labelled = "  labelled" if case.case in raw.labelled else ""
        lines.append(
            f"{case.rank:4d}  {case.case:{width}}  {case.correlation:11.3f}  "
            f"{case.correlation_unaligned:16.3f}{labelled}"
        )
    return "\n".join(lines)
