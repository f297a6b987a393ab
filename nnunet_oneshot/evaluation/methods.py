"""The methods a benchmark compares, and variants of them with other settings.

A variant is written ``METHOD:key=value,key.sub=value``, such as ``distill:distillation.hint=none``: the method run with
these settings of the plans' ``oneshot`` block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_oneshot.errors import OneShotError


@dataclass(frozen=True)
class Method:
    """One column of the comparison.

    Attributes:
        name: As the user wrote it; the name in every table.
        base: One of `METHODS`.
        overrides: Settings of the ``oneshot`` block that differ from the plans.
    """

    name: str
    base: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> str | None:
        """The trainer's name without its length, or None for label propagation."""
        return _TRAINERS.get(self.base)

    @property
    def propagation(self) -> str | None:
        """The method of ``nnunet_oneshot propagate``, or None for a training."""
        return self.base if self.base in _PROPAGATED else None

    @property
    def uses_atlas(self) -> bool:
        return self.base != CEILING

    @property
    def folder(self) -> str:
        """Its name as a folder."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.name)


FLOOR, CEILING = "nnunet-atlas", "nnunet-full"
_PROPAGATED = ("affine", "registration", "corrected", "syn")
_TRAINERS = {
    FLOOR: "OneShotAtlasTrainer",
    "propagation": "OneShotPropagationTrainer",
    "synthesis": "OneShotSynthesisTrainer",
    "distill": "OneShotDistillTrainer",
    CEILING: "nnUNetTrainer",
}
METHODS = (*_PROPAGATED, *_TRAINERS)
_STOCK_LENGTHS = (1, 5, 10, 20, 50, 100, 250, 500, 750, 1000, 2000, 4000, 8000)


def parse_method(text: str) -> Method:
    """Reads ``METHOD`` or ``METHOD:key=value,...``.

    Raises:
        OneShotError: The method is not known or a setting has no value.
    """
    base, _, settings = text.partition(":")
    if base not in METHODS:
        raise OneShotError(f"Method {base!r} is not known: choose among {', '.join(METHODS)}.")
    return Method(text, base, parse_settings(_split_settings(settings)))


def _split_settings(settings: str) -> list[str]:
    """Splits at the commas before a ``key=``, so that values may hold commas."""
    return [part for part in re.split(r",(?=[A-Za-z_][\w.]*=)", settings) if part]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turns ``["distillation.hint=none", "seed=3"]`` into ``{"distillation": {"hint": "none"}, "seed": 3}``.

    A value is read as JSON, and as text where it is not JSON.

    Raises:
        OneShotError: A setting has no ``=``.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise OneShotError(f"The setting {setting!r} has no value: write key=value, as in distillation.hint=none.")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        result = merge_settings(result, parsed)
    return result


def merge_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``first`` with ``second`` laid over it, nested objects merged."""
    merged = dict(first)
    for key, value in second.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_settings(merged[key], value) if nested else value
    return merged


def trainer_name(method: Method, epochs: int | None) -> str:
    """The class ``nnUNetv2_train`` is given: the method's trainer in the variant of this length.

    Args:
        method: A method that trains.
        epochs: Of 250 iterations each, or None: the trainer's own length.

    Raises:
        OneShotError: There is no variant of this length.
    """
    stem = str(method.trainer)
    if method.base == CEILING:
        lengths = {n: f"{stem}_{_length(n)}" for n in _STOCK_LENGTHS} | {1000: stem}
    else:
        import nnunet_oneshot.trainers as trainers

        found = {re.fullmatch(rf"{stem}_(\d+)epochs?", name) for name in trainers.__all__}
        lengths = {int(match[1]): match[0] for match in found if match} | {1000: stem}
    if epochs is None:
        return stem
    if epochs not in lengths:
        raise OneShotError(
            f"{stem} has no variant of {epochs} epochs: give --epochs one of {sorted(lengths)}, or leave method "
            f"{method.name} out."
        )
    return lengths[epochs]


def _length(epochs: int) -> str:
    return "1epoch" if epochs == 1 else f"{epochs}epochs"
