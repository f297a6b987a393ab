"""The environment variable by which nnU-Net finds this package's trainers."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

VARIABLE = "nnUNet_extTrainer"
TRAINER_FOLDER = Path(__file__).resolve().parent / "ext_trainer"


def ext_trainer_value(current: str | None) -> str:
    """The value of ``nnUNet_extTrainer`` with this package's folder in it.

    Args:
        current: The variable's present value; what it lists is kept, in its order.
    """
    folders = [folder for folder in (current or "").split(os.pathsep) if folder.strip()]
    if not any(Path(folder).resolve() == TRAINER_FOLDER for folder in folders):
        folders.append(str(TRAINER_FOLDER))
    return os.pathsep.join(folders)


def shell_export() -> str:
    """A line for ``eval`` in a POSIX shell that makes nnU-Net find the trainers."""
    return f"export {VARIABLE}={shlex.quote(ext_trainer_value(os.environ.get(VARIABLE)))}"
