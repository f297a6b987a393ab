"""Registrations on disk: one compressed array file and one JSON file per pair, written atomically.

<dataset>/oneshot_registrations/<data identifier>/<atlas>/<case>.npz    affine, packed velocity, shapes
                                                          <case>.json   quality, parameters, versions, checksum
                                                          <case>.png    picture
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, load_json_checked, save_json_atomic, writing
from nnunet_oneshot.registration.pair.quality import is_kept
from nnunet_oneshot.registration.pair.registration import Registration

FOLDER = "oneshot_registrations"
PairState = Literal["current", "outdated", "damaged", "missing"]
# Steps a voxel of the velocities in a file: what is stored is at most 1/32 of a voxel off.
_STEPS = 16


class RegistrationCache:
    """The registrations of one configuration's preprocessed data."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, atlas: str, case: str, suffix: str) -> Path:
        """File of a pair; ``suffix`` is ``".npz"``, ``".json"`` or ``".png"``."""
        return self.folder / atlas / f"{case}{suffix}"

    def state(self, atlas: str, case: str, key: str) -> PairState:
        """Whether the pair exists, is undamaged, and was made from the inputs and parameters behind ``key``."""
        if not self.path(atlas, case, ".json").is_file():
            return "missing"
        record = self.record(atlas, case)
        if record is None or record["checksum"] != self._checksum(atlas, case):
            return "damaged"
        return "current" if record["key"] == key else "outdated"

    def record(self, atlas: str, case: str) -> dict[str, Any] | None:
        """The content of a pair's JSON file; None where it is missing or damaged. The arrays are not looked at."""
        path = self.path(atlas, case, ".json")
        if not path.is_file():
            return None
        try:
            record = load_json_checked(path, "the registration record")
        except OneShotError:
            return None
        return record if _is_complete(record) else None

    def save(self, registration: Registration, *, key: str, sources: dict, parameters: dict, versions: dict) -> None:
        """Writes a pair. The JSON file comes last and marks the pair as complete.

        Args:
            registration: The pair. Its velocities are rounded to steps of 1/16 voxel.
            key: Checksum of all inputs and parameters.
            sources: What is known of the case; see `nnunet_oneshot.registration.dataset.sources`.
            parameters: Noted in the record.
            versions: Noted in the record.

        Raises:
            OneShotError: The folder cannot be written to.
        """
        target = self.path(registration.atlas, registration.case, ".npz")
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as temporary:
                np.savez_compressed(
                    temporary,
                    affine=registration.affine,
                    velocity_bytes=packed(registration.velocity),
                    velocity_shape=registration.velocity.shape,
                    atlas_shape=registration.atlas_shape,
                    case_shape=registration.case_shape,
                )
        record = {
            "atlas": registration.atlas,
            "case": registration.case,
            "key": key,
            "checksum": self._checksum(registration.atlas, registration.case),
            "sources": sources,
            "quality": registration.quality,
            "parameters": parameters,
            "versions": versions,
        }
        save_json_atomic(record, self.path(registration.atlas, registration.case, ".json"))

    def note_sources(self, atlas: str, case: str, sources: dict) -> None:
        """Renews what the record of a pair knows of its case, whose files have changed, but not what is in them."""
        record = self.record(atlas, case)
        # In a folder that cannot be written to, the files are read each time.
        with suppress(OneShotError):
            save_json_atomic({**(record or {}), "sources": sources}, self.path(atlas, case, ".json"))

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
                    unpacked(arrays["velocity_bytes"], arrays["velocity_shape"]),
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

    def _checksum(self, atlas: str, case: str) -> str | None:
        path = self.path(atlas, case, ".npz")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@dataclass(frozen=True)
class GuidedRegistrations:
    """Registrations of which some have been made again, guided by a student.

    Attributes:
        first: All pairs, by images alone.
        guided: The pairs that were registered again.
        kept: Those of them that take the place of the first.
    """

    first: RegistrationCache
    guided: RegistrationCache
    kept: frozenset[tuple[str, str]]

    def load(self, atlas: str, case: str) -> Registration:
        """Reads a pair; see `RegistrationCache.load`."""
        return (self.guided if (atlas, case) in self.kept else self.first).load(atlas, case)


def kept_of(
    first: RegistrationCache, guided: RegistrationCache, pairs: Iterable[tuple[str, str]]
) -> GuidedRegistrations:
    """Keeps the guided registrations of those pairs (atlas, case) for which `is_kept` holds."""
    kept = frozenset(pair for pair in pairs if is_kept(first.quality(*pair), guided.quality(*pair)))
    return GuidedRegistrations(first, guided, kept)


def _is_complete(record: Any) -> bool:
    """Whether the content of a pair's JSON file has all required entries."""
    return isinstance(record, dict) and {"key", "checksum", "quality"} <= record.keys()


def packed(velocity: np.ndarray) -> np.ndarray:
    """A velocity field (3, gx, gy, gz) as bytes that compress well: each value less what its neighbours suggest.

    Values are whole steps of 1/16 voxel. The differences are small where the field is smooth, and their bytes are
    sorted by place value, so that the high ones are nearly all equal.

    Returns:
        (4, 3 * gx * gy * gz) uint8, the lowest byte first.
    """
    steps = np.rint(np.asarray(velocity, np.float64) * _STEPS).astype(np.int64).astype("<i4")
    for axis in (1, 2, 3):
        steps = np.diff(steps, axis=axis, prepend=np.int32(0))
    # Small negative numbers become small odd ones.
    folded = ((steps << 1) ^ (steps >> 31)).astype("<u4")
    return np.ascontiguousarray(folded.reshape(-1, 1).view(np.uint8).T)


def unpacked(content: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The velocity field (3, gx, gy, gz) float32 that `packed` gave as ``content``.

    Args:
        content: (4, 3 * gx * gy * gz) uint8.
        shape: (3, gx, gy, gz).

    Raises:
        ValueError: They do not fit each other.
    """
    folded = np.ascontiguousarray(content.T).view("<u4").reshape([int(n) for n in shape])
    steps = (folded >> 1).astype(np.int32) ^ -(folded & 1).astype(np.int32)
    for axis in (1, 2, 3):
        steps = np.cumsum(steps, axis=axis, dtype=np.int32)
    return (steps / np.float32(_STEPS)).astype(np.float32)
