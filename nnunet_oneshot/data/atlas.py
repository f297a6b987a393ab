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
from nnunet_oneshot.data.thumbnails import find_medoid, pool_volume
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import load_json_checked, save_json_atomic

ATLAS_FILE = "oneshot_atlas.json"


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
    preprocessed_dataset_folder_base: str,
    config: OneShotConfig,
    train_keys: Sequence[str],
    val_keys: Sequence[str],
    labelled: Sequence[str],
    fold: int | str,
    image_loader: Callable[[str], np.ndarray],
) -> AtlasChoice:
    """The atlases of a fold: those the plans name, else those of ``oneshot_atlas.json``, else chosen without labels.

    In a partly labelled data set every labelled training case is an atlas. Where all training cases are labelled one is
    chosen: the medoid of the training images (see `nnunet_oneshot.data.thumbnails`). The choice is written to the file.

    Args:
        preprocessed_dataset_folder_base: ``nnUNet_preprocessed/DatasetXXX_Name``.
        config: Its ``atlases``, where set, come first.
        train_keys: Training cases of the fold.
        val_keys: Its validation cases.
        labelled: All labelled cases.
        fold: Number of the fold, or ``"all"``.
        image_loader: Gives a case's image, (C, X, Y, Z); called only when a choice among several is to be made.

    Raises:
        OneShotError: A named atlas is unknown, unlabelled or in the fold's validation part, or the file is damaged.
    """
    if config.atlases is not None:
        where = 'named in the plans\' "oneshot" block'
        return AtlasChoice(check_named(config.atlases, train_keys, val_keys, labelled, fold, where), where)
    path = Path(preprocessed_dataset_folder_base) / ATLAS_FILE
    stored = _read(path) if path.is_file() else None
    if stored is None:
        choice = _choose(train_keys, val_keys, labelled, image_loader)
        # Where every labelled case serves, the file names them all: each fold then leaves out its own validation cases.
        partly = set(labelled) < {*train_keys, *val_keys}
        names = sorted(labelled) if partly else choice.atlases
        save_choice(preprocessed_dataset_folder_base, names, by_user=False, how=choice.how)
        return choice
    entry = stored.get("folds", {}).get(str(fold), stored)
    if _is_users(entry):
        where = f"named by the user in {path}"
        return AtlasChoice(check_named(entry["atlases"], train_keys, val_keys, labelled, fold, where), where)
    usable = [case for case in entry["atlases"] if case in set(train_keys) & set(labelled)]
    if usable:
        return AtlasChoice(usable, f"{entry.get('how', 'chosen by the program')} (from {path})")
    choice = _choose(train_keys, val_keys, labelled, image_loader)
    how = f"{choice.how}; for fold {fold} only, whose training part lacks {', '.join(entry['atlases'])}"
    stored.setdefault("folds", {})[str(fold)] = _entry(choice.atlases, by_user=False, how=how)
    save_json_atomic(stored, path)
    return AtlasChoice(choice.atlases, how)


def save_choice(preprocessed_dataset_folder_base: str, atlases: Sequence[str], *, by_user: bool, how: str) -> None:
    """Writes ``oneshot_atlas.json``."""
    path = Path(preprocessed_dataset_folder_base) / ATLAS_FILE
    save_json_atomic(_entry(atlases, by_user=by_user, how=how), path)


def check_named(
    named: Sequence[str],
    train_keys: Sequence[str],
    val_keys: Sequence[str],
    labelled: Sequence[str],
    fold: int | str,
    where: str,
) -> list[str]:
    """Checks atlases that the user named.

    Raises:
        OneShotError: One is unknown, unlabelled or in the fold's validation part.
    """
    check_labelled(named, [*train_keys, *val_keys], labelled, where)
    held_out = sorted(set(named) & set(val_keys))
    if held_out:
        raise OneShotError(
            f"Atlas {', '.join(held_out)} ({where}) is in the validation part of fold {fold}, where it would be scored "
            f"on its own label: train another fold, name another atlas or edit splits_final.json. Labelled training "
            f"cases of this fold: {', '.join(sorted(set(labelled) & set(train_keys)))}."
        )
    absent = sorted(set(named) - set(train_keys))
    if absent:
        raise OneShotError(
            f"Atlas {', '.join(absent)} ({where}) is not among the training cases of fold {fold}: edit "
            f"splits_final.json or name another."
        )
    return list(dict.fromkeys(named))


def check_labelled(named: Sequence[str], cases: Sequence[str], labelled: Sequence[str], where: str) -> None:
    """Raises an `OneShotError` when a named atlas has no label."""
    for case in named:
        if case not in labelled:
            reason = "has no label" if case in cases else "is not a case of this data set"
            raise OneShotError(
                f"Atlas {case} ({where}) {reason}: name one of the labelled cases ({', '.join(sorted(labelled))})."
            )


def _choose(
    train_keys: Sequence[str], val_keys: Sequence[str], labelled: Sequence[str], image_loader: Callable
) -> AtlasChoice:
    candidates = sorted(set(train_keys) & set(labelled))
    if not candidates:
        raise OneShotError(f"The training part has no labelled case. Labelled: {', '.join(sorted(labelled))}.")
    if {*train_keys, *val_keys} - set(labelled):
        return AtlasChoice(candidates, "every labelled training case")
    best, correlation = find_medoid(candidates, {case: pool_volume(image_loader(case)) for case in train_keys})
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
    stored = load_json_checked(path, "the file of atlases")

    def is_entry(entry: Any) -> bool:
        return (
            isinstance(entry, dict)
            and isinstance(entry.get("atlases"), list)
            and bool(entry["atlases"])
            and all(isinstance(case, str) for case in entry["atlases"])
        )

    folds = stored.get("folds", {}) if isinstance(stored, dict) else None
    if not is_entry(stored) or not isinstance(folds, dict) or not all(is_entry(entry) for entry in folds.values()):
        raise OneShotError(
            f'{path} must hold {{"atlases": [case names], "chosen_by": "user" or "program"}}: mend it, or delete it to '
            f"have the atlas chosen anew."
        )
    return stored
