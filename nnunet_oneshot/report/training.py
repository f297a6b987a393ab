"""What a training left behind: curves from nnU-Net's logger in the checkpoint, the rest from its log files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.report.drawing import Chart

_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
_SETTINGS = "oneshot_settings.json"
_ADVICE = "Train again, or resume with --c, to have the curves."
_EPOCH = re.compile(r": Epoch (\d+)\s*$")
_HINT = re.compile(r"hint (\S+) \(weight (\S+)\), reconstruction (\S+)")
_TRUST = re.compile(r"as a guide: (\[[^]]*\]).*? (\d+) of (\d+) registrations that it guided are kept")


@dataclass(frozen=True)
class Round:
    """A round of registrations that the student guided.

    Attributes:
        epoch: The epoch that it precedes.
        trust: Weight of each label, in nnU-Net's order.
        kept: How many registrations were kept, and of how many.
    """

    epoch: int
    trust: tuple[float, ...]
    kept: tuple[int, int]


@dataclass(frozen=True)
class Training:
    """A training as its folder shows it.

    Attributes:
        folder: ``fold_F`` of nnU-Net's results.
        checkpoint: The file that was read, or None.
        logged: nnU-Net's logger: name -> values, one an epoch.
        terms: Hint, its weight and reconstruction -> values, one an epoch, from the log files.
        rounds: From the log files.
        settings: Content of ``oneshot_settings.json``; empty without one.
        problems: What could not be read, sentences.
    """

    folder: Path
    checkpoint: str | None = None
    logged: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    terms: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    rounds: Sequence[Round] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()

    @property
    def epochs(self) -> int:
        """Finished epochs."""
        return len(self.logged.get("train_losses", ()))

    @property
    def is_finished(self) -> bool:
        """Whether nnU-Net wrote its final checkpoint."""
        return self.checkpoint == _CHECKPOINTS[0]

    @property
    def seconds(self) -> float:
        """Time of all finished epochs."""
        starts, ends = (self.logged.get(f"epoch_{name}_timestamps", ()) for name in ("start", "end"))
        # An epoch that was interrupted has no end.
        return float(sum(end - start for start, end in zip(starts, ends, strict=False)))


def read_training(folder: Path) -> Training | None:
    """A training's folder, or None where there is none with a checkpoint or a log."""
    if not folder.is_dir():
        return None
    logs = sorted(folder.glob("training_log_*.txt"), key=lambda path: _numbers(path.name))
    name = next((name for name in _CHECKPOINTS if (folder / name).is_file()), None)
    if name is None and not logs:
        return None
    problems: list[str] = []
    logged: Mapping[str, Sequence[Any]] = {}
    if name is not None:
        try:
            with loading_checkpoint(folder / name, advice=_ADVICE):
                logged = load_data(folder / name).get("logging", {})
        except OneShotError as error:
            problems.append(str(error))
    settings: Any = {}
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        problems.append(f"The training's {_SETTINGS} is missing or damaged: its settings and versions are left out.")
    terms, rounds = _read_logs([path.read_text(encoding="utf-8", errors="replace") for path in logs])
    return Training(folder, name, logged, terms, rounds, settings if isinstance(settings, dict) else {}, problems)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _read_logs(texts: Sequence[str]) -> tuple[dict[str, list[float | None]], list[Round]]:
    """Loss terms and rounds; a later file of a training that was resumed replaces the epochs of an earlier one."""
    terms: dict[int, tuple[float, ...]] = {}
    rounds: dict[int, Round] = {}
    for text in texts:
        epoch, asked = 0, None
        for line in text.splitlines():
            if found := _EPOCH.search(line):
                epoch = int(found[1])
                if asked is not None:
                    rounds[epoch] = Round(epoch, *asked)
                asked = None
            elif found := _HINT.search(line):
                terms[epoch] = tuple(map(_number, found.groups()))
            elif found := _TRUST.search(line):
                # Before the epoch that it is for.
                trust = tuple(map(_number, found[1].strip("[]").split(",")))
                asked = trust, (int(found[2]), int(found[3]))
    names = ("hint", "hint weight", "reconstruction")
    epochs = range(max(terms) + 1) if terms else range(0)
    series = {name: [terms[e][k] if e in terms else None for e in epochs] for k, name in enumerate(names)}
    return series, [rounds[epoch] for epoch in sorted(rounds)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def charts_of(training: Training, label_names: Sequence[str]) -> list[Chart]:
    """The charts for which there are values.

    Args:
        training: The training.
        label_names: Of the labels or regions, in nnU-Net's order.
    """
    marks = {r.epoch: f"round {number}" for number, r in enumerate(training.rounds, 1)}
    logged, terms = training.logged, training.terms
    per_label = logged.get("dice_per_class_or_region", ())
    labels = {
        name: [_at(values, place) for values in per_label] for place, name in enumerate(label_names) if len(per_label)
    }
    lines: list[tuple[str, Mapping[str, Sequence[float | None]], str]] = [
        (
            "Segmentation loss",
            {"training": _floats(logged, "train_losses"), "progress": _floats(logged, "val_losses")},
            "nnU-Net's Dice and cross-entropy loss; lower is better, and -1 is a perfect Dice.",
        ),
        (
            "Hint and reconstruction",
            {name: terms.get(name, ()) for name in ("hint", "reconstruction")},
            "The teacher's terms: how far the student's features lie from the teacher's, and how well the teacher "
            "reconstructs the real patch. Lower is better.",
        ),
        ("Weight of the hint", {"weight": terms.get("hint weight", ())}, "It grows during the warm-up."),
        (
            "Pseudo Dice",
            {"mean": _floats(logged, "mean_fg_dice"), "moving average": _floats(logged, "ema_fg_dice")},
            "On synthetic patches of progress cases, without any of their labels: it tells whether the student learns, "
            "not how good it is on real images.",
        ),
        ("Pseudo Dice of each label", labels, ""),
        ("Learning rate", {"learning rate": _floats(logged, "lrs")}, ""),
    ]
    charts = []
    for title, series, about in lines:
        known = {name: values for name, values in series.items() if len(values)}
        if known:
            charts.append(Chart(title, known, marks, about))
    return charts


def _floats(logged: Mapping[str, Sequence[Any]], name: str) -> list[float | None]:
    return [float(value) for value in logged.get(name, ())]


def _at(values: Any, place: int) -> float | None:
    return float(values[place]) if len(values) > place else None
