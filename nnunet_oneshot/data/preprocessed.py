"""Reads images of the preprocessed dataset without touching their labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from nnunet_oneshot.errors import NotReadyError, OneShotError


def open_image(folder: str, case: str):
    """The preprocessed image of a case; the file of its label is not opened.

    Args:
        folder: A configuration's folder of preprocessed data.
        case: Name of the case.

    Returns:
        (C, X, Y, Z) array that may lie on disk; a slice of it is a numpy array.

    Raises:
        OneShotError: The image is missing or unreadable.
    """
    return _open(folder, case, "", "image", "data")


def load_image(folder: str, case: str) -> np.ndarray:
    """The preprocessed image of a case in memory, (C, X, Y, Z); see `open_image`."""
    return open_image(folder, case)[:]


def load_segmentation(folder: str, case: str) -> np.ndarray:
    """The preprocessed label map of a case; in training, only for atlases.

    Args:
        folder: A configuration's folder of preprocessed data.
        case: Name of the case.

    Returns:
        (1, X, Y, Z), -1 outside the nonzero region of the image.

    Raises:
        OneShotError: The file is missing or unreadable.
    """
    return _open(folder, case, "_seg", "label", "seg")[:]


def load_properties(folder: str, case: str) -> dict[str, Any]:
    """What nnU-Net keeps of a preprocessed case beside its arrays.

    Raises:
        OneShotError: The file is missing or unreadable.
    """
    path = Path(folder) / f"{case}.pkl"
    # An unreadable pickle may raise anything.
    with _reading("properties", path, Exception):
        properties = load_pickle(str(path))
        if not isinstance(properties, dict):
            raise ValueError("it holds something else")
        return properties


def _open(folder: str, case: str, suffix: str, what: str, key: str):
    import blosc2

    base = Path(folder)
    path = base / f"{case}{suffix}.b2nd"
    with _reading(what, path, OSError, RuntimeError, ValueError, KeyError, EOFError):
        if path.is_file():
            return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1})
        if (path := base / f"{case}{suffix}.npy").is_file():
            return np.load(path, mmap_mode="r")
        with np.load(base / f"{case}.npz") as arrays:
            return arrays[key]


@contextmanager
def _reading(what: str, path: Path, *failures: type[Exception]) -> Iterator[None]:
    """Turns a failure to read a file of a preprocessed case into an `OneShotError` that names it."""
    try:
        yield
    except failures as error:
        raise OneShotError(
            f"The preprocessed {what} {path} cannot be read ({error}). Preprocess the dataset again with "
            f"`nnunet_oneshot plan_and_preprocess` or, for a dataset of stock nnU-Net, `nnUNetv2_preprocess`."
        ) from error


def check_preprocessed(folder: str, configuration: str) -> None:
    """Makes sure that a configuration has been preprocessed.

    Args:
        folder: Its folder of preprocessed data.
        configuration: Its name, for the error.

    Raises:
        OneShotError: The folder is missing or holds no preprocessed case.
    """
    base = Path(folder)
    if not base.is_dir() or not any(base.glob("*.pkl")):
        found = "holds no preprocessed case" if base.is_dir() else "does not exist"
        raise NotReadyError(
            f"The folder {folder} {found}, so configuration {configuration} has not been preprocessed: run "
            f"`nnunet_oneshot plan_and_preprocess -d DATASET -c {configuration}` first."
        )
