"""Registrations on disk: one compressed array file and one JSON file per pair, written atomically.

<dataset>/oneshot_registrations/<data identifier>/<atlas>/<case>.npz    affine, packed velocity, shapes
                                                          <case>.json   quality, parameters, versions, checksum
                                                          <case>.png    picture
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.lib.npyio import NpzFile

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import Shape, atomic_path, load_json_checked, save_json_atomic, writing
from nnunet_oneshot.registration.pair.quality import is_kept
from nnunet_oneshot.registration.pair.registration import Registration

FOLDER = "oneshot_registrations"
PairState = Literal["current", "outdated", "damaged", "missing"]
_FIGURES = ("similarity_before", "similarity_after", "folding")
_RECORD: Shape = {
    "key": str,
    "checksum": str,
    "quality": {
        **dict.fromkeys(_FIGURES, float),
        "affine_start": str,
        "similarity_at_labels?": float,
        "rival_margin?": float,
    },
    "sources?": {"stamp?": list, "digest?": str, "axes?": [[float]], "shape?": [int]},
}
_HOMOGENEOUS = (0, 0, 0, 1)
# Steps a voxel of the velocities in a file: what is stored is at most 1/32 of a voxel off.
_STEPS = 16


class RegistrationCache:
    """The registrations of one configuration's preprocessed data."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, atlas: str, case: str, suffix: str) -> Path:
        """File of a pair; ``suffix`` is ``".npz"``, ``".json"`` or ``".png"``."""
        return self.folder / atlas / f"{case}{suffix}"

    def state(
        self, atlas: str, case: str, key: str, shapes: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> PairState:
        """Whether the pair exists, is undamaged, and was made from the inputs and parameters behind ``key``.

        Args:
            atlas: Name.
            case: Name.
            key: Checksum of all inputs and parameters.
            shapes: Voxels (X, Y, Z) of the preprocessed atlas and of the case; a pair of other shapes is damaged.
        """
        if not self.path(atlas, case, ".json").is_file():
            return "missing"
        record = self.record(atlas, case)
        if record is None or record["checksum"] != self._checksum(atlas, case):
            return "damaged"
        if record["key"] != key:
            return "outdated"
        try:
            with np.load(self.path(atlas, case, ".npz")) as arrays:
                found = _checked_shapes(arrays)
        except _UNREADABLE:
            return "damaged"
        return "current" if shapes is None or found == tuple(map(tuple, shapes)) else "damaged"

    def record(self, atlas: str, case: str) -> dict[str, Any] | None:
        """The content of a pair's JSON file; None where it is missing or damaged. The arrays are not looked at."""
        path = self.path(atlas, case, ".json")
        if not path.is_file():
            return None
        try:
            return load_json_checked(path, "the registration record", _RECORD)
        except OneShotError:
            return None

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
                shapes = _checked_shapes(arrays)
                velocity = unpacked(arrays["velocity_bytes"], arrays["velocity_shape"])
                return Registration(atlas, case, arrays["affine"], velocity, *shapes, quality)
        except _UNREADABLE as error:
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
        return load_json_checked(path, f"the registration of {atlas} to {case} in", _RECORD)["quality"]

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


# What damaged or foreign arrays raise.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def _checked_shapes(arrays: NpzFile) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Voxels (X, Y, Z) of atlas and case, by the arrays of a pair; its velocities are not unpacked.

    Raises:
        ValueError: The arrays are no registration: of other types or shapes, or the affine map is not finite or cannot
            be inverted.
    """
    affine = arrays["affine"]
    if affine.shape != (4, 4) or affine.dtype.kind != "f" or not np.isfinite(affine).all():
        raise ValueError("the affine map is not 4 x 4 finite numbers")
    if not np.array_equal(affine[3], _HOMOGENEOUS) or not np.linalg.det(affine):
        raise ValueError("the affine map cannot be inverted")
    shapes = {name: arrays[name] for name in ("velocity_shape", "atlas_shape", "case_shape")}
    for name, shape in shapes.items():
        if shape.dtype.kind not in "iu" or shape.shape != (4 if name == "velocity_shape" else 3,) or shape.min() < 1:
            raise ValueError(f"{name} is {shape.tolist()}")
    if arrays.zip is None:
        raise ValueError("the file was closed")
    with arrays.zip.open("velocity_bytes.npy") as file:
        np.lib.format.read_magic(file)
        stored, _, dtype = np.lib.format.read_array_header_1_0(file)
    if shapes["velocity_shape"][0] != 3 or stored != (4, math.prod(shapes["velocity_shape"].tolist())) or dtype != "u1":
        raise ValueError("the velocities do not fit their shape")
    atlas, case = (tuple(int(n) for n in shapes[name]) for name in ("atlas_shape", "case_shape"))
    return atlas, case


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
