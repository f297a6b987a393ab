"""Which labelled cases are the atlases of a fold.

The choice is kept in ``oneshot_atlas.json`` beside ``splits_final.json``::

    {
        "atlases": ["case_7"],
        "chosen_by": "program",
        "how": "...",
        "program_choice": ["case_7"],
        "folds": {"3": {"atlases": ["case_2"], "how": "..."}}
    }

The file may be edited: names under ``atlases`` that the program did not put there count as the user's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.splits import Fold, resolve_fold
from nnunet_oneshot.data.thumbnails import find_medoid, pool_volume
from nnunet_oneshot.errors import OneShotError, listed
from nnunet_oneshot.io import Each, Shape, load_json_checked, save_json_atomic

ATLAS_FILE = "oneshot_atlas.json"
_ENTRY: dict[str, Shape] = {"atlases": [str], "chosen_by?": str, "how?": str, "program_choice?": [str]}


@dataclass(frozen=True)
class AtlasChoice:
    """The atlases of a fold.

    Attributes:
        atlases: Labelled training cases.
        how: One sentence on who chose them and by what rule.
    """

    atlases: list[str]
    how: str


def resolve_atlases(
    dataset_folder: str | Path,
    config: OneShotConfig,
    fold: Fold,
    image_loader: Callable[[str], np.ndarray],
    *,
    kept: Path | None = None,
) -> AtlasChoice:
    """The atlases of a fold: those the plans name, else those of ``oneshot_atlas.json``, else chosen without labels.

    In a partly labelled data set every labelled training case is an atlas, also where all are labelled but some only in
    part. Where all training cases are labelled one is chosen: the medoid of the training images (see
    `nnunet_oneshot.data.thumbnails`). The choice is written to the file.

    Args:
        dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        config: Its ``atlases``, where set, come first.
        fold: The fold's cases.
        image_loader: Gives a case's image, (C, X, Y, Z); called only when a choice among several is to be made.
        kept: Where the file is looked for and written if the dataset's folder has none; None is that folder.

    Raises:
        OneShotError: A named atlas is unknown, unlabelled or in the fold's validation part, or the file is damaged.
    """
    if config.atlases is not None:
        where = 'named in the plans\' "oneshot" block'
        return AtlasChoice(check_named(config.atlases, fold, where), where)
    path, kept = Path(dataset_folder) / ATLAS_FILE, kept or Path(dataset_folder)
    is_shared = path.is_file() and kept != path.parent
    if not path.is_file():
        path = kept / ATLAS_FILE
    if not path.is_file():
        # Once for all folds, by those of the first, so that it does not matter which is trained first.
        first = resolve_fold(
            dataset_folder, [*fold.train, *fold.validation], fold.labelled, 0, kept=kept, partial=fold.partial
        )
        choice = _choose(first, image_loader)
        # Where every labelled case serves, the file names them all: each fold then leaves out its own validation cases.
        partly = bool(fold.partial) or set(fold.labelled) < {*fold.train, *fold.validation}
        names = sorted(fold.labelled) if partly else choice.atlases
        save_choice(kept, names, by_user=False, how=choice.how)
        if set(choice.atlases) <= set(fold.train) and not partly:
            return choice
    stored = _read(path)
    entry = stored.get("folds", {}).get(str(fold.number), stored)
    if _is_users(entry):
        where = f"named by the user in {path}"
        return AtlasChoice(check_named(entry["atlases"], fold, where), where)
    usable = [case for case in entry["atlases"] if case in set(fold.train) & set(fold.labelled)]
    if usable:
        return AtlasChoice(usable, f"{entry.get('how', 'chosen by the program')} (from {path})")
    choice = _choose(fold, image_loader)
    how = f"{choice.how}; for fold {fold.number} only, whose training part lacks {listed(entry['atlases'])}"
    stored.setdefault("folds", {})[str(fold.number)] = _entry(choice.atlases, by_user=False, how=how)
    # Others' file is left alone: the same is chosen the next time.
    if not is_shared:
        save_json_atomic(stored, path)
    return AtlasChoice(choice.atlases, how)


def forget_outdated_choice(dataset_folder: str | Path, cases: Sequence[str], labelled: Sequence[str]) -> list[str]:
    """Removes the program's choice where a partly labelled data set got labels since, so that they become atlases too.

    Args:
        dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        cases: All cases of the data set.
        labelled: Those that are labelled.

    Returns:
        The new labelled cases; none where the choice is kept, as one of the user's is.

    Raises:
        OneShotError: The file of the choice is damaged.
    """
    path = Path(dataset_folder) / ATLAS_FILE
    if not path.is_file() or set(labelled) == set(cases):
        return []
    stored = _read(path)
    new = sorted(set(labelled) - set(stored["atlases"]))
    if not new or any(map(_is_users, [stored, *stored.get("folds", {}).values()])):
        return []
    path.unlink()
    return new


def save_choice(dataset_folder: str | Path, atlases: Sequence[str], *, by_user: bool, how: str) -> None:
    """Writes ``oneshot_atlas.json``."""
    save_json_atomic(_entry(atlases, by_user=by_user, how=how), Path(dataset_folder) / ATLAS_FILE)


def check_named(named: Sequence[str], fold: Fold, where: str) -> list[str]:
    """Checks atlases that the user named.

    Raises:
        OneShotError: One is unknown, unlabelled or in the fold's validation part.
    """
    check_labelled(named, [*fold.train, *fold.validation], fold.labelled, where)
    held_out = sorted(set(named) & set(fold.validation))
    if held_out:
        raise OneShotError(
            f"Atlas {listed(held_out)} ({where}) is in the validation part of fold {fold.number}, where it would be "
            f"scored on its own label: train another fold, name another atlas or edit splits_final.json. Labelled "
            f"training cases of this fold: {listed(sorted(set(fold.labelled) & set(fold.train)))}."
        )
    absent = sorted(set(named) - set(fold.train))
    if absent:
        raise OneShotError(
            f"Atlas {listed(absent)} ({where}) is not among the training cases of fold {fold.number}: edit "
            f"splits_final.json or name another."
        )
    return list(dict.fromkeys(named))


def check_labelled(named: Sequence[str], cases: Sequence[str], labelled: Sequence[str], where: str) -> None:
    """Raises an `OneShotError` when a named atlas has no label."""
    for case in named:
        if case not in labelled:
            reason = "has no label" if case in cases else "is not a case of this data set"
            raise OneShotError(
                f"Atlas {listed([case])} ({where}) {reason}: name one of the labelled cases "
                f"({listed(sorted(labelled))})."
            )


def _choose(fold: Fold, image_loader: Callable[[str], np.ndarray]) -> AtlasChoice:
    candidates = sorted(set(fold.train) & set(fold.labelled))
    if not candidates:
        raise OneShotError(f"The training part has no labelled case. Labelled: {listed(sorted(fold.labelled))}.")
    if fold.partial or {*fold.train, *fold.validation} - set(fold.labelled):
        return AtlasChoice(candidates, "every labelled training case")
    best, correlation = find_medoid(candidates, {case: pool_volume(image_loader(case)) for case in fold.train})
    return AtlasChoice(
        [best],
        f"medoid of {len(candidates)} training images, no label seen: mean correlation {correlation:.3f} with the "
        f"others at 24 cells an axis",
    )


def _entry(atlases: Sequence[str], *, by_user: bool, how: str) -> dict[str, Any]:
    entry = {"atlases": list(atlases), "chosen_by": "user" if by_user else "program", "how": how}
    return entry if by_user else {**entry, "program_choice": list(atlases)}


def _is_users(entry: dict[str, Any]) -> bool:
    """Whether the user named the atlases, by command or by editing the file."""
    return entry.get("chosen_by") == "user" or entry.get("program_choice", entry["atlases"]) != entry["atlases"]


def _read(path: Path) -> dict[str, Any]:
    stored = load_json_checked(path, "the file of atlases", {**_ENTRY, "folds?": Each(_ENTRY)})
    if not all(entry["atlases"] for entry in (stored, *stored.get("folds", {}).values())):
        raise OneShotError(
            f'{path} names no atlas: it must hold {{"atlases": [case names], "chosen_by": "user" or "program"}}, also '
            f"for single folds. Mend it, or delete it to have the atlas chosen anew."
        )
    return stored
