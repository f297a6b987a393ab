"""The three sentences at the top of the page: what was trained, how good registrations are, where to look first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunet_oneshot.data.atlas import AtlasChoice
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import listed
from nnunet_oneshot.report.registrations import Pair
from nnunet_oneshot.report.training import Training
from nnunet_oneshot.report.validation import Scored

_WARNINGS = {
    "worse": "worse than its affine stage",
    "outlier": "far below the others",
    "ambiguous": "ambiguous",
    "unmoved": "without an affine map better than its start",
    "folded": "folded",
}


def conclusion(
    prepared: PreparedDataset,
    fold: Fold,
    choice: AtlasChoice,
    pairs: Sequence[Pair],
    training: Training | None,
    scored: Scored | None,
    trainer: str,
) -> list[str]:
    """Three sentences in plain text."""
    return [_trained(prepared, fold, choice, training, scored, trainer), _registered(pairs), _look_first(pairs, scored)]


def _trained(
    prepared: PreparedDataset,
    fold: Fold,
    choice: AtlasChoice,
    training: Training | None,
    scored: Scored | None,
    trainer: str,
) -> str:
    unlabelled = len(set(fold.train) - set(choice.atlases))
    material = f"fold {fold.number} of {prepared.name} (atlas {listed(choice.atlases)}, {unlabelled} unlabelled cases)"
    if training is None:
        return f"{trainer} has not been trained on {material} yet: this page shows its registrations."
    state = "was trained" if training.is_finished else "has begun to train"
    text = f"{trainer} {state} for {training.epochs} epochs on {material}"
    if scored is None or scored.mean is None:
        return f"{text}, and no labelled validation case has been scored."
    mean = scored.mean
    return (
        f"{text} and has a mean Dice of {mean.value:.3f} (95 % interval {mean.low:.3f} to {mean.high:.3f}) on "
        f"{len(scored.cases)} validation cases."
    )


def _registered(pairs: Sequence[Pair]) -> str:
    before, after = (
        float(np.median([pair.quality.get(name, np.nan) for pair in pairs]))
        for name in ("similarity_before", "similarity_after")
    )
    counts = {name: sum(name in pair.flags for pair in pairs) for name in _WARNINGS}
    found = [
        f"{number} {'is' if number == 1 else 'are'} {_WARNINGS[name]}" for name, number in counts.items() if number
    ]
    bad = sum(pair.rating == "bad" for pair in pairs)
    if bad:
        found.append(f"{bad} {'is' if bad == 1 else 'are'} rated bad and left out of training")
    problems = "; ".join(found) if found else "none looks suspicious by its figures"
    return (
        f"The deformable stage raises the median similarity of {len(pairs)} registrations from {before:.2f} to "
        f"{after:.2f}; {problems}."
    )


def _look_first(pairs: Sequence[Pair], scored: Scored | None) -> str:
    marked = [pair for pair in pairs if pair.flags and not pair.rating] or [p for p in pairs if not p.rating] or pairs
    first = marked[0]
    why = _WARNINGS[first.flags[0]] if first.flags else "the lowest similarity of those not rated yet"
    text = f"Look first at the registration to {listed([first.case])} ({why})"
    if scored is not None and scored.cases:
        worst = next(iter(scored.cases))
        return f"{text} and at the prediction of {listed([worst])} (Dice {scored.cases[worst]:.3f}, the lowest)."
    return f"{text}, then at the others in the order of the page."
