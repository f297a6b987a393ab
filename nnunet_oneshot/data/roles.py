"""Which case plays which part in a training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.config import BLOCK, OneShotConfig, differences, settings_in_force
from nnunet_oneshot.data.atlas import AtlasChoice, resolve_atlases
from nnunet_oneshot.data.partial import require_every_label
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import OneShotError, listed


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
            f"Progress is watched on {len(self.progress)} {kind}, by the labels that are warped with the atlas: the "
            f"pseudo Dice is not the Dice on real images, and no validation label is read for it.",
        ]

    def require_unlabelled(self) -> None:
        """Makes sure that there is a case to register the atlas to, or several atlases, which are shown as they are.

        Raises:
            OneShotError: There is neither.
        """
        if not self.unlabelled and len(self.atlases) < 2:
            raise OneShotError(
                f"The training part of this fold holds no case beside the atlas ({', '.join(self.atlases)}), expected "
                f"at least one unlabelled image to register it to. Add unlabelled images to imagesTr, "
                f"change splits_final.json, or train on the atlas alone with OneShotAtlasTrainer."
            )


def assign_roles(choice: AtlasChoice, fold: Fold, config: OneShotConfig) -> CaseRoles:
    """Divides the cases of a fold.

    Args:
        choice: The atlases of the fold.
        fold: Its cases, atlases included.
        config: ``unlabelled_fraction``, the share (0 to 1) of the unlabelled training cases that is used, at least one
            case, drawn by ``seed``; and ``progress_cases``, the number of progress cases, at least one. They are the
            first validation cases or, where there is none, the first unlabelled training cases or, where there is none
            either, the first atlases, to which the others are registered.
    """
    candidates = sorted(set(fold.train) - set(choice.atlases))
    number = max(1, round(config.unlabelled_fraction * len(candidates)))
    unlabelled = sorted(np.random.RandomState(config.seed).permutation(candidates)[:number].tolist())
    held_out = sorted(set(fold.validation) - set(choice.atlases))
    progress = (held_out or unlabelled or sorted(choice.atlases))[: max(1, config.progress_cases)]
    return CaseRoles(
        atlases=tuple(choice.atlases),
        how=choice.how,
        unlabelled=tuple(unlabelled),
        progress=tuple(progress),
        held_out=bool(held_out),
    )


def resolve_roles(
    prepared: PreparedDataset, config: OneShotConfig, fold: Fold, log: Callable[[str], None]
) -> CaseRoles:
    """Finds the atlases of a fold, divides its cases and says so in the log.

    Args:
        prepared: The dataset.
        config: Settings in force.
        fold: The fold's cases.
        log: Takes one sentence at a time.

    Raises:
        OneShotError: See `nnunet_oneshot.data.atlas.resolve_atlases` and
            `nnunet_oneshot.data.partial.require_every_label`.
    """
    roles = assign_roles(
        resolve_atlases(prepared.base, config, fold, prepared.image_in_common_order, kept=prepared.kept), fold, config
    )
    require_every_label(prepared.dataset_json, roles.atlases, fold.number)
    for sentence in roles.sentences():
        log(sentence)
    if hidden := sorted(set(roles.atlases) & set(prepared.hidden_labels)):
        log(f"Partly labelled atlases, whose background may be any structure that they do not show: {listed(hidden)}.")
    if BLOCK not in prepared.plans and len(fold.labelled) > len(roles.atlases):
        log(
            f'These plans have no "{BLOCK}" block: stock nnU-Net made them, and their intensity statistics come from '
            f"the labels of all cases. For plans that see no label but the atlas's, run `nnunet_oneshot "
            f"plan_and_preprocess`."
        )
    changed = differences(settings_in_force(OneShotConfig()), settings_in_force(config))
    log(f'Settings of the "{BLOCK}" block: {"; ".join(changed) or "the defaults"}.')
    return roles
