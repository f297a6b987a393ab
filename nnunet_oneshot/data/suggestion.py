"""What ``nnunet_oneshot suggest-atlas`` does: ranks scans by how well they represent the others, from images alone."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nnunet_oneshot import __version__
from nnunet_oneshot.data.fingerprint import survey_images
from nnunet_oneshot.data.image_folder import ImageFolder
from nnunet_oneshot.data.parallel import default_processes, run_on_cases
from nnunet_oneshot.data.raw import RawDataset, find_dataset
from nnunet_oneshot.data.suggestion_figure import contact_sheet
from nnunet_oneshot.data.thumbnails import correlations
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, save_json_atomic, writing

# Rounds of aligning all cases to their mean; the second uses a sharper mean.
_ROUNDS = 2
_SHOWN = 10


@dataclass(frozen=True)
class RankedCase:
    """A case's place in the ranking.

    Attributes:
        rank: 1 is the best atlas.
        case: Its name.
        correlation: Mean correlation to all others after affine alignment.
        correlation_unaligned: The same before alignment, which is what the automatic choice of an atlas goes by.
        most_similar: The case it resembles most.
    """

    rank: int
    case: str
    correlation: float
    correlation_unaligned: float
    most_similar: str


def rank_cases(
    volumes: Mapping[str, np.ndarray], *, num_processes: int = 1, show_progress: bool = False
) -> list[RankedCase]:
    """Ranks cases by their mean correlation to all others.

    Before they are compared, all are aligned to their common mean by affine registration: registration removes
    differences of pose and size whichever case is the atlas, so these must not count against a case.

    Args:
        volumes: Small volumes of equal shape, see `nnunet_oneshot.data.thumbnails.pool_volume`.
        num_processes: Worker processes.
        show_progress: Whether to show progress bars.

    Returns:
        All cases, best first; equals by name.
    """
    names, before = correlations(volumes)
    standard = {name: _standardised(volumes[name]) for name in names}
    aligned = standard
    for number in range(_ROUNDS):
        mean = np.mean([aligned[name] for name in names], axis=0)
        results = run_on_cases(
            _align,
            [(standard[name], mean) for name in names],
            num_processes=num_processes,
            description=f"Aligning images ({number + 1}/{_ROUNDS})",
            show_progress=show_progress,
        )
        aligned = dict(zip(names, results, strict=True))
    _, after = correlations(aligned)
    means, means_before = (_means_without_diagonal(matrix) for matrix in (after, before))
    np.fill_diagonal(after, -np.inf)
    order = sorted(range(len(names)), key=lambda index: (-means[index], names[index]))
    return [
        RankedCase(rank, names[i], float(means[i]), float(means_before[i]), names[int(after[i].argmax())])
        for rank, i in enumerate(order, 1)
    ]


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
    """Ranks the images of a raw data set, or of a folder, and writes the ranking as CSV, JSON and a picture.

    Args:
        dataset: Number or name of a data set below ``nnUNet_raw``; its labels are not opened and need not exist.
        images: A folder of images instead, see `nnunet_oneshot.data.image_folder.ImageFolder`.
        file_ending: Suffix of the images of that folder.
        out: Folder for ``atlas_ranking.csv``, ``.json`` and ``.png``; made where it does not exist.
        num_processes: Worker processes; None for the default.
        show_progress: Whether to show progress bars.
        log: Called with lines for the user.

    Raises:
        OneShotError: Fewer than 3 cases, or an image cannot be used.
    """
    raw = find_dataset(dataset) if dataset is not None else ImageFolder(images, file_ending=file_ending)
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


def _align(volume: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The volume (C, X, Y, Z) affinely resampled onto the template of the same shape."""
    import torch

    from nnunet_oneshot.registration.affine import register_affine
    from nnunet_oneshot.registration.functional import identity_grid, sample_at, transform_points

    flat = volume.shape[1] == 1
    moving, fixed = (array[:, 0] if flat else array for array in (volume, template))
    spacing = (1.0,) * (moving.ndim - 1)
    affine = register_affine(fixed, moving, fixed_spacing=spacing, moving_spacing=spacing).matrix
    points = transform_points(torch.from_numpy(affine).float(), identity_grid(fixed.shape[1:])[None])
    aligned = sample_at(torch.from_numpy(np.ascontiguousarray(moving, np.float32))[None], points)[0].numpy()
    return aligned.reshape(volume.shape)


def _standardised(volume: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, volume.ndim))
    mean, deviation = volume.mean(axes, keepdims=True), volume.std(axes, keepdims=True)
    return ((volume - mean) / np.maximum(deviation, 1e-8)).astype(np.float32)


def _means_without_diagonal(matrix: np.ndarray) -> np.ndarray:
    # Rounded, so that the order of equals does not hang on the order in which a BLAS library adds numbers.
    return np.round((matrix.sum(1) - np.diag(matrix)) / (len(matrix) - 1), 6)


def _best_and_worst(ranking: Sequence[RankedCase]) -> tuple[list[RankedCase], list[RankedCase]]:
    count = min(5, len(ranking) // 2)
    return list(ranking[:count]), list(ranking[-count:])


def _write_csv(ranking: Sequence[RankedCase], target: Path) -> None:
    with atomic_path(target) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(ranking[0])))
        writer.writeheader()
        writer.writerows(asdict(case) for case in ranking)


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
