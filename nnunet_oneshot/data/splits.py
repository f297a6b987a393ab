"""Folds for data sets in which only some cases are labelled, kept in nnU-Net's ``splits_final.json``.

A fold's validation part is used to score a model where its cases are labelled, and to watch progress on synthetic
pairs where they are not. The training part always holds a labelled case, which becomes the atlas, and something to warp
it to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.errors import OneShotError, listed, shown
from nnunet_oneshot.io import load_json_checked, save_json_atomic

SPLITS_FILE = "splits_final.json"
_FOLDS = 5
_SEED = 12345  # nnU-Net's
_REMEDY = "Edit the file, or delete it to have it made anew."


@dataclass(frozen=True)
class Fold:
    """The cases of one fold.

    Attributes:
        number: Its number, or ``"all"``.
        train: Training cases.
        validation: Validation cases.
        labelled: All labelled cases of the dataset, sorted.
        partial: Those of them whose label shows some structures only.
    """

    number: int | str
    train: list[str]
    validation: list[str]
    labelled: list[str]
    partial: Sequence[str] = ()

    @property
    def scored(self) -> list[str]:
        """The validation cases that have a label to be scored against, which shows every structure."""
        return [case for case in self.validation if case in self.labelled and case not in self.partial]


def fold_number(text: int | str) -> int | str:
    """A fold as nnU-Net has it, from what a user typed.

    Raises:
        OneShotError: It is neither a number nor ``"all"``.
    """
    if text != "all" and not str(text).isdecimal():
        raise OneShotError(f"Fold {shown(text)} is neither a number nor 'all': give folds such as -f 0 1.")
    return "all" if text == "all" else int(text)


def resolve_fold(
    dataset_folder: str | Path,
    identifiers: Sequence[str],
    labelled: Sequence[str],
    number: int | str,
    *,
    kept: Path | None = None,
    partial: Sequence[str] = (),
) -> Fold:
    """Training and validation cases of a fold; writes ``splits_final.json`` where it is missing.

    Args:
        dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        identifiers: All preprocessed cases.
        labelled: Those of them that are labelled.
        number: A fold's number or ``"all"`` (everything is training, nothing validation). A number beyond the file gets
            nnU-Net's seeded 80:20 split, in which a labelled and a further case stay in the training part.
        kept: Where the file is looked for and written if the dataset's folder has none; None is that folder.
        partial: Those whose label shows some structures only.

    Raises:
        OneShotError: There is no label or only one case, or ``splits_final.json`` does not fit the data set.
    """
    folder, number = Path(dataset_folder), fold_number(number)
    cases, labelled = sorted(identifiers), sorted(set(labelled) & set(identifiers))
    if len(cases) < 2:
        raise OneShotError(f"{folder.name} has {len(cases)} case(s): at least 2 are needed.")
    if not labelled:
        raise OneShotError(
            f"{folder.name} has no labelled case: {folder / 'gt_segmentations'} holds no label of one of its "
            f"{len(cases)} cases. Label at least one and run `nnunet_oneshot plan_and_preprocess` again."
        )
    if number == "all":
        return Fold(number, cases, [], labelled, partial)
    path = folder / SPLITS_FILE
    if kept is not None and not path.is_file():
        path = kept / SPLITS_FILE
    if not path.is_file():
        save_json_atomic(create_splits(cases, labelled), path)
    splits = read_splits(path)
    if int(number) < len(splits):
        train, val = splits[int(number)]["train"], splits[int(number)]["val"]
        _check_fold(path, int(number), train, val, cases, labelled)
    else:
        train, val = _random_fold(cases, labelled, int(number))
    return Fold(number, list(train), list(val), labelled, partial)


def create_splits(cases: Sequence[str], labelled: Sequence[str]) -> list[dict[str, list[str]]]:
    """Folds for a new data set.

    Args:
        cases: All cases, sorted; at least 2.
        labelled: Those that are labelled, sorted; at least 1.

    Returns:
        One ``{"train": [...], "val": [...]}`` a fold: nnU-Net's own five folds where all of five or more cases are
        labelled; else the labelled cases are held out in turn; with one labelled case the unlabelled ones are; and with
        only two cases there is one fold without a validation part.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    unlabelled = [case for case in cases if case not in set(labelled)]
    if len(cases) == 2:
        return [{"train": list(cases), "val": []}]
    held_out, always = (labelled, unlabelled) if len(labelled) > 1 else (unlabelled, labelled)
    folds = generate_crossval_split(list(held_out), seed=_SEED, n_splits=min(_FOLDS, len(held_out)))
    return [
        {
            "train": [str(case) for case in (fold["train"] if not always else sorted([*fold["train"], *always]))],
            "val": [str(case) for case in fold["val"]],
        }
        for fold in folds
    ]


def read_splits(path: str | Path) -> list[dict[str, Any]]:
    """The folds of a ``splits_final.json``.

    Raises:
        OneShotError: The file is missing or damaged, or holds no list of at least one fold.
    """
    splits = load_json_checked(path, "the file of splits", [{"train": [str], "val": [str]}])
    if not splits:
        raise OneShotError(
            f'{path} holds no fold: write a list of folds, each {{"train": [case names], "val": [case names]}}, or '
            f"delete it to have it made anew."
        )
    return splits


def check_splits(path: str | Path, cases: Sequence[str]) -> list[dict[str, Any]]:
    """Reads a ``splits_final.json`` and makes sure that each of its folds fits a data set.

    Whether a fold has an atlas is left to its training, since others may be trained.

    Args:
        path: The file.
        cases: All cases of the data set.

    Returns:
        The folds.

    Raises:
        OneShotError: As `read_splits`, or a fold names other cases, one twice, or one for both parts.
    """
    splits = read_splits(path)
    for number, fold in enumerate(splits):
        _check_names(path, number, fold["train"], fold["val"], cases)
    return splits


def _check_names(path: str | Path, fold: int, train: Sequence[str], val: Sequence[str], cases: Sequence[str]) -> None:
    """Raises when a fold names what it must not."""
    unknown = sorted({*train, *val} - set(cases))
    if unknown:
        raise OneShotError(
            f"Fold {fold} of {path} names cases that are not in the data set: {listed(unknown)}. {_REMEDY}"
        )
    overlap = sorted(set(train) & set(val))
    if overlap:
        raise OneShotError(
            f"Fold {fold} of {path} has cases both in training and validation: {listed(overlap)}. {_REMEDY}"
        )
    twice = sorted({case for part in (train, val) for case in part if part.count(case) > 1})
    if twice:
        raise OneShotError(f"Fold {fold} of {path} names cases more than once: {listed(twice)}. {_REMEDY}")


def _check_fold(
    path: Path, fold: int, train: Sequence[str], val: Sequence[str], cases: Sequence[str], labelled: Sequence[str]
) -> None:
    """Raises when a fold of the file cannot be trained on."""
    _check_names(path, fold, train, val, cases)
    if not set(train) & set(labelled):
        raise OneShotError(
            f"Fold {fold} of {path} has no labelled case in its training part, so there is no atlas. "
            f"Labelled: {listed(labelled)}. {_REMEDY}"
        )


def _random_fold(cases: list[str], labelled: list[str], fold: int) -> tuple[list[str], list[str]]:
    """nnU-Net's seeded 80:20 split, corrected where its training part has no atlas or nothing to warp it to."""
    random = np.random.RandomState(seed=_SEED + fold)
    chosen = random.choice(len(cases), int(len(cases) * 0.8), replace=False)
    train = [cases[index] for index in chosen]
    if not set(train) & set(labelled):
        train.append(labelled[0])
    if len(train) < 2:
        return cases, []
    return train, [case for case in cases if case not in set(train)]
