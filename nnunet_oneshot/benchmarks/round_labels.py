"""Judges what a training's last round changed: first and guided registrations against the true labels.

``python -m nnunet_oneshot.benchmarks.round_labels -d 26 -c 3d_fullres -p PLANS -f 0 -tr TRAINER -o OUT``

The true labels of training cases are opened here, to judge; nothing of it may go into a training.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.propagation import Propagator, score_folder
from nnunet_oneshot.io import require_env, save_text_atomic, writing
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache, kept_of
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar
from nnunet_oneshot.registration.pair.quality import telling_similarity
from nnunet_oneshot.registry import load_modules
from nnunet_oneshot.tables import csv_table, markdown_table

METHODS = ("registration", "corrected")
HEADER = ("case", "first", "guided", "first, corrected", "guided, corrected", "similarity, guided to first", "kept")


def judge_round(prepared: PreparedDataset, training: Path, out: Path) -> list[tuple]:
    """Mean Dice of each case that the last round of a training registered again, by both registrations.

    Args:
        prepared: The dataset.
        training: The fold's folder in ``nnUNet_results``.
        out: Folder of the segmentations.

    Returns:
        A row as in `HEADER` for each case, and last their means.

    Raises:
        OneShotError: There was no round, or a label is missing.
    """
    config = OneShotConfig.from_plans(prepared.plans)
    guided = RegistrationCache(training / FOLDER)
    atlases = sorted(path.name for path in guided.folder.glob("*") if path.is_dir())
    if len(atlases) != 1:
        raise OneShotError(f"{guided.folder} holds registrations of {len(atlases)} atlases: expected those of one.")
    atlas = atlases[0]
    cases = sorted(path.stem for path in (guided.folder / atlas).glob("*.json"))
    without = sorted(set(cases) - set(prepared.labelled))
    if without:
        raise OneShotError(f"{', '.join(without)} have no label in {prepared.labels_folder}: nothing can be judged.")
    first = RegistrationCache(prepared.kept / FOLDER / prepared.folder.name)
    registrar = DatasetRegistrar(prepared, config, [atlas], torch.device("cpu"))
    scores = [
        _scores(registrar, method, cache, cases, out / f"{name}_{method}")
        for method in METHODS
        for name, cache in (("first", first), ("guided", guided))
    ]
    kept = kept_of(first, guided, [(atlas, case) for case in cases]).kept
    ratios = [
        telling_similarity(guided.quality(atlas, case)) / telling_similarity(first.quality(atlas, case))
        for case in cases
    ]
    table = np.round(np.array(scores).T, 4)
    rows = [
        (case, *values, round(ratio, 3), (atlas, case) in kept)
        for case, values, ratio in zip(cases, table.tolist(), ratios, strict=True)
    ]
    return [*rows, ("mean", *np.round(table.mean(0), 4).tolist(), round(float(np.mean(ratios)), 3), len(kept))]


def _scores(
    registrar: DatasetRegistrar, method: str, cache: RegistrationCache, cases: Sequence[str], out: Path
) -> list[float]:
    """Mean Dice of each case, its labels carried by the registrations of a cache."""
    prepared = registrar.prepared
    propagator = Propagator(registrar, method, registrations=cache)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for case in cases:
        propagator.write(case, prepared.image(case), prepared.properties(case), out)
    summary = score_folder(prepared, out, cases)
    found = {
        Path(one["prediction_file"]).name: float(np.nanmean([label["Dice"] for label in one["metrics"].values()]))
        for one in summary["metric_per_case"]
    }
    return [found[f"{case}{prepared.file_ending}"] for case in cases]


def main(arguments: Sequence[str] | None = None) -> int:
    """Judges a training and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-c", dest="configuration", required=True)
    parser.add_argument("-p", dest="plans", required=True)
    parser.add_argument("-f", dest="fold", required=True)
    parser.add_argument("-tr", dest="trainer", required=True)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    options = parser.parse_args(arguments)
    require_env("nnUNet_preprocessed", "nnUNet_results")
    load_modules()
    prepared = PreparedDataset.open(
        dataset=options.dataset, plans_name=options.plans, configuration=options.configuration
    )
    model = f"{options.trainer}__{options.plans}__{options.configuration}"
    training = Path(os.environ["nnUNet_results"]) / prepared.name / model / f"fold_{options.fold}"
    rows = judge_round(prepared, training, options.out)
    save_text_atomic(csv_table(HEADER, rows), options.out / "table.csv")
    print("\n".join(markdown_table(HEADER, [[str(cell) for cell in row] for row in rows])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
