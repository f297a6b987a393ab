"""What people think of registrations: ``oneshot_ratings.json`` in the preprocessed dataset's folder.

::

    {"format": "nnunet_oneshot ratings", "version": 1, "dataset": "Dataset004_Hippocampus", "ratings": [
        {"registrations": "nnUNetOneShotPlans_3d_fullres", "atlas": "a", "case": "b", "rating": "bad", "key": "..."}]}

The report's page exports such a file. ``registrations`` is a folder in ``oneshot_registrations``. ``key`` is that of
the registration that was looked at: one that is made again in another way has not been rated. Without it a rating
counts whatever the registration.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_oneshot.errors import OneShotError, listed, shown
from nnunet_oneshot.io import load_json_checked, save_json_atomic
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache

RATINGS_FILE = "oneshot_ratings.json"
RATINGS = ("good", "doubtful", "bad")
# In an exported file: an earlier rating is withdrawn.
_WITHDRAWN = "none"
FORMAT = "nnunet_oneshot ratings"
_VERSION = 1


@dataclass(frozen=True)
class Rating:
    """One registration's rating.

    Attributes:
        registrations: Folder of the registrations, in ``oneshot_registrations``.
        atlas: Name of the labelled case.
        case: Name of the case that it is warped to.
        rating: One of `RATINGS`, or ``"none"`` where an earlier one is withdrawn.
        key: Key of the registration that was looked at; empty for any.
    """

    registrations: str
    atlas: str
    case: str
    rating: str
    key: str = ""

    @property
    def place(self) -> tuple[str, str, str]:
        """What is rated; a later rating of the same replaces an earlier one."""
        return self.registrations, self.atlas, self.case


def read_ratings(path: str | os.PathLike, dataset: str) -> list[Rating]:
    """Reads a file of ratings.

    Args:
        path: The file.
        dataset: Name of the dataset that it must be of.

    Raises:
        OneShotError: The file is missing, damaged, of another kind or of another dataset.
    """
    content = load_json_checked(path, "the file of ratings", dict)
    if content.get("format") != FORMAT or content.get("version") != _VERSION:
        raise OneShotError(
            f'{path} is no file of ratings: expected "format": "{FORMAT}" and "version": {_VERSION}. Export one from '
            f"the page that `nnunet_oneshot report` writes."
        )
    if content.get("dataset") != dataset:
        raise OneShotError(
            f"The ratings in {path} are of {shown(content.get('dataset'))}, expected {dataset}: export them from this "
            f"dataset's report."
        )
    entries = content.get("ratings")
    if not isinstance(entries, list):
        raise OneShotError(f'{path} must hold a list under "ratings": export it again, or delete it.')
    return [_rating(entry, path) for entry in entries]


def keep_ratings(base: Path, file: str | os.PathLike) -> int:
    """Adds the ratings of an exported file to those of a dataset, where they replace earlier ones of the same pairs.

    Args:
        base: Where the dataset keeps what is added to it, `PreparedDataset.kept`.
        file: As the report's page exports it.

    Returns:
        The number of ratings in ``file``.

    Raises:
        OneShotError: A file is damaged, or ``oneshot_ratings.json`` cannot be written.
    """
    new = read_ratings(file, base.name)
    kept = {rating.place: rating for rating in [*stored_ratings(base), *new]}
    entries = [asdict(kept[place]) for place in sorted(kept) if kept[place].rating != _WITHDRAWN]
    content = {"format": FORMAT, "version": _VERSION, "dataset": base.name, "ratings": entries}
    save_json_atomic(content, base / RATINGS_FILE)
    return len(new)


def stored_ratings(base: Path) -> list[Rating]:
    """The ratings of a dataset; none where it has no file of them."""
    path = base / RATINGS_FILE
    return read_ratings(path, base.name) if path.is_file() else []


def folder_name(base: Path, cache: RegistrationCache) -> str:
    """How ratings call the registrations of a cache."""
    return cache.folder.relative_to(base / FOLDER).as_posix()


def rejected_pairs(
    base: Path, cache: RegistrationCache, pairs: Iterable[tuple[str, str]], log: Callable[[str], None]
) -> frozenset[tuple[str, str]]:
    """The pairs that are rated bad, which no patch is made from, and a sentence about them in the log.

    Args:
        base: The dataset's folder.
        cache: The registrations.
        pairs: Those in question, (atlas, case).
        log: Called with messages.

    Raises:
        OneShotError: ``oneshot_ratings.json`` is damaged.
    """
    ratings = stored_ratings(base)
    if not ratings:
        return frozenset()
    asked, name = set(pairs), folder_name(base, cache)
    mine = [r for r in ratings if r.rating == "bad" and r.registrations == name and (r.atlas, r.case) in asked]
    rejected: list[Rating] = []
    outdated: list[Rating] = []
    for rating in mine:
        record = cache.record(rating.atlas, rating.case)
        same = not rating.key or (record is not None and record["key"] == rating.key)
        (rejected if same else outdated).append(rating)
    path = base / RATINGS_FILE
    if rejected:
        log(
            f"{len(rejected)} of {len(asked)} registrations are left out, since they are rated bad in {path}: "
            f"{listed(rating.case for rating in rejected)}."
        )
    if outdated:
        log(
            f"Warning: {len(outdated)} bad ratings in {path} are of registrations that have since been made in "
            f"another way ({listed(rating.case for rating in outdated)}). They do not count: look at the new ones with "
            f"`nnunet_oneshot report`."
        )
    return frozenset((rating.atlas, rating.case) for rating in rejected)


def _rating(entry: Any, path: str | os.PathLike) -> Rating:
    fields = ("registrations", "atlas", "case", "rating")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in fields):
        raise OneShotError(
            f"{path} holds the rating {shown(entry)}: expected text under {', '.join(fields)}. Correct or remove it."
        )
    key = entry.get("key", "")
    if entry["rating"] not in (*RATINGS, _WITHDRAWN) or not isinstance(key, str):
        raise OneShotError(
            f"{path} rates the registration to {listed([entry['case']])} {shown(entry['rating'])}: expected one of "
            f"{', '.join(RATINGS)}. Correct or remove it."
        )
    return Rating(entry["registrations"], entry["atlas"], entry["case"], entry["rating"], key)
