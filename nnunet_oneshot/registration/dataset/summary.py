"""The table of all registrations of an atlas."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from nnunet_oneshot.io import save_text_atomic
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.pair.quality import draw_weights, telling_similarity
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.tables import csv_table


def summary_path(cache: RegistrationCache, atlas: str) -> Path:
    """The table of an atlas."""
    return cache.folder / f"quality_{atlas}.csv"


def write_summary(
    cache: RegistrationCache, atlas: str, cases: Sequence[str], *, rejected: Collection[tuple[str, str]] = ()
) -> Path:
    """Writes the quality figures of all registrations of an atlas as CSV, the worst first.

    A table that says the same already is left alone.

    Args:
        cache: Holds the registrations.
        atlas: The atlas.
        cases: The cases that it is registered to.
        rejected: Pairs (atlas, case) that are rated bad.

    Returns:
        The table's path.

    Raises:
        OneShotError: A registration is missing, or the folder cannot be written to.
    """
    qualities = {case: cache.quality(atlas, case) for case in cases}
    nothing = np.zeros((3, 1, 1, 1), np.float32)
    weights = draw_weights([Registration(atlas, c, np.eye(4), nothing, (), (), q) for c, q in qualities.items()])
    drawn = {
        case: weight > 0 and (atlas, case) not in rejected for case, weight in zip(qualities, weights, strict=True)
    }
    figures = sorted({name for quality in qualities.values() for name in quality})
    rows = [
        [case, "yes" if drawn[case] else "no", *(qualities[case].get(name, "") for name in figures)]
        for case in sorted(qualities, key=lambda case: (telling_similarity(qualities[case]), case))
    ]
    text = csv_table(["case", "used_in_training", *figures], rows)
    path = summary_path(cache, atlas)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        save_text_atomic(text, path)
    return path
