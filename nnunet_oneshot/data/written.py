"""Which cases a folder of preprocessed data was left with, so that a folder that changed since is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_oneshot.errors import NotReadyError, listed
from nnunet_oneshot.io import Each, load_json_checked, save_json_atomic

# In the dataset's folder: nnU-Net refuses foreign files beside the cases.
RECORD = "oneshot_preprocessed.json"


def record_cases(base: Path, identifier: str, cases: Sequence[str]) -> None:
    """Notes the cases that were written.

    Args:
        base: The dataset's folder, ``nnUNet_preprocessed/DatasetXXX_Name``.
        identifier: Name of the folder of preprocessed cases in it.
        cases: Their names.
    """
    save_json_atomic({**_recorded(base), identifier: sorted(cases)}, base / RECORD)


def check_written_cases(base: Path, folder: Path) -> None:
    """Compares a folder of preprocessed cases with what was noted; one that nobody noted is fine.

    Args:
        base: The dataset's folder.
        folder: The folder of preprocessed cases in it.

    Raises:
        OneShotError: Cases are missing or surplus.
    """
    expected = _recorded(base).get(folder.name)
    if expected is None:
        return
    found = {path.stem for path in folder.glob("*.pkl")}
    parts = [("lacks", set(expected) - found), ("holds as a surplus", found - set(expected))]
    differing = [f"{verb} {listed(sorted(names))}" for verb, names in parts if names]
    if differing:
        raise NotReadyError(
            f"{folder} {' and '.join(differing)}; {len(expected)} cases were preprocessed together, as {base / RECORD} "
            f"notes. Preprocess the dataset again with `nnunet_oneshot plan_and_preprocess`, or delete that file if "
            f"the folder is as you want it."
        )


def _recorded(base: Path) -> dict[str, list[str]]:
    path = base / RECORD
    return load_json_checked(path, "the list of preprocessed cases", Each([str])) if path.is_file() else {}
