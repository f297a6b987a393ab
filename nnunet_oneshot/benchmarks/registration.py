"""Compares registration methods on the same pairs: ``python -m nnunet_oneshot.benchmarks.registration``.

OUT/settings.json   settings of the comparison; later calls must use the same
OUT/pairs.jsonl     one line per method and pair, written after its measurement; later calls measure only missing ones
OUT/summary.json  summary.md   see `nnunet_oneshot.benchmarks.registration_summary`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.benchmarks.registration_summary import summarise, summary_markdown
from nnunet_oneshot.benchmarks.registration_worker import Worker
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.atlas import check_labelled, resolve_atlases
from nnunet_oneshot.data.orientation import edges_in_common_order, in_common_order
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.evaluation.metrics import score_segmentation
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS, MethodOptions
from nnunet_oneshot.evaluation.runs import claim_folder
from nnunet_oneshot.io import save_json_atomic, save_text_atomic, writing
from nnunet_oneshot.registration.pair.functional import folding, identity_grid
from nnunet_oneshot.registration.pair.warp import sample_labels
from nnunet_oneshot.registry import load_modules
from nnunet_oneshot.versions import versions

_MODULE = "nnunet_oneshot.benchmarks.registration"
SETTINGS, PAIRS = "settings.json", "pairs.jsonl"


def benchmark_registration(
    prepared: PreparedDataset,
    out: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    methods: Sequence[str],
    threads: int = 1,
    device: str = "cpu",
    command: str = "",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Registers atlases to labelled cases with each method, pair by pair, and scores the warped labels.

    The methods take turns on each pair, so that other load on the machine affects all of them equally.

    Args:
        prepared: The dataset; the ``oneshot`` block of its plans holds our settings. The optimisation of each pair
            replaces registration by a network.
        out: The benchmark's folder; a benchmark with the same settings is resumed.
        pairs: (atlas, case) of each registration, see `choose_pairs`.
        methods: Names in `REGISTRATION_METHODS`, see `available_methods`.
        threads: Number of threads of each method.
        device: Device of our deformable stage.
        command: The command line, for the summary.
        log: Called with each message.

    Returns:
        The content of ``summary.json``, which includes the pairs of earlier calls.

    Raises:
        OneShotError: ``out`` contains something else, or a method failed on some pairs (all others are measured and
            summarised).
    """
    config = OneShotConfig.from_plans(prepared.plans)
    registration = dataclasses.replace(config.registration, method="refine")
    settings = {
        "dataset": prepared.name,
        "plans": prepared.plans_name,
        "configuration": prepared.configuration,
        "threads": threads,
        "device": device,
        "seed": config.seed,
        "registration": json.loads(json.dumps(dataclasses.asdict(registration))),
        "versions": {**versions(), "SimpleITK": version("SimpleITK")},
    }
    out = Path(out).absolute()
    claim_folder(out / SETTINGS, settings, "benchmark of registrations")
    failures = _measure_missing(
        prepared, out, pairs, methods, MethodOptions(registration, config.seed, threads, device), log
    )
    rows = read_pairs(out)
    summary = {}
    if rows:
        summary = {**settings, "command": command, **summarise(rows)}
        save_json_atomic(summary, out / "summary.json")
        save_text_atomic(summary_markdown(summary), out / "summary.md")
        log(f"Wrote {out / 'summary.md'} and summary.json")
    if failures:
        raise OneShotError(
            f"{len(failures)} registrations failed: {'; '.join(failures)}. Their messages are above; the same command "
            f"measures only what is missing."
        )
    return summary


def _measure_missing(
    prepared: PreparedDataset,
    out: Path,
    pairs: Sequence[tuple[str, str]],
    methods: Sequence[str],
    options: MethodOptions,
    log: Callable[[str], None],
) -> list[str]:
    """Measures the pairs missing from ``pairs.jsonl``; returns the failed ones."""
    finished = {(row["method"], row["atlas"], row["case"]) for row in read_pairs(out)}
    workers: dict[str, Worker] = {}
    failures = []
    try:
        for number, (atlas, case) in enumerate(pairs, start=1):
            missing = [method for method in methods if (method, atlas, case) not in finished]
            if not missing:
                continue
            pair = _Pair.load(prepared, atlas, case)
            for method in missing:
                heading = f"[{number}/{len(pairs)}] {atlas} to {case}, {method}"
                try:
                    if method not in workers or not workers[method].alive:
                        workers[method] = Worker(method, options)
                    row = {"method": method, "atlas": atlas, "case": case, **pair.measure(workers[method])}
                except OneShotError as error:
                    log(f"{heading}: failed: {error}")
                    failures.append(f"{method} on {atlas} to {case}")
                    continue
                with writing(out / PAIRS), open(out / PAIRS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                dice = "nothing to score" if row["dice"] is None else f"Dice {row['dice']:.4f}"
                log(f"{heading}: {dice}, {row['seconds']:.1f} s, {row['peak_memory_mb']} MiB")
    finally:
        for worker in workers.values():
            worker.close()
    return failures


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A loaded atlas and case.

    Attributes:
        case: Image (C, U, V, W) and 3 voxel edges, mm.
        atlas: Image (C, X, Y, Z) and 3 voxel edges, mm.
        case_segmentation: (1, U, V, W).
        atlas_segmentation: (1, X, Y, Z).
        labels: Name to value or values of the labels and regions present in the atlas.
        ignore_label: Voxels of the case with this value are not scored.
    """

    case: tuple[np.ndarray, Sequence[float]]
    atlas: tuple[np.ndarray, Sequence[float]]
    case_segmentation: np.ndarray
    atlas_segmentation: np.ndarray
    labels: Mapping[str, Any]
    ignore_label: int | None

    @classmethod
    def load(cls, prepared: PreparedDataset, atlas: str, case: str) -> _Pair:
        # Methods do not read headers, so the atlas is reordered to the axes of the case.
        turned = prepared.axes(case).T @ prepared.axes(atlas)
        segmentation = in_common_order(prepared.segmentation(atlas), turned)
        return cls(
            case=(prepared.registration_image(case), prepared.spacing(case)),
            atlas=(
                np.ascontiguousarray(in_common_order(prepared.registration_image(atlas), turned)),
                edges_in_common_order(prepared.spacing(atlas), turned),
            ),
            case_segmentation=prepared.segmentation(case),
            atlas_segmentation=segmentation,
            labels={n: value for n, value in prepared.score_labels().items() if np.isin(segmentation, value).any()},
            ignore_label=prepared.label_manager.ignore_label,
        )

    def measure(self, worker: Worker) -> dict[str, Any]:
        """The content of one line of ``pairs.jsonl``: scores, folding, time and memory."""
        found = worker.measure(self.case, self.atlas, self.atlas_segmentation)
        places = torch.from_numpy(found.pop("places"))
        segmentation = torch.from_numpy(np.ascontiguousarray(self.atlas_segmentation, dtype=np.int16))
        scores = score_segmentation(
            sample_labels(segmentation, places)[0].numpy(),
            self.case_segmentation[0],
            labels=self.labels,
            spacing=self.case[1],
            ignore_label=self.ignore_label,
        )
        dice, hd95 = ({name: getattr(score, metric) for name, score in scores.items()} for metric in ("dice", "hd95"))
        return {
            "dice": _mean(dice.values()),
            "hd95": _mean(hd95.values()),
            "folding": folded_share(places),
            **found,
            "dice_per_label": {name: _number(value) for name, value in dice.items()},
            "hd95_per_label": {name: _number(value) for name, value in hd95.items()},
        }


def folded_share(places: torch.Tensor) -> float:
    """Share of a case's voxels at which the map to the atlas has a Jacobian determinant <= 0 (central differences).

    The map includes the affine part, whose determinant is positive, so the sign is that of the deformation.

    Args:
        places: (3, U, V, W), atlas voxel coordinates; evaluated in 2D if the first axis has one voxel.
    """
    if places.shape[1] == 1:
        places = places[1:, 0]
    return round(float(folding((places - identity_grid(places.shape[1:]))[None])), 8)


def available_methods(methods: Sequence[str], log: Callable[[str], None]) -> list[str]:
    """The methods in the order of `REGISTRATION_METHODS`; skips those with a missing package and logs a message.

    Raises:
        OneShotError: A method is unknown, or none is available.
    """
    known = ", ".join(REGISTRATION_METHODS)
    unknown = sorted(set(methods) - set(REGISTRATION_METHODS))
    if unknown:
        raise OneShotError(f"Methods {', '.join(unknown)} are not known: choose of {known}.")
    chosen = []
    for name in (name for name in REGISTRATION_METHODS if name in methods):
        try:
            REGISTRATION_METHODS[name].require()
        except OneShotError as error:
            log(f"Left out: {name}. {error}")
            continue
        chosen.append(name)
    if not chosen:
        raise OneShotError(f"No method is left to be measured: choose others of {known} with --methods.")
    return chosen


def choose_pairs(
    prepared: PreparedDataset,
    config: OneShotConfig,
    *,
    atlases: Sequence[str] | None = None,
    cases: int | None = None,
    fold: int = 0,
    log: Callable[[str], None] = print,
) -> list[tuple[str, str]]:
    """(atlas, case) of each registration.

    Args:
        prepared: The dataset.
        config: Settings; their seed is used to draw the cases.
        atlases: Labelled cases; None uses the program's choice for the fold. An atlas is not registered to itself.
        cases: Number of random labelled cases to which each atlas is registered; None uses the labelled validation
            cases of the fold.
        fold: Number of the fold.
        log: Called with each message.

    Raises:
        OneShotError: An atlas has no label, or there is no labelled case to score.
    """
    own = prepared.fold(fold)
    if atlases:
        check_labelled(atlases, prepared.identifiers, prepared.labelled, "given with --atlas")
    else:
        choice = resolve_atlases(prepared.base, config, own, prepared.image_in_common_order, kept=prepared.kept)
        log(f"Atlas: {', '.join(choice.atlases)} ({choice.how})")
        atlases = choice.atlases
    if cases is None:
        candidates, where = own.scored, f"fold {fold} of {prepared.name}"
    else:
        candidates = np.random.default_rng(config.seed).permutation(prepared.labelled).tolist()
        where = prepared.name
    pairs = [
        (atlas, case)
        for atlas in dict.fromkeys(atlases)
        for case in [case for case in candidates if case != atlas][: len(candidates) if cases is None else cases]
    ]
    if not pairs:
        raise OneShotError(
            f"There is no labelled case beside the atlas in {where} to score, or --cases is {cases}: choose another "
            f"fold with --fold, give --cases a number from 1, or add labels."
        )
    return pairs


def read_pairs(out: Path) -> list[dict[str, Any]]:
    """The lines of ``pairs.jsonl``; removes a last line that an interruption left incomplete.

    Raises:
        OneShotError: A line other than the last is damaged.
    """
    path = out / PAIRS
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines = lines[:-1]
        save_text_atomic("".join(lines), path)
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise OneShotError(
            f"{path} has a line that is not JSON ({error}): remove that line, and it is measured again."
        ) from error


def _mean(values: Iterable[float]) -> float | None:
    """Mean of the values that are not NaN, including zeros; None if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return round(float(np.mean(numbers)), 6) if numbers else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    failed = exit_status(load_modules)
    if failed:
        return failed
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("-d", required=True, metavar="DATASET", help="number or name of a preprocessed dataset")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="default: %(default)s")
    parser.add_argument("-p", default="nnUNetOneShotPlans", metavar="PLANS", help="default: %(default)s")
    parser.add_argument("--atlas", nargs="+", metavar="CASE", help="labelled cases (default: chosen by the program)")
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--cases", type=int, metavar="N", help="register to N labelled cases, drawn at random")
    targets.add_argument("--fold", type=int, default=0, help="register to its labelled validation cases (default: 0)")
    known = list(REGISTRATION_METHODS)
    parser.add_argument("--methods", nargs="+", default=known, metavar="METHOD", help=f"of {', '.join(known)}")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each method (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where our deformable stage runs (default: %(default)s)")
    parser.add_argument("-o", required=True, metavar="OUT", help="folder of the benchmark")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    return exit_status(lambda: _run(options, shlex.join(["python", "-m", _MODULE, *given])))


def _run(options: argparse.Namespace, command: str) -> None:
    if options.threads < 1:
        raise OneShotError(f"--threads is {options.threads}: give a number of threads from 1.")
    usable_device(options.device)
    prepared = PreparedDataset.open(dataset=options.d, plans_name=options.p, configuration=options.c)
    methods = available_methods(options.methods, print)
    pairs = choose_pairs(
        prepared,
        OneShotConfig.from_plans(prepared.plans),
        atlases=options.atlas,
        cases=options.cases,
        fold=options.fold,
    )
    benchmark_registration(
        prepared,
        options.o,
        pairs,
        methods=methods,
        threads=options.threads,
        device=options.device,
        command=command,
    )


if __name__ == "__main__":
    sys.exit(main())
