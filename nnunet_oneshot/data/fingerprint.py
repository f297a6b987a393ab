"""The data set's fingerprint: geometry of all images, intensities of the atlases' foreground, no other label opened.

It is kept in ``oneshot_fingerprint.json``. ``dataset_fingerprint.json`` is left to nnU-Net, which makes it of all
labels, and not again where it is: with a copy of ours there, plans of stock nnU-Net would have one atlas's statistics.
Where nnU-Net's own code wants that file, ours stands in for it, see `fingerprint_standing_in` and `lent_fingerprint`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nnunet_oneshot.data.lookalikes import Row, longest_row
from nnunet_oneshot.data.orientation import axes_of, in_common_order, name_of
from nnunet_oneshot.data.parallel import run_on_cases
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.thumbnails import pool_volume
from nnunet_oneshot.data.verify import CaseImage, read_image, read_label
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, load_json_checked, save_json_atomic, writing
from nnunet_oneshot.names import is_list_of_names

FINGERPRINT_FILE = "oneshot_fingerprint.json"
NNUNET_FINGERPRINT_FILE = "dataset_fingerprint.json"
_INTENSITY_SAMPLES = 10_000_000


@dataclass(frozen=True)
class CaseSurvey:
    """What planning needs to know of an image.

    Attributes:
        shape: Shape (X, Y, Z) after cropping to nonzero voxels.
        spacing: mm, in the order of the axes.
        relative_size: Share of the voxels that cropping keeps.
        thumbnail: See `nnunet_oneshot.data.thumbnails.pool_volume`; its axes lie in one order for all cases.
        order: The order in which the file stores its axes, such as ``SPL``.
        warnings: For the user.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    relative_size: float
    thumbnail: np.ndarray
    order: str
    warnings: list[str]


def survey_images(raw: RawDataset, *, num_processes: int, show_progress: bool = True) -> dict[str, CaseSurvey]:
    """Reads and checks every image; opens no label.

    Raises:
        OneShotError: An image is damaged or does not fit ``dataset.json``, see `nnunet_oneshot.data.verify`.
    """
    jobs = [(case, raw.images(case), raw.reader_class, raw.channel_names) for case in raw.cases]
    surveys = run_on_cases(
        _survey_case,
        jobs,
        num_processes=num_processes,
        description="Checking images",
        show_progress=show_progress,
    )
    dimensions = {case: survey.shape[0] == 1 for case, survey in zip(raw.cases, surveys, strict=True)}
    if len(set(dimensions.values())) > 1:
        flat = [case for case, is_flat in dimensions.items() if is_flat]
        raise OneShotError(
            f"{raw.name} mixes 2D images ({', '.join(flat[:5])}) with volumes: make one data set of each."
        )
    return dict(zip(raw.cases, surveys, strict=True))


def _survey_case(case: str, files: list[str], reader_class: type, channel_names: list[str]) -> CaseSurvey:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    image = read_image(case, files, reader_class, channel_names)
    cropped, _, _ = crop_to_nonzero(image.data)
    axes = axes_of(image.properties)
    return CaseSurvey(
        shape=tuple(int(size) for size in cropped.shape[1:]),
        spacing=tuple(float(value) for value in image.properties["spacing"]),
        relative_size=float(np.prod(cropped.shape[1:]) / np.prod(image.data.shape[1:])),
        thumbnail=pool_volume(in_common_order(cropped, axes)),
        order=name_of(axes),
        warnings=image.warnings,
    )


def read_labelled_case(raw: RawDataset, case: str) -> tuple[CaseImage, np.ndarray, list[str]]:
    """Image, label (1, X, Y, Z) and warnings of a labelled case, both checked."""
    image = read_image(case, raw.images(case), raw.reader_class, raw.channel_names)
    label, warnings = read_label(raw, case, image)
    return image, label, warnings


def make_fingerprint(
    raw: RawDataset, surveys: Mapping[str, CaseSurvey], atlases: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The fingerprint in nnU-Net's layout, and warnings about the atlases' labels.

    Intensity statistics come from voxels inside the atlases' labels, each atlas counting the same, as each case does in
    nnU-Net.

    Raises:
        OneShotError: An atlas's label is missing, damaged, empty or does not fit.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    samples: list[list[np.ndarray]] = []
    warnings: list[str] = []
    rows: list[Row] = []
    for case in atlases:
        image, label, found = read_labelled_case(raw, case)
        warnings += found
        cropped, cropped_label, _ = crop_to_nonzero(image.data, label)
        intensities, _ = DatasetFingerprintExtractor.collect_foreground_intensities(
            cropped_label, cropped, num_samples=_INTENSITY_SAMPLES // len(atlases)
        )
        samples.append(intensities)
        row = longest_row(cropped, cropped_label[0], image.properties["spacing"])
        rows += [] if row is None else [row]
    ordered = [surveys[case] for case in raw.cases]
    fingerprint: dict[str, Any] = {
        "spacings": [list(survey.spacing) for survey in ordered],
        "shapes_after_crop": [list(survey.shape) for survey in ordered],
        "foreground_intensity_properties_per_channel": {
            str(channel): _statistics(np.concatenate([atlas[channel] for atlas in samples]))
            for channel in range(len(raw.channel_names))
        },
        "median_relative_size_after_cropping": float(np.median([survey.relative_size for survey in ordered])),
        "oneshot": {"atlases": list(atlases), "cases": raw.cases},
    }
    if raw.hidden_labels:
        fingerprint["oneshot"]["hidden"] = _hidden(raw)
    if rows:
        longest = max(rows, key=lambda row: max(row.extent))
        fingerprint["oneshot"]["row"] = {"labels": list(longest.labels), "extent": list(longest.extent)}
    return fingerprint, warnings


def save_fingerprint(fingerprint: Mapping[str, Any], folder: Path) -> None:
    """Writes the fingerprint of ``nnUNet_preprocessed/DatasetXXX_Name``; nnU-Net's own is left as it is."""
    remove_copy(folder)
    save_json_atomic(fingerprint, folder / FINGERPRINT_FILE)


def load_fingerprint(folder: Path) -> dict[str, Any]:
    """Reads the fingerprint of ``nnUNet_preprocessed/DatasetXXX_Name``.

    Raises:
        OneShotError: It is missing or damaged.
    """
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        raise OneShotError(f"The fingerprint {path} does not exist: run `nnunet_oneshot plan_and_preprocess`.")
    fingerprint = load_json_checked(path, "the fingerprint", dict)
    if not _is_fingerprint(fingerprint):
        raise OneShotError(
            f"{path} does not hold a fingerprint as `nnunet_oneshot plan_and_preprocess` writes it: delete it and run "
            f"that command again."
        )
    return fingerprint


def _is_fingerprint(content: Any) -> bool:
    """Whether a fingerprint has the entries that planning reads, for each of its cases and channels."""
    try:
        own = content["oneshot"]
        atlases, cases = own["atlases"], own["cases"]
        row = own.get("row", {"labels": [], "extent": np.zeros(3)})
        labels, extent = list(row["labels"]), np.array(row["extent"])
        geometry = np.array([content["spacings"], content["shapes_after_crop"]])
        channels = content["foreground_intensity_properties_per_channel"].values()
        others = np.array(
            [content["median_relative_size_after_cropping"], *(one[n] for one in channels for n in _STATISTICS)]
        )
    # What is indexed may be anything.
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return False
    lists = is_list_of_names(atlases) and is_list_of_names(cases) and geometry.shape == (2, len(cases), 3)
    rows = extent.shape == (3,) and all(type(label) is int for label in labels)
    return lists and rows and all(a.dtype.kind in "if" and np.isfinite(a).all() for a in (geometry, others, extent))


def remove_copy(folder: Path) -> None:
    """Removes nnU-Net's fingerprint where it is a copy of ours, byte for byte, as earlier versions left it."""
    own, copy = folder / FINGERPRINT_FILE, folder / NNUNET_FINGERPRINT_FILE
    if own.is_file() and copy.is_file() and own.read_bytes() == copy.read_bytes():
        with writing(copy):
            copy.unlink()


@contextmanager
def fingerprint_standing_in(module: ModuleType, folder: Path) -> Iterator[None]:
    """While it lasts, code of a module of nnU-Net finds our fingerprint where it looks for its own.

    Nothing is written, so that trainings and plannings beside this one notice nothing. The module must build the path
    by its own name ``join``. A folder without our fingerprint changes nothing.

    Args:
        module: The module, such as that of ``nnUNetTrainer``.
        folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
    """
    join = module.join
    wanted, own = folder / NNUNET_FINGERPRINT_FILE, folder / FINGERPRINT_FILE

    def redirected(*parts: str | os.PathLike) -> str:
        path = join(*parts)
        return str(own) if Path(path) == wanted and own.is_file() else path

    module.join = redirected  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.join = join  # type: ignore[attr-defined]


@contextmanager
def lent_fingerprint(folder: Path) -> Iterator[None]:
    """While it lasts, a copy of our fingerprint lies under nnU-Net's name, for nnU-Net's own trainer as a command.

    Args:
        folder: ``nnUNet_preprocessed/DatasetXXX_Name``; one that has nnU-Net's fingerprint, or lacks ours, is left as
            it is.
    """
    own, copy = folder / FINGERPRINT_FILE, folder / NNUNET_FINGERPRINT_FILE
    if own.is_file() and not copy.exists():
        with writing(copy), atomic_path(copy) as temporary:
            shutil.copyfile(own, temporary)
    try:
        yield
    finally:
        remove_copy(folder)


def images_unchanged(raw: RawDataset, folder: Path) -> bool:
    """Whether the stored fingerprint is of these cases and younger than all their images."""
    return _is_current(raw, folder, [path for case in raw.cases for path in raw.images(case)])


def fingerprint_unchanged(raw: RawDataset, folder: Path, atlases: Sequence[str]) -> bool:
    """Whether the stored fingerprint is of these images and of these atlases with their present labels."""
    labels = [path for case in atlases if (path := raw.label(case)) is not None]
    return (
        images_unchanged(raw, folder)
        and _is_current(raw, folder, labels)
        and load_fingerprint(folder)["oneshot"]["atlases"] == list(atlases)
        and load_fingerprint(folder)["oneshot"].get("hidden", {}) == _hidden(raw)
    )


def _hidden(raw: RawDataset) -> dict[str, list[int]]:
    """What partly labelled cases do not show: a change of it has their labels checked again."""
    return {case: list(labels) for case, labels in raw.hidden_labels.items()}


def _is_current(raw: RawDataset, folder: Path, files: Sequence[str]) -> bool:
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        return False
    try:
        if load_fingerprint(folder)["oneshot"]["cases"] != raw.cases:
            return False
    except OneShotError:
        return False
    made = path.stat().st_mtime
    # A file moved or copied over another keeps its modification time but not its change time.
    return all(max(os.stat(file).st_mtime, os.stat(file).st_ctime) < made for file in files)


_STATISTICS = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    found = (np.mean(values), median, np.std(values), np.min(values), np.max(values), high, low)
    return {name: float(value) for name, value in zip(_STATISTICS, found, strict=True)}
