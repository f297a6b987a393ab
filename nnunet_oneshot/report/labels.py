"""Names and styles of the labels of a dataset, for legends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.report.drawing import style_of


@dataclass(frozen=True)
class Label:
    """A label value as a legend shows it.

    Attributes:
        value: In label maps.
        name: For people; of a value that several regions share, all of them.
        colour: Hexadecimal.
        dash: Pattern of its line, as SVG has it; empty for a solid one.
    """

    value: int
    name: str
    colour: str
    dash: str


def labels_of(prepared: PreparedDataset) -> list[Label]:
    """The foreground labels of a dataset by value."""
    names: dict[int, list[str]] = {}
    for name, values in prepared.score_labels().items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            names.setdefault(int(value), []).append(name)
    found = []
    for number, value in enumerate(sorted(names)):
        style = style_of(number)
        found.append(Label(value, ", ".join(names[value]), style.colour, style.dash))
    return found


def score_key(value: Any) -> str:
    """How nnU-Net's ``summary.json`` calls a label or a region."""
    return str(tuple(int(v) for v in value)) if isinstance(value, (list, tuple)) else str(int(value))


def score_names(prepared: PreparedDataset) -> Mapping[str, str]:
    """Name of everything that is scored -> its key in ``summary.json``."""
    return {name: score_key(value) for name, value in prepared.score_labels().items()}
