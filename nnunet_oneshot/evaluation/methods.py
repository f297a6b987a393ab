"""The methods a benchmark compares, each one registered entry, and variants of them with other settings.

A variant runs a method with other settings of the plans' ``oneshot`` block. It is written ``METHOD:ABLATION``, with an
entry of `nnunet_oneshot.evaluation.ablations`, or ``METHOD:key=value,key.sub=value``, such as
``distill:distillation.hint=none``. Both can be mixed, separated by commas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_oneshot.config import merge_settings
from nnunet_oneshot.errors import OneShotError, shown
from nnunet_oneshot.evaluation.ablations import ABLATIONS
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS
from nnunet_oneshot.registry import Registry
from nnunet_oneshot.schedules import DEFAULT_EPOCHS, SHORTER, variant
from nnunet_oneshot.strict_json import parse_json


@dataclass(frozen=True)
class Baseline:
    """An entry of `BASELINES`: a training, or label propagation.

    Attributes:
        meaning: What it does.
        trainer: The trainer's name without its length, or None for label propagation.
        propagation: The method of ``nnunet_oneshot propagate``, or None for a training.
        uses_atlas: Whether it depends on the atlas.
        compared: Whether it is run where no methods are named.
        lengths: Epochs in which the trainer comes.
    """

    meaning: str
    trainer: str | None = None
    propagation: str | None = None
    uses_atlas: bool = True
    compared: bool = True
    lengths: Sequence[int] = (*SHORTER, DEFAULT_EPOCHS)


class _Baselines(Registry[Baseline]):
    """What is added here, and label propagation by every registered peer, also by those that are registered later."""

    @property
    def _entries(self) -> Mapping[str, Baseline]:
        """Label propagation by our own methods, then by peers, then the trainings.

        Raises:
            ValueError: A peer has the name of something else.
        """
        peers = {
            name: Baseline(f"Label propagation by a peer. {peer.meaning}", propagation=name, compared=peer.compared)
            for name, peer in REGISTRATION_METHODS.items()
            if not peer.own
        }
        taken = sorted(peers.keys() & self._added.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} is a {self.what} already: register the peer by another name.")
        return dict(sorted({**self._added, **peers}.items(), key=lambda item: item[1].propagation is None))


FLOOR, CEILING = "nnunet-atlas", "nnunet-full"
# The same two with the optimiser and mirroring of our trainers: fairer ends of the gap, where they were run.
FAIR_FLOOR, FAIR_CEILING = "supervised-atlas", "supervised"
BASELINES: Registry[Baseline] = _Baselines("method")


def _propagated(name: str, meaning: str) -> None:
    BASELINES.add(name, Baseline(meaning, propagation=name))


_propagated("affine", "Label propagation by the affine stage of our registration.")
_propagated("registration", "Label propagation by our registration.")
_propagated("corrected", "The same, labels corrected by each image's intensities.")
BASELINES.add(FLOOR, Baseline("nnU-Net on the atlas alone.", trainer="OneShotAtlasTrainer"))
BASELINES.add(
    FAIR_FLOOR,
    Baseline("The same with the optimiser and mirroring of our trainers.", trainer="OneShotSupervisedAtlasTrainer"),
)
BASELINES.add(
    "propagation",
    Baseline(
        "A network on real images with the labels that registration carries.", trainer="OneShotPropagationTrainer"
    ),
)
BASELINES.add("synthesis", Baseline("A network on warped atlases alone.", trainer="OneShotSynthesisTrainer"))
BASELINES.add("distill", Baseline("The full method.", trainer="OneShotDistillTrainer"))
BASELINES.add(
    FAIR_CEILING,
    Baseline(
        "A ceiling: all labels of the training cases, with the optimiser and mirroring of our trainers.",
        trainer="OneShotSupervisedTrainer",
        uses_atlas=False,
    ),
)
BASELINES.add(
    CEILING,
    Baseline(
        "Stock nnU-Net on all labels of the training cases.",
        trainer="nnUNetTrainer",
        uses_atlas=False,
        lengths=(1, 5, 10, 20, 50, 100, 250, 500, 750, 1000, 2000, 4000, 8000),
    ),
)


@dataclass(frozen=True)
class Method:
    """One column of the comparison.

    Attributes:
        name: As the user wrote it; the name in every table.
        base: A name of `BASELINES`.
        overrides: Settings of the ``oneshot`` block that differ from the plans.
    """

    name: str
    base: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> str | None:
        """See `Baseline`."""
        return BASELINES[self.base].trainer

    @property
    def propagation(self) -> str | None:
        """See `Baseline`."""
        return BASELINES[self.base].propagation

    @property
    def uses_atlas(self) -> bool:
        """See `Baseline`."""
        return BASELINES[self.base].uses_atlas

    @property
    def place(self) -> int:
        """Its place among the methods, in the order of `BASELINES`."""
        return list(BASELINES).index(self.base)

    @property
    def folder(self) -> str:
        """Its name as a folder."""
        return re.sub(r"[^A-Za-z0-9_.=-]+", "_", self.name)


def default_methods() -> list[str]:
    """The methods that are compared where none are named."""
    return [name for name, baseline in BASELINES.items() if baseline.compared]


def parse_method(text: str) -> Method:
    """Reads ``METHOD``, ``METHOD:ABLATION`` or ``METHOD:key=value,...``.

    Raises:
        OneShotError: The method or ablation is not known, or a setting has no value.
    """
    base, _, variants = text.partition(":")
    if base not in BASELINES:
        raise OneShotError(f"Method {base!r} is not known: choose among {', '.join(BASELINES)}.")
    overrides: dict[str, Any] = {}
    for part in _split_settings(variants):
        settings = parse_settings([part]) if "=" in part else ABLATIONS[part].settings
        overrides = merge_settings(overrides, settings)
    return Method(text, base, overrides)


def _split_settings(settings: str) -> list[str]:
    """Splits at the commas before a ``key=`` or an ablation's name, so that values may hold commas."""
    names = "|".join(map(re.escape, ABLATIONS))
    parts = re.split(rf",(?=[A-Za-z_][\w.]*=|(?:{names})(?:,|$))", settings)
    # What is no setting is names alone, known or not.
    return [name for part in parts for name in ([part] if "=" in part else part.split(",")) if name]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turns ``["distillation.hint=none", "seed=3"]`` into ``{"distillation": {"hint": "none"}, "seed": 3}``.

    A value is read as JSON, and as text where it is not JSON.

    Raises:
        OneShotError: A setting has no ``=``, or a value is nested too deeply, too long or has an entry twice.
    """
    result: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise OneShotError(f"The setting {setting!r} has no value: write key=value, as in distillation.hint=none.")
        try:
            parsed = parse_json(value)
        except json.JSONDecodeError:
            parsed = value
        except ValueError as error:
            raise OneShotError(f"The setting {shown(key)} has an unreadable value ({error}): correct it.") from error
        for part in reversed(key.split(".")):
            parsed = {part: parsed}
        result = merge_settings(result, parsed)
    return result


def trainer_name(method: Method, epochs: int | None) -> str:
    """The class ``nnUNetv2_train`` is given: the method's trainer in the variant of this length.

    Args:
        method: A method that trains.
        epochs: Of 250 iterations each, or None: the trainer's own length.

    Raises:
        OneShotError: There is no variant of this length.
    """
    stem = str(method.trainer)
    lengths = BASELINES[method.base].lengths
    if epochs is None:
        return stem
    if epochs not in lengths:
        raise OneShotError(
            f"{stem} has no variant of {epochs} epochs: give --epochs one of {sorted(lengths)}, or leave method "
            f"{method.name} out."
        )
    return variant(stem, epochs)
