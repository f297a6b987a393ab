"""Registrations on disk: one compressed array file and one JSON file per pair, written atomically.

<dataset>/oneshot_registrations/<data identifier>/<atlas>/<case>.npz    affine, velocity, shapes
                                                          <case>.json   quality, parameters, versions, checksum
                                                          <case>.png    picture
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, load_json_checked, save_json_atomic, writing
from nnunet_oneshot.registration.pair.registration import Registration

FOLDER = "oneshot_registrations"


class RegistrationCache:
    """The registrations of one configuration's preprocessed data."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, atlas: str, case: str, suffix: str) -> Path:
        """File of a pair; ``suffix`` is ``".npz"``, ``".json"`` or ``".png"``."""
        return self.folder / atlas / f"{case}{suffix}"

    def is_current(self, atlas: str, case: str, key: str) -> bool:
        """Whether the pair exists, is undamaged, and was made from the inputs and parameters behind ``key``."""
        record = self._record(atlas, case)
        return record is not None and record["key"] == key and record["checksum"] == self._checksum(atlas, case)

    def is_damaged(self, atlas: str, case: str) -> bool:
        """Whether the pair was written but its files no longer match each other."""
        if not self.path(atlas, case, ".json").is_file():
            return False
        record = self._record(atlas, case)
        return record is None or record["checksum"] != self._checksum(atlas, case)

    def save(self, registration: Registration, *, key: str, parameters: dict, versions: dict) -> None:
        """Writes a pair. The JSON file comes last and marks the pair as complete."""
        target = self.path(registration.atlas, registration.case, ".npz")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                np.savez_compressed(
                    temporary,
                    affine=registration.affine,
                    velocity=registration.velocity.astype(np.float32),
                    atlas_shape=registration.atlas_shape,
                    case_shape=registration.case_shape,
                )
        record = {
            "atlas": registration.atlas,
            "case": registration.case,
            "key": key,
            "checksum": self._checksum(registration.atlas, registration.case),
            "quality": registration.quality,
            "parameters": parameters,
            "versions": versions,
        }
        save_json_atomic(record, self.path(registration.atlas, registration.case, ".json"))

    def load(self, atlas: str, case: str) -> Registration:
        """Reads a pair.

        Raises:
            OneShotError: The pair is missing or its files are damaged.
        """
        path = self.path(atlas, case, ".npz")
        try:
            quality = self.quality(atlas, case)
            with np.load(path) as arrays:
                return Registration(
                    atlas,
                    case,
                    arrays["affine"],
                    arrays["velocity"],
                    tuple(int(n) for n in arrays["atlas_shape"]),
                    tuple(int(n) for n in arrays["case_shape"]),
                    quality,
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise OneShotError(
                f"The registration file {path} is missing or damaged ({error}): run `nnunet_oneshot register` again, "
                f"which recomputes damaged pairs."
            ) from error

    def quality(self, atlas: str, case: str) -> dict:
        """The quality figures of a pair, without its arrays.

        Raises:
            OneShotError: The pair's JSON file is missing or damaged.
        """
        path = self.path(atlas, case, ".json")
        record = load_json_checked(path, f"the registration of {atlas} to {case}")
        if not _is_complete(record):
            raise OneShotError(
                f"The registration of {atlas} to {case} in {path} lacks its key, checksum or quality: run "
                f"`nnunet_oneshot register` again, which recomputes damaged pairs."
            )
        return record["quality"]

    def _record(self, atlas: str, case: str) -> dict | None:
        path = self.path(atlas, case, ".json")
        if not path.is_file():
            return None
        try:
            record = load_json_checked(path, "the registration record")
        except OneShotError:
            return None
        return record if _is_complete(record) else None

    def _checksum(self, atlas: str, case: str) -> str | None:
        path = self.path(atlas, case, ".npz")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _is_complete(record: Any) -> bool:
    """Whether the content of a pair's JSON file has all required entries."""
    return isinstance(record, dict) and {"key", "checksum", "quality"} <= record.keys()
