"""``nnunet_oneshot statistics``: how large the segmented structures are, case by case."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.data.description import check_description
from nnunet_oneshot.data.parallel import default_processes, run_on_cases
from nnunet_oneshot.data.raw import find_images, visible_files
from nnunet_oneshot.data.structures import structures
from nnunet_oneshot.data.verify import detail_of
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import load_json_checked, save_text_atomic
from nnunet_oneshot.tables import csv_table

HEADER = ["case", "label", "voxels", "volume_ml", "touches_border"]


def write_statistics(
    segmentations: str | os.PathLike,
    *,
    out: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    num_processes: int | None = None,
) -> Path:
    """Writes a table with one line a case and label.

    Args:
        segmentations: Folder of segmentations with ``dataset.json``, as ``nnUNetv2_predict`` and ``propagate`` leave
            it, or ``labelsTr`` beside it.
        out: The CSV file; None writes ``statistics.csv`` into the folder.
        images: Folder of the images in nnU-Net's naming, whose mean value in each structure is added.
        num_processes: Processes; None chooses.

    Returns:
        The file.

    Raises:
        OneShotError: There is no segmentation or no description, or a file cannot be read.
    """
    folder = Path(segmentations)
    described = description_of(folder)
    ending = described["file_ending"]
    names = visible_files(folder, ending)
    if not names:
        raise OneShotError(f"{folder} holds no segmentation, no file that ends in {ending}: name another folder.")
    found = find_images(images, ending) if images is not None else {}
    channels = list((described.get("channel_names") or described["modality"]).values()) if images is not None else []
    jobs = []
    for name in names:
        case = name[: -len(ending)]
        if images is not None and len(found.get(case, ())) != len(channels):
            raise OneShotError(f"{images} holds no image of {case} with the channels {channels}: name another folder.")
        jobs.append((str(folder / name), case, found.get(case), described))
    rows = run_on_cases(
        case_statistics, jobs, num_processes=num_processes or default_processes(), description="Segmentations"
    )
    target = Path(out) if out is not None else folder / "statistics.csv"
    header = [*HEADER, *(f"mean_{channel}" for channel in channels)]
    save_text_atomic(csv_table(header, [row for of_case in rows for row in of_case]), target)
    print(f"Wrote {target}: {len(names)} cases.")
    return target


def case_statistics(
    path: str, case: str, images: Sequence[str] | None, described: Mapping[str, Any]
) -> list[list[object]]:
    """The lines of one case: voxels, volume (ml), whether the structure reaches the border, means of the channels.

    Args:
        path: Segmentation.
        case: Its name.
        images: The files of its channels, or None.
        described: ``dataset.json``.

    Raises:
        OneShotError: A file cannot be read, or image and segmentation have other shapes.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    try:
        reader = determine_reader_writer_from_dataset_json(dict(described), path, verbose=False)()
        segmentation, properties = reader.read_seg(path)
        channels = reader.read_images(list(images))[0] if images is not None else np.empty((0, *segmentation.shape[1:]))
    # Readers raise whatever the underlying library raises.
    except Exception as error:
        raise OneShotError(f"Case {case}: {path} or its image cannot be read ({detail_of(error)}).") from error
    if channels.shape[1:] != segmentation.shape[1:]:
        raise OneShotError(
            f"Case {case}: the segmentation {path} has the shape {segmentation.shape[1:]}, its image "
            f"{channels.shape[1:]}: name the folder of the images that were segmented."
        )
    millilitres = float(np.prod(properties["spacing"])) / 1000
    rows: list[list[object]] = []
    for name, values in structures(described).items():
        mask = np.isin(segmentation[0], np.atleast_1d(values))
        count = int(np.count_nonzero(mask))
        means = [f"{float(channel[mask].mean()):.6g}" if count else "" for channel in channels]
        rows.append([case, name, count, f"{count * millilitres:.6g}", "yes" if _on_border(mask) else "no", *means])
    return rows


def _on_border(mask: np.ndarray) -> bool:
    """Whether a mask reaches the first or last voxel of an axis that has more than one."""
    return any(
        bool(mask.take(place, axis=axis).any()) for axis, size in enumerate(mask.shape) for place in (0, -1) if size > 1
    )


def description_of(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a folder of segmentations, in it or one folder above.

    Raises:
        OneShotError: There is none, or it has another shape.
    """
    if not folder.is_dir():
        raise OneShotError(f"{folder} is not a folder: name the one that holds the segmentations.")
    path = next((p for p in (folder / "dataset.json", folder.parent / "dataset.json") if p.is_file()), None)
    if path is None:
        raise OneShotError(
            f"{folder} and the folder above hold no dataset.json, which names the labels: copy that of the data set."
        )
    return check_description(load_json_checked(path, "the data set's description", dict), path)
