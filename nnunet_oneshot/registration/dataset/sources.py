"""What registrations depend on of a dataset's cases, without reading files that have not changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.registration.dataset.cache import RegistrationCache

# What is known of a case: the stamp of its files, checksum and shape (X, Y, Z) of its image, and where its axes point.
Source = dict[str, Any]


def read_sources(
    prepared: PreparedDataset,
    cases: Sequence[str],
    *,
    atlases: Sequence[str],
    caches: Sequence[RegistrationCache],
    num_threads: int = 1,
) -> dict[str, Source]:
    """Stamp, checksum and shape of the image and axes of each case.

    Opens the files of a case only if no record of its registrations knows them as they are.

    Args:
        prepared: The dataset.
        cases: Names.
        atlases: Atlases whose registrations to the case may have a record.
        caches: Where the records may lie.
        num_threads: How many files are read at the same time.

    Returns:
        Case to ``stamp``, ``digest``, ``shape`` and ``axes``.

    Raises:
        OneShotError: An image cannot be read.
    """

    def read(case: str) -> Source:
        stamp = prepared.stamp(case)
        for cache in caches:
            for atlas in atlases:
                known = (cache.record(atlas, case) or {}).get("sources", {})
                if known.get("stamp") == stamp and {"digest", "shape", "axes"} <= known.keys() and _fits(known):
                    return known
        return {
            "stamp": stamp,
            "digest": prepared.digest(case),
            "shape": list(prepared.shape(case)),
            "axes": prepared.axes(case).tolist(),
        }

    with ThreadPoolExecutor(max(1, num_threads)) as executor:
        return dict(zip(cases, executor.map(read, cases), strict=True))


def _fits(source: Source) -> bool:
    return [len(row) for row in source["axes"]] == [3, 3, 3] and len(source["shape"]) == 3


def axes_in(source: Mapping[str, Any]) -> np.ndarray:
    """(3, 3), where the axes of the case's preprocessed image point; see `nnunet_oneshot.data.orientation`."""
    return np.asarray(source["axes"], float)
