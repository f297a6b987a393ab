"""Reads images of the preprocessed dataset without touching their labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_oneshot.errors import OneShotError


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


def _open(folder: str, case: str, suffix: str, what: str, key: str):
    import blosc2

    base = Path(folder)
    try:
        if (path := base / f"{case}{suffix}.b2nd").is_file():
            return blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1})
        if (path := base / f"{case}{suffix}.npy").is_file():
            return np.load(path, mmap_mode="r")
        with np.load(path := base / f"{case}.npz") as arrays:
            return arrays[key]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
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
        raise OneShotError(
            f"The folder {folder} {found}, so configuration {configuration} has not been preprocessed: run "
            f"`nnunet_oneshot plan_and_preprocess -d DATASET -c {configuration}` first."
        )
