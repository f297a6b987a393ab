"""A data set in nnU-Net's raw format of which only some cases are labelled."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_oneshot.data.description import check_description, checked_labels
from nnunet_oneshot.data.headers import file_order, is_nifti
from nnunet_oneshot.data.partial import hidden_labels
from nnunet_oneshot.errors import NotReadyError, OneShotError
from nnunet_oneshot.io import load_json_checked, require_env
from nnunet_oneshot.names import check_name

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>[0-9]{4})", re.DOTALL)
# nnU-Net keeps the preprocessed label of a case in a file named so.
_LABEL_SUFFIX = "_seg"


class RawDataset:
    """The files of a raw data set, without opening any image or label.

    Args:
        folder: The folder ``DatasetXXX_Name``. Cases are found in ``imagesTr`` and ``labelsTr``, or listed under
            ``dataset`` in ``dataset.json``, where an entry may lack a label.

    Attributes:
        folder: As given.
        name: Name of the folder.
        dataset_json: Content of ``dataset.json``.
        cases: Names of the training cases, sorted.
        labelled: The cases whose label file exists, sorted.

    Raises:
        OneShotError: The folder is incomplete or ``dataset.json`` lacks something.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        path = self.folder / "dataset.json"
        self.dataset_json: dict[str, Any] = check_description(
            load_json_checked(path, "the data set's description", dict), path
        )
        self._files = self._listed_files() if "dataset" in self.dataset_json else self._found_files()
        self.cases: list[str] = sorted(self._files)
        self.labelled: list[str] = [case for case in self.cases if self.label(case) is not None]

    @property
    def file_ending(self) -> str:
        """Suffix of images and labels, such as ``.nii.gz``."""
        return self.dataset_json["file_ending"]

    @property
    def channel_names(self) -> list[str]:
        """Names of the image channels, in order."""
        names = self.dataset_json.get("channel_names") or self.dataset_json["modality"]
        return [str(name) for name in names.values()]

    def images(self, case: str) -> list[str]:
        """Paths of the case's channels, in order."""
        return self._files[case][0]

    def label(self, case: str) -> str | None:
        """Path of the case's label file, or None where it does not exist."""
        path = self.expected_label(case)
        return path if path is not None and os.path.isfile(path) else None

    def expected_label(self, case: str) -> str | None:
        """Path at which the case's label would lie, or None where ``dataset.json`` lists none."""
        return self._files[case][1]

    @property
    def hidden_labels(self) -> dict[str, tuple[int, ...]]:
        """Partly labelled cases with the labels that they do not show; see `nnunet_oneshot.data.partial`."""
        return hidden_labels(self.dataset_json)

    @cached_property
    def label_manager(self) -> Any:
        """nnU-Net's label manager for ``dataset.json``.

        Raises:
            OneShotError: The labels are not what nnU-Net accepts.
        """
        from nnunetv2.utilities.label_handling.label_handling import LabelManager

        return checked_labels(
            lambda: LabelManager(self.dataset_json["labels"], self.dataset_json.get("regions_class_order")),
            self.folder / "dataset.json",
        )

    @cached_property
    def reader_class(self) -> type:
        """nnU-Net's reader for these images.

        It is chosen as nnU-Net chooses it, by ``dataset.json``, by suffix and by a trial on the first image, but where
        NIfTI files are stored in different axis orders it is nnU-Net's reader that reorients: a network would have to
        learn every order.

        Raises:
            OneShotError: The suffix is not one that nnU-Net reads, or no reader can open the first image.
        """
        import contextlib
        import io

        from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
        from nnunetv2.imageio.reader_writer_registry import (
            LIST_OF_IO_CLASSES,
            determine_reader_writer_from_dataset_json,
        )

        _check_reader(self.dataset_json.get("overwrite_image_reader_writer", "None"), self.folder / "dataset.json")
        known = sorted({ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings})
        if self.file_ending.lower() not in known:
            raise OneShotError(
                f'"file_ending" in {self.folder / "dataset.json"} is {self.file_ending!r}: nnU-Net reads {known}.'
            )
        example = self.images(self.cases[0])[0]
        trace = io.StringIO()
        try:
            with contextlib.redirect_stderr(trace):
                found = determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)
        except RuntimeError as error:
            lines = trace.getvalue().strip().splitlines()
            raise OneShotError(
                f"Case {self.cases[0]}: {example} cannot be read ({lines[-1] if lines else error}). "
                f"The file is damaged or not of its suffix's format: replace it or remove the case."
            ) from error
        return NibabelIOWithReorient if self.reoriented else found

    @cached_property
    def reoriented(self) -> dict[str, str]:
        """The axis order of each case's first file, if they differ and `reader_class` reorients; else nothing."""
        if "overwrite_image_reader_writer" in self.dataset_json or not is_nifti(f"x{self.file_ending}"):
            return {}
        orders: dict[str, str] = {}
        for case in self.cases:
            order = file_order(self.images(case)[0])
            # What is no volume that can be read is told of when it is read.
            if order is None:
                return {}
            orders[case] = order
        return orders if len(set(orders.values())) > 1 else {}

    def _found_files(self) -> dict[str, tuple[list[str], str | None]]:
        """Images and label path of every case in ``imagesTr``."""
        labels = self.folder / "labelsTr"
        return {
            _training_name(case, self.folder / "imagesTr"): (files, str(labels / f"{case}{self.file_ending}"))
            for case, files in find_images(self.folder / "imagesTr", self.file_ending).items()
        }

    def _listed_files(self) -> dict[str, tuple[list[str], str | None]]:
        """Images and label path of every case listed in ``dataset.json``, relative paths taken from its folder."""

        def absolute(path: str) -> str:
            return os.path.abspath(os.path.join(self.folder, os.path.expandvars(path)))

        path = self.folder / "dataset.json"
        files = {}
        for case, entry in self.dataset_json["dataset"].items():
            _training_name(case, path)
            images = entry.get("images") if isinstance(entry, Mapping) else None
            if not isinstance(images, list) or not images or not all(isinstance(file, str) for file in images):
                raise OneShotError(f'Case {case} in {path} has no list "images": give its channels\' paths.')
            label = entry.get("label")
            if label is not None and not isinstance(label, str):
                raise OneShotError(
                    f'Case {case} in {path} has the "label" {label!r}: give the path of a file, or none.'
                )
            files[case] = ([absolute(file) for file in images], absolute(label) if label else None)
        return files


def find_images(folder: str | os.PathLike, file_ending: str) -> dict[str, list[str]]:
    """The images in a folder in nnU-Net's naming, by their names alone.

    Hidden files, such as systems and interrupted writers leave them, are passed over.

    Args:
        folder: Holds CASE_0000.nii.gz, CASE_0001.nii.gz, ...
        file_ending: Suffix of the images, such as ``.nii.gz``.

    Returns:
        Case to the paths of its channels, in order.

    Raises:
        OneShotError: The folder does not exist, or a file or the channels of a case are not named as expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OneShotError(f"{folder} does not exist: put the images there as CASE_0000{file_ending}.")
    found: dict[str, dict[str, str]] = {}
    for name in visible_files(folder, file_ending):
        match = _CHANNEL.fullmatch(name[: -len(file_ending)])
        if match is None:
            raise OneShotError(
                f"{folder / name} is not named CASE_XXXX{file_ending}, where XXXX is the four-digit number of "
                f"the channel: rename it, for example to {name[: -len(file_ending)]}_0000{file_ending}."
            )
        case = check_name(match["case"], "case", folder / name)
        found.setdefault(case, {})[match["number"]] = str(folder / name)
    for case, channels in found.items():
        if list(channels) != [f"{number:04d}" for number in range(len(channels))]:
            raise OneShotError(
                f"Case {case} in {folder} has the channel numbers {', '.join(channels)}: expected 0000 and those that "
                f"follow, one for each channel. Add the missing files or rename the others."
            )
    return {case: list(channels.values()) for case, channels in found.items()}


def visible_files(folder: Path, file_ending: str) -> list[str]:
    """Names of the files with an ending, sorted, hidden ones left out.

    Raises:
        OneShotError: A file has the ending in other letter case, which nnU-Net would pass over.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    for name in names:
        if name.lower().endswith(file_ending.lower()) and not name.endswith(file_ending):
            raise OneShotError(
                f"{folder / name} ends in {name[-len(file_ending) :]}, but expected is {file_ending}, in this letter "
                f"case: rename the file."
            )
    return [name for name in names if name.endswith(file_ending)]


def _training_name(case: str, where: Path) -> str:
    """The name of a training case, which nnU-Net must find again after preprocessing."""
    check_name(case, "case", where)
    if case.endswith(_LABEL_SUFFIX):
        raise OneShotError(
            f"The case {case} of {where} cannot be used: nnU-Net takes names that end in {_LABEL_SUFFIX} for labels "
            f"and would lose it. Rename it and its files."
        )
    return case


def _check_reader(name: str, path: Path) -> None:
    """Raises where ``dataset.json`` names a reader that nnU-Net does not have: it would pass over the entry."""
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name

    if name == "None":
        return
    try:
        found = recursive_find_reader_writer_by_name(name)
    except RuntimeError:
        found = None
    if not isinstance(found, type) or not issubclass(found, BaseReaderWriter):
        raise OneShotError(
            f'"overwrite_image_reader_writer" in {path} names {name!r}, which nnU-Net does not have: correct it or '
            f"remove it. Readers: {', '.join(sorted({one.__name__ for one in LIST_OF_IO_CLASSES}))}."
        )


def find_dataset(dataset: int | str) -> RawDataset:
    """Finds a raw data set by its number or name below ``nnUNet_raw``.

    Raises:
        OneShotError: The variable is unset, or there is not exactly one such data set.
    """
    (raw,) = require_env("nnUNet_raw")
    return RawDataset(raw / dataset_name(dataset, raw))


def dataset_name(dataset: int | str, folder: Path) -> str:
    """Name of the data set with this number (or name) among the subfolders of ``folder``.

    Raises:
        OneShotError: There is not exactly one.
    """
    if not folder.is_dir():
        raise NotReadyError(f"{folder} is not a folder: correct the environment variable that names it.")
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name.startswith("Dataset"))
    text = str(dataset)
    if text.startswith("Dataset"):
        found = [name for name in present if name == text]
    elif text.isdecimal():
        found = [name for name in present if name.startswith(f"Dataset{int(text):03d}_")]
    else:
        found = []
    if len(found) != 1:
        raise NotReadyError(
            f"Dataset {text!r} was not found: {len(found) or 'no'} folders match it in {folder}, expected one such as "
            f"Dataset{int(text) if text.isdecimal() else 4:03d}_Name. Present: {', '.join(present) or 'none'}."
        )
    return found[0]
