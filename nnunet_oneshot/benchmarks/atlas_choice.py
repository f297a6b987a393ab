"""Whether the suggested atlas propagates better than others: ``python -m nnunet_oneshot.benchmarks.atlas_choice``.

Needs a raw data set with a label for each case. Labels are used for scoring only, not for the ranking.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.data.fingerprint import read_labelled_case, survey_images
from nnunet_oneshot.data.raw import RawDataset, find_dataset
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.evaluation.metrics import dice
from nnunet_oneshot.registration.dataset.ranking import RankedCase, rank_cases
from nnunet_oneshot.registration.pair.registrar import register_arrays
from nnunet_oneshot.registration.pair.warp import warp_atlas_to_case


@dataclass(frozen=True)
class AtlasScore:
    """How well one atlas propagates.

    Attributes:
        ranked: The atlas's place in the ranking.
        dice: Mean Dice of its propagated labels over labels and cases.
    """

    ranked: RankedCase
    dice: float


def score_atlases(
    raw: RawDataset,
    *,
    atlases: int = 10,
    cases: int = 20,
    config: RegistrationConfig | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> list[AtlasScore]:
    """Propagates the labels of atlases spaced evenly in the ranking, including the first.

    Args:
        raw: A data set in which every case is labelled.
        atlases: Number of atlases.
        cases: Number of random cases to which each atlas is registered, excluding the atlas itself.
        config: Settings of the registration; None for the defaults.
        seed: Seed for drawing the cases.
        show_progress: Whether to show progress bars.

    Returns:
        One score per atlas, in the order of the ranking.

    Raises:
        OneShotError: A case has no label.
    """
    unlabelled = sorted(set(raw.cases) - set(raw.labelled))
    if unlabelled:
        raise OneShotError(f"{raw.name}: {', '.join(unlabelled[:5])} have no label; scores need all of them.")
    surveys = survey_images(raw, num_processes=1, show_progress=show_progress)
    ranking = rank_cases({case: survey.thumbnail for case, survey in surveys.items()}, show_progress=show_progress)
    places = np.unique(np.linspace(0, len(ranking) - 1, min(atlases, len(ranking))).round().astype(int))
    targets = np.random.default_rng(seed).permutation(raw.cases)[: cases + 1].tolist()
    labels = sorted({int(label) for label in raw.label_manager.foreground_labels})
    loaded = {case: read_labelled_case(raw, case)[:2] for case in {*targets, *(ranking[p].case for p in places)}}
    scores = []
    for place in tqdm(places, desc="Propagating", disable=not show_progress):
        atlas = ranking[place].case
        others = [case for case in targets if case != atlas][:cases]
        values = [_propagated_dice(loaded[atlas], loaded[case], labels, config) for case in others]
        scores.append(AtlasScore(ranking[place], float(np.mean(values))))
    return scores


def _propagated_dice(atlas: tuple, case: tuple, labels: Sequence[int], config: RegistrationConfig | None) -> float:
    (atlas_image, atlas_seg), (case_image, case_seg) = atlas, case
    registration = register_arrays(
        atlas_image.data,
        case_image.data,
        atlas_spacing=atlas_image.properties["spacing"],
        case_spacing=case_image.properties["spacing"],
        config=config,
    )
    _, warped = warp_atlas_to_case(registration, atlas_image.data, atlas_seg.astype(np.int16))
    # A label that is absent from both has no Dice.
    shown = [label for label in labels if (case_seg == label).any() or (warped == label).any()]
    return float(np.mean([dice(warped == label, case_seg == label) for label in shown]))


def report(scores: Sequence[AtlasScore]) -> str:
    """A table, the rank correlation of typicality and Dice, and the suggested atlas compared with the average."""
    lines = [f"{'rank':>5}  {'correlation':>11}  {'Dice':>6}  case"]
    lines += [f"{s.ranked.rank:5d}  {s.ranked.correlation:11.3f}  {s.dice:6.3f}  {s.ranked.case}" for s in scores]
    values = np.array([score.dice for score in scores])
    rho, p = spearmanr([score.ranked.correlation for score in scores], values)
    before, _ = spearmanr([score.ranked.correlation_unaligned for score in scores], values)
    lines.append(f"Spearman's rho of correlation and Dice: {rho:.2f} (p = {p:.3f}); before alignment {before:.2f}")
    lines.append(
        f"Suggested atlas {values[0]:.3f}; all {len(values)}: mean {values.mean():.3f}, standard deviation "
        f"{values.std(ddof=1):.3f}, best {values.max():.3f}, worst {values.min():.3f}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset number or name in nnUNet_raw")
    parser.add_argument("--atlases", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="cases an atlas; default: %(default)s")
    options = parser.parse_args(arguments)
    return exit_status(
        lambda: print(report(score_atlases(find_dataset(options.d), atlases=options.atlases, cases=options.cases)))
    )


if __name__ == "__main__":
    sys.exit(main())
