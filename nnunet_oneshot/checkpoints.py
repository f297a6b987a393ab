"""Checkpoints that are either complete or absent, and errors that say what to do about a damaged one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

import torch

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, writing

# RuntimeErrors that say nothing about a file.
_OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)


@contextmanager
def saving_checkpoint(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary path for ``torch.save`` that takes the place of ``target`` when the block ends without an error.

    Raises:
        OneShotError: The file cannot be written; the previous one is untouched.
    """
    try:
        with writing(target), atomic_path(target) as temporary:
            yield temporary
    except (OneShotError, *_OF_THE_DEVICE):
        raise
    except RuntimeError as error:
        # torch reports a full disk as a RuntimeError of its archive writer.
        raise OneShotError(
            f"The checkpoint {target} could not be written ({_first_line(error)}): check that its folder is writable "
            f"and has space left, then resume with --c from the checkpoint before it."
        ) from error


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


def _unreadable(path: str | os.PathLike, error: Exception, advice: str) -> str:
    size = Path(path).stat().st_size if Path(path).is_file() else 0
    return (
        f"The checkpoint {path} ({size} bytes) is damaged or belongs to another network "
        f"({type(error).__name__}: {_first_line(error)}). {advice}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no further detail"])[0]
