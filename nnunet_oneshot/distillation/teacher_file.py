"""The teacher's own checkpoint, beside nnU-Net's, which stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from nnunet_oneshot.checkpoints import loading_checkpoint
from nnunet_oneshot.errors import OneShotError

_KEYS = {"distiller", "optimizer", "epoch"}


def teacher_file(checkpoint: str) -> str:
    """``checkpoint_latest.pth`` -> ``checkpoint_latest_teacher.pth`` in the same folder."""
    path = Path(checkpoint)
    return str(path.with_name(f"{path.stem}_teacher{path.suffix}"))


def save_teacher(path: str, distiller: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Writes teacher, projections and their optimiser.

    Args:
        path: File to write.
        distiller: Module that holds teacher and projections.
        optimizer: Their optimiser.
        epoch: Number of epochs that are complete.
    """
    content = {"distiller": distiller.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
    torch.save(content, path)


def load_teacher(checkpoint: str, distiller: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    """Restores what `save_teacher` wrote for a checkpoint of the student.

    Args:
        checkpoint: The student's checkpoint, from which training goes on.
        distiller: Module that is filled.
        optimizer: Optimiser that is filled.
        epoch: Number of epochs that the student's checkpoint has complete.

    Raises:
        OneShotError: The teacher's file is missing, damaged or of another epoch.
    """
    path = teacher_file(checkpoint)
    advice = (
        f"The student's checkpoint {checkpoint} needs it to go on: restore it, delete both and resume from the "
        f"checkpoint before them, or train again without --c. Validation (--val) and prediction do without it."
    )
    with loading_checkpoint(path, advice=advice):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if set(content) != _KEYS:
            raise ValueError(f"found {sorted(content)}, expected {sorted(_KEYS)}")
        if content["epoch"] != epoch:
            raise OneShotError(
                f"The teacher's checkpoint {path} is of epoch {content['epoch']}, the student's of epoch {epoch}: the "
                f"two were not saved together. {advice}"
            )
        distiller.load_state_dict(content["distiller"])
        optimizer.load_state_dict(content["optimizer"])
