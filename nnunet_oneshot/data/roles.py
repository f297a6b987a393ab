"""Which case plays which part in a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nnunet_oneshot.config import BLOCK, OneShotConfig
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.preprocessed import load_image
from nnunet_oneshot.errors import OneShotError


@dataclass(frozen=True)
class CaseRoles:
    """The cases of one run.

    Attributes:
        atlases: Labelled cases that are warped; no other label is read in training.
        how: How the atlases were chosen, a clause such as ``"named in the plans"``.
        unlabelled: Training cases whose images, and nothing else, are used.
        progress: Cases on whose synthetic pairs progress is watched.
        held_out: Whether the progress cases are validation cases, not training cases.
    """

    atlases: tuple[str, ...]
    how: str
    unlabelled: tuple[str, ...]
    progress: tuple[str, ...]
    held_out: bool

    def sentences(self) -> list[str]:
        """What a log should say about the roles."""
        plural = "Atlases" if len(self.atlases) > 1 else "Atlas"
        kind = "held-out cases" if self.held_out else "training cases, since no case is held out"
        return [
            f"{plural}: {', '.join(self.atlases)} ({self.how}).",
            f"Unlabelled training cases: {len(self.unlabelled)}. Their labels, where they have any, are not opened.",
            f"Progress is watched on {len(self.progress)} {kind}; no validation label is read for it.",
        ]

    def require_unlabelled(self) -> None:
        """Makes sure that there is a case to register the atlas to.

        Raises:
            OneShotError: There is none.
        """
        if not self.unlabelled:
            raise OneShotError(
                f"The training part of this fold holds no case beside the atlas ({', '.join(self.atlases)}), expected "
                f"at least one unlabelled image to register it to. Add unlabelled images to imagesTr, name fewer "
                f"atlases, change splits_final.json, or train on the atlas alone with OneShotAtlasTrainer."
            )


def assign_roles(
    *,
    atlases: Sequence[str],
    how: str,
    train_keys: Sequence[str],
    val_keys: Sequence[str],
    unlabelled_fraction: float,
    progress_cases: int,
    seed: int,
) -> CaseRoles:
    """Divides the cases of a fold.

    Args:
        atlases: The atlases of the fold.
        how: How they were chosen.
        train_keys: Training cases, atlases included.
        val_keys: Validation cases.
        unlabelled_fraction: Share (0 to 1) of the unlabelled training cases that is used, at least one case.
        progress_cases: Number of progress cases; at least one is used. They are the first validation cases or, where
            there is none, the first unlabelled training cases.
        seed: Seed of the choice of that share.
    """
    candidates = sorted(set(train_keys) - set(atlases))
    number = max(1, round(unlabelled_fraction * len(candidates)))
    unlabelled = sorted(np.random.RandomState(seed).permutation(candidates)[:number].tolist())
    held_out = sorted(set(val_keys) - set(atlases))
    progress = (held_out or unlabelled)[: max(1, progress_cases)]
    return CaseRoles(
        atlases=tuple(atlases),
        how=how,
        unlabelled=tuple(unlabelled),
        progress=tuple(progress),
        held_out=bool(held_out),
    )


def resolve_roles(
    *,
    plans: dict[str, Any],
    config: OneShotConfig,
    preprocessed_dataset_folder_base: str,
    preprocessed_dataset_folder: str,
    train_keys: Sequence[str],
    val_keys: Sequence[str],
    labelled: Sequence[str],
    fold: int | str,
    log: Callable[[str], None],
) -> CaseRoles:
    """Finds the atlases of a fold, divides its cases and says so in the log.

    Args:
        plans: Content of the plans file.
        config: Settings in force.
        preprocessed_dataset_folder_base: ``nnUNet_preprocessed/DatasetXXX_Name``.
        preprocessed_dataset_folder: The configuration's folder in it.
        train_keys: Training cases.
        val_keys: Validation cases.
        labelled: Labelled cases.
        fold: The fold's number, or ``"all"``.
        log: Takes one sentence at a time.

    Raises:
        OneShotError: See `nnunet_oneshot.data.atlas.resolve_atlases`.
    """
    image_loader = partial(load_image, preprocessed_dataset_folder)
    choice = resolve_atlases(
        preprocessed_dataset_folder_base, config, train_keys, val_keys, labelled, fold, image_loader
    )
    roles = assign_roles(
        atlases=choice.atlases,
        how=choice.how,
        train_keys=train_keys,
        val_keys=val_keys,
        unlabelled_fraction=config.unlabelled_fraction,
        progress_cases=config.progress_cases,
        seed=config.seed,
    )
    for sentence in roles.sentences():
        log(sentence)
    if BLOCK not in plans and len(labelled) > len(roles.atlases):
        log(
            f'These plans have no "{BLOCK}" block: stock nnU-Net made them, and their intensity statistics come from '
            f"the labels of all cases. For plans that see no label but the atlas's, run `nnunet_oneshot "
            f"plan_and_preprocess`."
        )
    log(f'Settings of the "{BLOCK}" block in force: {config.to_dict()}')
    return roles
