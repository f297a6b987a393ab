"""The teacher's own checkpoint next to nnU-Net's, which stays unchanged."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint, saving_checkpoint
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import writing

_KEYS = {"distiller", "optimizer", "epoch"}


def teacher_file(checkpoint: str) -> str:
    """``checkpoint_latest.pth`` -> ``checkpoint_latest_teacher.pth`` in the same folder."""
    path = Path(checkpoint)
    return str(path.with_name(f"{path.stem}_teacher{path.suffix}"))


def _next_file(checkpoint: str) -> str:
    """File of the teacher for the checkpoint that is about to be written."""
    path = Path(checkpoint)
    return str(path.with_name(f"{path.stem}_teacher_next{path.suffix}"))


@contextmanager
def saving_teacher(
    checkpoint: str, distiller: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
) -> Iterator[None]:
    """Writes the teacher for a checkpoint that the ``with`` block writes.

    Two files cannot be replaced at once. Until the student's checkpoint is written, the next teacher is stored next to
    the present one. If the process is killed at any point, one of the two matches the student's epoch; see
    `load_teacher`.

    Args:
        checkpoint: The student's checkpoint.
        distiller: Module with teacher and projections.
        optimizer: Optimiser of teacher and projections.
        epoch: Number of completed epochs.
    """
    coming, present = _next_file(checkpoint), teacher_file(checkpoint)
    with saving_checkpoint(coming) as temporary:
        save_teacher(str(temporary), distiller, optimizer, epoch)
    try:
        yield
    except BaseException:
        Path(coming).unlink(missing_ok=True)
        raise
    with writing(present):
        os.replace(coming, present)


def remove_teachers(folder: str) -> None:
    """Removes the teachers of all checkpoints of a finished training, which is never resumed."""
    for pattern in ("checkpoint_*_teacher.pth", "checkpoint_*_teacher_next.pth"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def save_teacher(path: str, distiller: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Writes teacher, projections and their optimiser.

    Args:
        path: File to write.
        distiller: Module with teacher and projections.
        optimizer: Optimiser of teacher and projections.
        epoch: Number of completed epochs.
    """
    content = {"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    torch.save(content, path)


def load_teacher(checkpoint: str, distiller: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Restores what `save_teacher` wrote for a checkpoint of the student.

    Args:
        checkpoint: The student's checkpoint, from which training resumes.
        distiller: Module to restore.
        optimizer: Optimiser to restore.
        epoch: Number of completed epochs in the student's checkpoint.

    Raises:
        OneShotError: The teacher's file is missing, damaged or of another epoch.
    """
    path = teacher_file(checkpoint)
    advice = (
        f"The student's checkpoint {checkpoint} needs it to go on: restore it, delete both and resume from the "
        f"checkpoint before them, or train again without --c. Validation (--val) and prediction do without it."
    )
    coming = _next_file(checkpoint)
    for candidate in [*([coming] if os.path.isfile(coming) else []), path]:
        with loading_checkpoint(candidate, advice=advice):
            content = _content(candidate)
            if content["epoch"] == epoch:
                distiller.load_state_dict(content["distiller"])
                optimizer.load_state_dict(content["optimizer"])
                return
    raise OneShotError(
        f"The teacher's checkpoint {path} is of epoch {content['epoch']}, the student's of epoch {epoch}: the two were "
        f"not saved together. {advice}"
    )


def _content(path: str) -> dict[str, Any]:
    content = load_data(path)
    if set(content) != _KEYS:
        raise ValueError(f"found {sorted(content)}, expected {sorted(_KEYS)}")
    return content
