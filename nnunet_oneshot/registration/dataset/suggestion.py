"""Implements ``nnunet_oneshot suggest-atlas``: ranks scans by how well they represent the others, without labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from nnunet_oneshot import __version__
from nnunet_oneshot.data.fingerprint import survey_images
from nnunet_oneshot.data.image_folder import ImageFolder
from nnunet_oneshot.data.parallel import default_processes
from nnunet_oneshot.data.raw import RawDataset, find_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, save_json_atomic, save_text_atomic, writing
from nnunet_oneshot.registration.dataset.ranking import RankedCase, rank_cases
from nnunet_oneshot.registration.dataset.suggestion_figure import contact_sheet
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
    surveys = survey_images(raw, num_processes=processes, show_progress=show_progress)
    for survey in surveys.values():
        for warning in survey.warnings:
            log(f"Warning: {warning}")
    thumbnails = {case: survey.thumbnail for case, survey in surveys.items()}
    ranking = rank_cases(thumbnails, num_processes=processes, show_progress=show_progress)
    folder = Path(out)
    how = "mean correlation to the other images after affine alignment at 24 cells an axis; no label seen"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(ranking, folder / "atlas_ranking.csv")
        shown = _best_and_worst(ranking)
        with atomic_path(folder / "atlas_ranking.png") as temporary:
            contact_sheet(temporary, raw, shown)
    content = {"ranking": [asdict(case) for case in ranking], "how": how, "images": str(raw.folder)}
    save_json_atomic({**content, "version": __version__}, folder / "atlas_ranking.json")
    log(_table(ranking, raw))
    log(f"Label {ranking[0].case} first: it represents the others best. The ranking is in {folder.resolve()}.")
    return ranking


def _best_and_worst(ranking: Sequence[RankedCase]) -> tuple[list[RankedCase], list[RankedCase]]:
    count = min(5, len(ranking) // 2)
    return list(ranking[:count]), list(ranking[-count:])


def _write_csv(ranking: Sequence[RankedCase], target: Path) -> None:
    rows = [asdict(case) for case in ranking]
    save_text_atomic(csv_table(list(rows[0]), [list(row.values()) for row in rows]), target)


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
