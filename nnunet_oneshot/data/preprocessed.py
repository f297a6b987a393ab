"""Reads images of the preprocessed dataset without touching their labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from nnunet_oneshot.errors import NotReadyError, OneShotError

_PREPROCESS = (
    "Preprocess the dataset again with `nnunet_oneshot plan_and_preprocess` or, for a dataset of stock nnU-Net, "
    "`nnUNetv2_preprocess`."
)


class StoredArray:
    """An array on disk, of which slices are read; a failure to read one names the file.

    Attributes:
        shape: Such as (C, X, Y, Z).
        dtype: Of its values.
        ndim: Number of axes.
    """

    def __init__(self, array: Any, what: str, path: Path, advice: str) -> None:
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype = array.dtype
        self.ndim = len(self.shape)
        self._array, self._what, self._path, self._advice = array, what, path, advice

    def __getitem__(self, part: Any) -> np.ndarray:
        with self.reading():
            return self._array[part]

    def crop(self, box: Sequence[Sequence[int]]) -> np.ndarray:
        """What lies in a box ((from, to) of the last axes, which may reach beyond the array); 0 outside."""
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

        with self.reading():
            return crop_and_pad_nd(self._array, box, 0)

    def reading(self) -> AbstractContextManager[None]:
        """Names the file where its content is not as it must be."""
        return _reading(self._what, self._path, self._advice)


def open_image(folder: str, case: str) -> StoredArray:
    """The preprocessed image of a case; the file of its label is not opened.

    Args:
        folder: A configuration's folder of preprocessed data.
        case: Name of the case.

    Returns:
        (C, X, Y, Z) array that may lie on disk; a slice of it is a numpy array.

    Raises:
        OneShotError: The image is missing or unreadable; so may a slice of it be.
    """
    return open_array(folder, case, what="preprocessed image", key="data")


def load_image(folder: str, case: str) -> np.ndarray:
    """The preprocessed image of a case in memory, (C, X, Y, Z); see `open_image`.

    Raises:
        OneShotError: The image is missing, unreadable or not finite.
    """
    stored = open_image(folder, case)
    image = stored[:]
    with stored.reading():
        if not np.isfinite(image).all():
            raise ValueError("it holds values that are no finite numbers")
    return image


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
    return open_array(folder, case, "_seg", what="preprocessed label", key="seg")[:]


def load_properties(folder: str, case: str) -> dict[str, Any]:
    """What nnU-Net keeps of a preprocessed case beside its arrays.

    Raises:
        OneShotError: The file is missing or unreadable.
    """
    path = Path(folder) / f"{case}.pkl"
    with _reading("preprocessed properties", path, _PREPROCESS):
        properties = load_pickle(str(path))
        if not isinstance(properties, dict) or not isinstance(properties.get("class_locations"), dict):
            raise ValueError("it holds something else than nnU-Net keeps of a case")
        spacing = np.asarray(properties["spacing"], float)
        if spacing.shape != (3,) or not (np.isfinite(spacing) & (spacing > 0)).all():
            raise ValueError(f"its spacing is {spacing.tolist()}")
        return properties


def open_array(
    folder: str, case: str, suffix: str = "", *, what: str, key: str, axes: int = 4, advice: str = _PREPROCESS
) -> StoredArray:
    """An array of a case in one of nnU-Net's formats, which may lie on disk.

    Args:
        folder: Where it lies.
        case: Name of the case.
        suffix: Of the file's name, before its ending.
        what: What it is, for the error.
        key: Its name in ``.npz``.
        axes: How many it must have.
        advice: A sentence for the error that says what to do.

    Raises:
        OneShotError: It is missing or unreadable; so may a slice of it be.
    """
    import blosc2

    base = Path(folder)
    kinds = [base / f"{case}{suffix}.b2nd", base / f"{case}{suffix}.npy", base / f"{case}.npz"]
    path = next((path for path in kinds if path.is_file()), kinds[0])
    with _reading(what, path, advice):
        if path.suffix == ".b2nd":
            array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1})
            if not isinstance(array, blosc2.NDArray):
                raise ValueError("it holds no array")
            # By a damaged header an array may be far larger than the file, and reading it would not end.
            # Chunks are filled up to whole blocks.
            number = [-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True)]
            filled = [block * -(-chunk // block) for chunk, block in zip(array.chunks, array.blocks, strict=True)]
            if math.prod(number) * math.prod(filled) * array.dtype.itemsize != array.schunk.nbytes:
                raise ValueError(f"its header tells of the shape {tuple(array.shape)}, its content of another")
        elif path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        else:
            with np.load(path) as arrays:
                array = arrays[key]
        if array.ndim != axes or array.dtype.kind not in "fiu":
            raise ValueError(f"it holds {array.dtype} of shape {tuple(array.shape)}, not {axes} axes of numbers")
    return StoredArray(array, what, path, advice)


@contextmanager
def _reading(what: str, path: Path, advice: str) -> Iterator[None]:
    """Turns a failure to read a file of a case into an `OneShotError` that names it."""
    try:
        yield
    # A damaged file may raise anything.
    except Exception as error:
        told = isinstance(error, (OSError, ValueError, RuntimeError, EOFError)) and str(error).strip()
        reason = told or "its content is not what nnU-Net writes"
        raise OneShotError(f"The {what} {path} cannot be read ({reason}). {advice}") from error


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
