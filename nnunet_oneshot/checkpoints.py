"""Checkpoints that are either complete or absent, and errors that say what to do about a damaged one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch

from nnunet_oneshot.errors import OneShotError, shown
from nnunet_oneshot.io import atomic_path

# The function by which numpy's numbers are restored, whose module differs between releases.
_numpy_scalar = np.float64(0).__reduce__()[0]
# RuntimeErrors that say nothing about a file.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)


@contextmanager
def saving_checkpoint(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary path for ``torch.save`` that takes the place of ``target`` when the block ends without an error.

    Raises:
        OneShotError: The file cannot be written; the previous one is untouched.
    """
    try:
        with atomic_path(target) as temporary:
            yield temporary
    except (OneShotError, *_OF_THE_DEVICE):
        raise
    # torch reports a full disk as a RuntimeError of its archive writer.
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
        raise OneShotError(
            f"The checkpoint {target} could not be written ({reason}): check that its folder is writable "
            f"and has space left. {resume_advice(Path(target).parent)}"
        ) from error


def resume_advice(folder: str | os.PathLike) -> str:
    """How a training goes on that stopped, a sentence; it promises no checkpoint that is not there.

    Args:
        folder: Of a fold's checkpoints.
    """
    found = _checkpoints(Path(folder))
    if found:
        return f"Then give the same command with --c, which goes on from {found[0]}."
    return "There is no checkpoint yet: then give the same command again."


def other_checkpoints(path: str | os.PathLike) -> list[Path]:
    """The checkpoints beside another one, first the one from which ``nnUNetv2_train --c`` goes on without it."""
    return [other for other in _checkpoints(Path(path).parent) if other != Path(path)]


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a fold in the order in which ``nnUNetv2_train --c`` looks for them."""
    names = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
    return [folder / name for name in names if (folder / name).is_file()]


@contextmanager
def loading_checkpoint(path: str | os.PathLike, *, advice: str) -> Iterator[None]:
    """Turns what ``torch.load`` and ``load_state_dict`` raise on a damaged file into one `OneShotError`.

    Args:
        path: The file that is read in the block.
        advice: What the user can do, a sentence.

    Raises:
        OneShotError: The file is missing, damaged or does not fit the network.
    """
    try:
        yield
    except (OneShotError, *_OF_THE_DEVICE):
        raise
    except FileNotFoundError as error:
        raise OneShotError(f"The checkpoint {path} does not exist. {advice}") from error
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, BadZipFile) as error:
        raise OneShotError(_unreadable(path, error, advice)) from error
    except pickle.UnpicklingError as error:
        raise OneShotError(_unreadable(path, error, advice)) from error


def load_data(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint, of which nothing is run: tensors, plain types and numpy's numbers.

    ``torch.load`` would otherwise run whatever code the file names, and take over weights that have changed on disk.

    Args:
        path: A file that somebody else may have written.

    Raises:
        OneShotError: The file holds anything else.
        ValueError: Parts of the file are not what was written; see `loading_checkpoint`.
    """
    _check_parts(path)
    scalars: list[Any] = [(_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    numbers = [np.dtype, *scalars, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    try:
        with torch.serialization.safe_globals(numbers):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if foreign := _foreign_objects(path):
            raise OneShotError(
                f"The checkpoint {path} holds more than numbers and weights ({', '.join(foreign)}), which could run "
                f"code. It was not opened: use a checkpoint that nnU-Net wrote."
            ) from error
        raise
    if not isinstance(content, dict):
        raise OneShotError(f"The checkpoint {path} holds {type(content).__name__}, not what nnU-Net stores.")
    return content


def _check_parts(path: str | os.PathLike) -> None:
    """Compares each part of a checkpoint with the checksum that torch stored of it in the same file.

    torch stores checkpoints as zip archives but does not look at their checksums itself. They go wherever the file is
    moved or copied, and cannot be of another state of it. Files of another format have none.

    Raises:
        ValueError: A part was changed since it was written.
    """
    if not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    # A damaged archive may raise anything.
    except Exception as error:
        raise ValueError(f"its parts cannot be read, {_first_line(error)}") from error
    if damaged is not None:
        raise ValueError(f"its part {shown(damaged)} has changed since it was written")


def _foreign_objects(path: str | os.PathLike) -> list[str]:
    """What a checkpoint needs beside plain data, by name; empty where the file cannot be read at all."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # whatever a damaged archive raises
        return []
    return [name for name in found if not name.startswith("numpy")]


def _unreadable(path: str | os.PathLike, error: Exception, advice: str) -> str:
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    return (
        f"The checkpoint {path} ({size} bytes) is damaged or belongs to another network "
        f"({type(error).__name__}: {_first_line(error)}). {advice}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no further detail"])[0]
