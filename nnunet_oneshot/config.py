"""The ``oneshot`` block of a plans file: every setting of this package, with its default, checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registry import CHOSEN_BY_SETTING
from nnunet_oneshot.strict_json import parse_json

OVERRIDES_VARIABLE = "nnUNet_oneshot_overrides"
BLOCK = "oneshot"

_LARGEST_WHOLE, _LARGEST_NUMBER = 10**9, 1e6
_LONGEST_LIST, _LONGEST_SHOWN = 16, 200
_FORM = "form"

T = TypeVar("T")


class Form(Protocol):
    """What a setting may be."""

    @property
    def expected(self) -> str:
        """What is allowed, in words."""

    def read(self, value: Any) -> Any:
        """The setting's value from its JSON.

        Raises:
            ValueError: The JSON is not of this form.
        """


@dataclass(frozen=True)
class Flag:
    """True or false."""

    expected = "true or false"

    def read(self, value: Any) -> bool:
        return _require(value, isinstance(value, bool))


@dataclass(frozen=True)
class Whole:
    """A whole number from ``low`` to ``high``."""

    low: int = 0
    high: int = _LARGEST_WHOLE

    @property
    def expected(self) -> str:
        return f"a whole number from {self.low} to {_bound(self.high)}"

    def read(self, value: Any) -> int:
        return _require(value, _is_whole(value) and self.low <= value <= self.high)


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``; those that are ``open`` do not belong to it."""

    low: float = 0
    high: float = _LARGEST_NUMBER
    open_low: bool = False
    open_high: bool = False

    @property
    def expected(self) -> str:
        low, high = _bound(self.low), _bound(self.high)
        if self.open_low:
            return f"a number above {low} and {'below' if self.open_high else 'up to'} {high}"
        return f"a number from {low} to {'below ' if self.open_high else ''}{high}"

    def read(self, value: Any) -> float:
        # Compared before it is converted: a whole number of JSON may be too large to be converted.
        inside = _is_number(value) and self.low <= value <= self.high
        edge = (self.open_low and value == self.low) or (self.open_high and value == self.high)
        return float(_require(value, inside and not edge))


@dataclass(frozen=True)
class Range:
    """Two numbers of a form, the second not below the first."""

    number: Number

    @property
    def expected(self) -> str:
        return f"a list of two numbers, the smaller first, each {self.number.expected.removeprefix('a number ')}"

    def read(self, value: Any) -> tuple[float, float]:
        low, high = map(self.number.read, _require(value, isinstance(value, list) and len(value) == 2))
        return _require((low, high), low <= high)


@dataclass(frozen=True)
class Wholes:
    """At least one whole number of a form."""

    whole: Whole

    @property
    def expected(self) -> str:
        each = self.whole.expected.removeprefix("a whole number ")
        return f"a list of 1 to {_LONGEST_LIST} whole numbers, each {each}"

    def read(self, value: Any) -> tuple[int, ...]:
        return tuple(map(self.whole.read, _require(value, isinstance(value, list) and 0 < len(value) <= _LONGEST_LIST)))


@dataclass(frozen=True)
class Rising:
    """Numbers of a form, each larger than the one before; there may be none."""

    number: Number

    @property
    def expected(self) -> str:
        return f"a list, empty or of rising numbers, each {self.number.expected.removeprefix('a number ')}"

    def read(self, value: Any) -> tuple[float, ...]:
        numbers = tuple(map(self.number.read, _require(value, isinstance(value, list))))
        return _require(numbers, list(numbers) == sorted(set(numbers)))


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(json.dumps(name) for name in self.names)}"

    def read(self, value: Any) -> str:
        return _require(value, isinstance(value, str) and value in self.names)


@dataclass(frozen=True)
class Registered:
    """One of the names in the registry of a setting; any where that registry's module is not loaded."""

    setting: str

    @property
    def expected(self) -> str:
        names = CHOSEN_BY_SETTING.get(self.setting)
        return "a registered name" if names is None else Choice(tuple(names)).expected

    def read(self, value: Any) -> str:
        names = CHOSEN_BY_SETTING.get(self.setting)
        return _require(value, _is_text(value) and (names is None or value in names))


@dataclass(frozen=True)
class Names:
    """Null, or names that are all different."""

    expected = "null or a list of names, each once"

    def read(self, value: Any) -> tuple[str, ...] | None:
        if value is None:
            return None
        _require(value, isinstance(value, list) and bool(value) and all(map(_is_text, value)))
        return tuple(_require(value, len(set(value)) == len(value)))


@dataclass(frozen=True)
class OptionalPath:
    """Null, or a path."""

    expected = "null or a path"

    def read(self, value: Any) -> str | None:
        return _require(value, value is None or _is_text(value))


@dataclass(frozen=True)
class Axes:
    """``"auto"``, or axes of a patch."""

    expected = '"auto" or a list of axes from 0 to 2, each once'

    def read(self, value: Any) -> str | tuple[int, ...]:
        if value == "auto":
            return value
        axes = tuple(map(Whole(0, 2).read, _require(value, isinstance(value, list))))
        return _require(axes, len(set(axes)) == len(axes))


@dataclass(frozen=True)
class Version:
    """The version of the layout that this release reads."""

    version: int

    @property
    def expected(self) -> str:
        return f"{self.version}, the layout that this release reads"

    def read(self, value: Any) -> int:
        return _require(value, _is_whole(value) and value == self.version)


_SHARE = Number(0, 1)
_SHARE_RANGE = Range(_SHARE)
_STEP_SIZE = Number(open_low=True)
# Voxels; the time of smoothing grows with it.
_SMOOTHING = Number(0, 1000)


def setting(default: T, form: Form) -> T:
    """A field of a block: its default, and what else it may be."""
    return field(default=default, metadata={_FORM: form})


def form_of(spec: dataclasses.Field) -> Form:
    """What a field that was declared with `setting` may be."""
    return spec.metadata[_FORM]


def _bound(value: float) -> str:
    return {_LARGEST_WHOLE: "10^9", _LARGEST_NUMBER: "10^6"}.get(value, f"{value:.10g}")


def _require(value: T, fits: bool) -> T:
    if not fits:
        raise ValueError
    return value


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value


@dataclass(frozen=True)
class RegistrationConfig:
    """How the atlas is registered to every unlabelled case.

    Attributes:
        method: ``"refine"`` (each pair optimised on its own), ``"network"`` (one network trained on all pairs) or
            ``"network+refine"`` (the network's velocity field is the start of each pair's optimisation).
        affine: Whether an affine registration comes first.
        max_voxels: Largest number of voxels of the grid on which images are compared; larger atlases are downsampled.
        similarity: What is maximised, one of the registered similarities; for images of different contrast ``"mind"``
            or ``"nmi"``, with which the affine stage maximises mutual information instead of correlation.
        lncc_kernel: Edge of the LNCC window, voxels of the registration grid.
        smoothness: Weight of the diffusion energy of the velocity field, taken in physical units, at full resolution; a
            level that is n times coarser has an n-th of an n-th of it.
        velocity_downsample: The velocity grid is this many times coarser than the registration grid.
        integration_steps: Scaling-and-squaring steps.
        refine_iterations: Adam steps of the per-pair optimisation at each resolution level, coarse to fine.
        refine_learning_rate: Adam step size, voxels of the registration grid.
        search_reach: Largest displacement along an axis that is searched for before the per-pair optimisation, as a
            share of the edge of the field of view; 0 leaves the search out. A pair goes on from there only where that
            has the lower loss after a few steps.
        network_iterations: Training steps of the registration network.
        network_batch_size: Pairs a step; the contrastive term needs at least 2.
        network_learning_rate: Adam step size of the network.
        contrastive: Weight of the contrastive term (NT-Xent) of the network.
        temperature: Temperature of the contrastive term.
        guide: Folder of a trained model whose segmentations of the cases guide their registration, or None: images
            alone decide.
        guide_weight: Weight of the guide's term, the mean over labels of 1 - soft Dice. The rounds of
            `OneShotDistillTrainer` have their own.
    """

    method: str = setting("refine", Choice(("refine", "network", "network+refine")))
    affine: bool = setting(True, Flag())
    max_voxels: int = setting(2_097_152, Whole(512))
    similarity: str = setting("lncc", Registered("similarity"))
    lncc_kernel: int = setting(5, Whole(3))
    smoothness: float = setting(0.2, Number())
    velocity_downsample: int = setting(2, Whole(1))
    integration_steps: int = setting(5, Whole(0, 30))
    refine_iterations: tuple[int, ...] = setting((20, 25, 12), Wholes(Whole()))
    refine_learning_rate: float = setting(0.5, _STEP_SIZE)
    search_reach: float = setting(0.2, _SHARE)
    network_iterations: int = setting(1000, Whole(1))
    network_batch_size: int = setting(2, Whole(1))
    network_learning_rate: float = setting(1e-3, _STEP_SIZE)
    contrastive: float = setting(0.01, Number())
    temperature: float = setting(0.1, Number(open_low=True))
    guide: str | None = setting(None, OptionalPath())
    guide_weight: float = setting(0.3, Number())


@dataclass(frozen=True)
class SynthesisConfig:
    """How labelled patches are drawn from the atlas.

    Attributes:
        p_scale: Probability of scaling a registration's velocity field.
        scale_range: Range of that factor.
        p_mix: Probability of mixing in the velocity field of a second case.
        mix_range: Range of the second field's share.
        p_random: Probability of adding a smooth random velocity field.
        random_magnitude: Largest standard deviation of the random field, atlas voxels.
        random_smoothness: Smoothing of the random field, atlas voxels.
        p_appearance: Probability of transferring the appearance of an unlabelled image.
        appearance_strength: Range of the share that is transferred.
        appearance_smoothness: Smoothing of the local appearance difference, voxels.
    """

    p_scale: float = setting(0.3, _SHARE)
    scale_range: tuple[float, float] = setting((0.6, 1.4), Range(Number(0, 100)))
    p_mix: float = setting(0.3, _SHARE)
    mix_range: tuple[float, float] = setting((0.0, 1.0), _SHARE_RANGE)
    p_random: float = setting(0.5, _SHARE)
    random_magnitude: float = setting(2.0, Number())
    random_smoothness: float = setting(6.0, _SMOOTHING)
    p_appearance: float = setting(0.5, _SHARE)
    appearance_strength: tuple[float, float] = setting((0.0, 1.0), _SHARE_RANGE)
    appearance_smoothness: float = setting(5.0, _SMOOTHING)


@dataclass(frozen=True)
class DistillationConfig:
    """Losses of teacher and student (arXiv 2408.03616).

    Attributes:
        hint: How the features are compared, one of the registered hints; ``"none"`` trains no teacher.
        hint_weight: Weight of the hint (the paper's lambda_hint).
        hint_interval: The teacher and the hint take part in one of so many iterations.
        reconstruction_weight: Weight of the teacher's reconstruction (the paper's lambda_recon).
        levels: Number of decoder levels compared, counted from full resolution.
        detach: Whose features the hint takes as given: ``"teacher"`` (it moves the student and the projections),
            ``"student"`` (it moves the teacher and the projections) or ``"none"`` (it moves all).
        teacher_first: Length of a training of the teacher alone, before that of the student, as a share (0 to 1) of the
            student's; the teacher then stays as it is. 0 trains both together.
        warmup_epochs: Share (0 to 1) of the epochs over which the hint's weight rises linearly from 0; the projections
            already learn during it.
        teacher_learning_rate: Initial learning rate of the teacher and of the projections (AdamW).
        corruption: Share of the real patch that is masked before the teacher sees it, so that it cannot copy its input.
        corruption_block: Edge of a masked block, voxels.
        real_share: Share of the student's patches that are real ones, with propagated and corrected labels, rather
            than synthetic; 0 has synthetic ones alone, as the paper does.
        posterior_strength: How far the intensities of the real patch correct its propagated labels; 0 leaves them as
            they are.
        posterior_blur: Standard deviation by which a propagated label is blurred before that, voxels: how far it may
            be wrong; a thin label is blurred less.
        rounds: Shares (between 0 and 1) of the epochs after which the averaged student segments unlabelled images and
            guides a new registration of the atlas to them, which replaces the first where images stay about as alike.
            Until then real patches have the labels of the first registration.
        round_cases: Number of cases that a round segments and registers again; the real patches are theirs from then
            on.
        guide_weight: Weight of the averaged student's segmentations in the registrations of a round; that of each label
            is multiplied by its Dice on held-out synthetic patches.
        average_decay: Share of the averaged student that remains at each step.
    """

    hint: str = setting("voxel", Registered("hint"))
    hint_weight: float = setting(0.1, Number())
    hint_interval: int = setting(10, Whole(1))
    reconstruction_weight: float = setting(1.0, Number())
    levels: int = setting(2, Whole(1))
    detach: str = setting("teacher", Choice(("teacher", "student", "none")))
    teacher_first: float = setting(0.0, _SHARE)
    warmup_epochs: float = setting(0.2, _SHARE)
    teacher_learning_rate: float = setting(1e-3, _STEP_SIZE)
    corruption: float = setting(0.0, _SHARE)
    corruption_block: int = setting(8, Whole(1))
    real_share: float = setting(0.5, _SHARE)
    posterior_strength: float = setting(0.6, Number())
    posterior_blur: float = setting(1.0, Number(0, 100))
    rounds: tuple[float, ...] = setting((0.3, 0.6), Rising(Number(0, 1, open_low=True, open_high=True)))
    round_cases: int = setting(24, Whole(1))
    guide_weight: float = setting(2.0, Number())
    average_decay: float = setting(0.99, Number(0, 1, open_high=True))


@dataclass(frozen=True)
class OneShotConfig:
    """All settings of a run; ``plans["oneshot"]`` is this dataclass as JSON.

    Attributes:
        version: Version of the block's layout.
        atlases: Labelled cases to warp, or None: ``oneshot_atlas.json`` beside ``splits_final.json`` decides.
        seed: Seed of synthesis, network initialisation and registration.
        initial_lr: Learning rate with which a student on warped atlases or real images starts (AdamW). The CPU preset
            has 0.003: its networks have a quarter to half of nnU-Net's features and are trained for few iterations.
        logit_adjustment: How far cross-entropy takes labels for equally frequent in the first epoch of a training with
            AdamW, so that small structures are found early: the logarithm of each label's share of the atlas is added
            to its logit, times this and a factor that falls from 1 to 0 over the epochs. 0 leaves nnU-Net's loss as it
            is.
        precision: Of the convolutions in trainings: ``"auto"`` (bfloat16 on a processor that computes it in hardware,
            nnU-Net's mixed precision on CUDA, float32 elsewhere) or ``"float32"`` (no bfloat16 on a processor).
        mirror_axes: ``"auto"`` (mirroring is left out on every axis on which it would exchange labels of the atlas, or
            on which no unlabelled training image looks mirrored) or a list of patch axes that may be mirrored, in
            training and at test time.
        progress_cases: Number of held-out cases on whose synthetic pairs progress is watched.
        unlabelled_fraction: Share of the unlabelled training cases that is used.
        registration: See `RegistrationConfig`.
        synthesis: See `SynthesisConfig`.
        distillation: See `DistillationConfig`.
    """

    version: int = setting(1, Version(1))
    atlases: tuple[str, ...] | None = setting(None, Names())
    seed: int = setting(12345, Whole(0, 2**32 - 1))
    initial_lr: float = setting(1e-3, _STEP_SIZE)
    logit_adjustment: float = setting(1.0, _SHARE)
    precision: str = setting("auto", Choice(("auto", "float32")))
    mirror_axes: str | tuple[int, ...] = setting("auto", Axes())
    progress_cases: int = setting(8, Whole())
    unlabelled_fraction: float = setting(1.0, _SHARE)
    registration: RegistrationConfig = field(default_factory=RegistrationConfig)
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    @classmethod
    def from_plans(cls, plans: dict[str, Any]) -> OneShotConfig:
        """Reads and checks the block of a plans file, with the overrides of the environment merged in.

        Args:
            plans: A plans dictionary; without an ``oneshot`` block the defaults hold.

        Raises:
            OneShotError: A name, type or value in the block is not one this version knows.
        """
        if not isinstance(plans, Mapping):
            raise OneShotError(f"The plans hold {_shown(plans)}, not a JSON object: plan the dataset again.")
        block = plans.get(BLOCK, {})
        where = f'the "{BLOCK}" block of plans {_shown(plans.get("plans_name", ""))}'
        overrides = environment_overrides()
        if overrides and isinstance(block, Mapping):
            block = merge_settings(block, overrides)
            where += f" with {OVERRIDES_VARIABLE} merged in"
        return _build(cls, block, where)

    def to_dict(self) -> dict[str, Any]:
        """The block as plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def with_guide(config: OneShotConfig, guide: str | os.PathLike | None) -> OneShotConfig:
    """The settings with another guide; None leaves them as they are."""
    if guide is None:
        return config
    registration = dataclasses.replace(config.registration, guide=os.path.abspath(guide))
    return dataclasses.replace(config, registration=registration)


def environment_overrides() -> dict[str, Any]:
    """The settings that the environment variable lays over every plans file, not yet checked; empty without it.

    Raises:
        OneShotError: The variable holds something else than a JSON object.
    """
    text = os.environ.get(OVERRIDES_VARIABLE)
    if not text:
        return {}
    advice = f'set {OVERRIDES_VARIABLE} to a JSON object such as {{"seed": 1}}, or unset it.'
    try:
        overrides = parse_json(text)
    except ValueError as error:
        raise OneShotError(
            f"The environment variable {OVERRIDES_VARIABLE} is not valid JSON ({error}): {advice}"
        ) from error
    if not isinstance(overrides, dict):
        raise OneShotError(
            f"The environment variable {OVERRIDES_VARIABLE} holds {_shown(overrides)}, not a JSON object: {advice}"
        )
    return overrides


def merge_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``first`` with ``second`` laid over it, nested objects merged.

    Raises:
        OneShotError: Both are nested more deeply than any settings are.
    """
    try:
        return _merged(first, second)
    except RecursionError as error:
        raise OneShotError(
            f'Settings of the "{BLOCK}" block are nested too deeply: expected objects of settings, such as '
            f'{{"distillation": {{"levels": 1}}}}. Correct them where they are given.'
        ) from error


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def settings_in_force(config: OneShotConfig) -> dict[str, Any]:
    """All settings with which a run works, as plain JSON types, to be stored with its results; see `differences`."""
    return config.to_dict()


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two results of `settings_in_force`.

    Args:
        stored: Settings of an earlier run, as read from its file. It may be of another release.
        now: The present ones.

    Returns:
        For each setting that differs, in the order of ``now``, a clause such as
        ``"distillation.hint was 'voxel', is 'none'"``.
    """
    before, after = dict(_leaves(stored)), dict(_leaves(now))
    changed = []
    for name in [*after, *(name for name in before if name not in after)]:
        if name not in before:
            changed.append(f"{name} was not a setting, is {_shown(after[name])}")
        elif name not in after:
            changed.append(f"{name} was {_shown(before[name])}, is no setting any more")
        elif before[name] != after[name]:
            changed.append(f"{name} was {_shown(before[name])}, is {_shown(after[name])}")
    return changed


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _build(cls: type, block: Any, where: str) -> Any:
    """Builds a config dataclass from JSON, checking names, types and values."""
    if not isinstance(block, Mapping):
        raise OneShotError(f"{_sentence(where)} holds {_shown(block)}: expected an object, {{...}}. {_REMEDY}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(str(name) for name in block if name not in fields)
    if unknown:
        raise OneShotError(
            f"{_sentence(where)} has unknown settings {_shown(unknown)}: known are {sorted(fields)}. Remove or rename "
            f"them where they are set, in the plans file or in {OVERRIDES_VARIABLE}."
        )
    built = cls(**{name: _read(fields[name], value, where) for name, value in block.items()})
    for conflict in _CONFLICTS.get(cls, ()):
        if conflict.found(built):
            raise OneShotError(f"{_sentence(where)} has {conflict.sentence.format(built)}")
    return built


def _read(spec: dataclasses.Field, value: Any, where: str) -> Any:
    """One setting or nested block, converted from JSON."""
    name = f'"{spec.name}" in {where}'
    nested: Any = spec.default_factory
    if nested is not dataclasses.MISSING:
        return _build(nested, value, name)
    form = form_of(spec)
    try:
        return form.read(value)
    except ValueError:
        raise OneShotError(f"{name} is {_shown(value)}: expected {form.expected}. {_REMEDY}") from None


def _shown(value: Any) -> str:
    """A value for an error, cut short."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


_REMEDY = f"Correct it where it is set, in the plans file or in {OVERRIDES_VARIABLE}."


class _Conflict(NamedTuple):
    """Settings of a block that exclude each other.

    Attributes:
        found: Whether a block has them.
        sentence: Completes "The block has ...".
    """

    found: Callable[[Any], bool]
    sentence: str


_CONFLICTS: dict[type, tuple[_Conflict, ...]] = {
    RegistrationConfig: (
        _Conflict(
            lambda block: block.network_batch_size < 2 and block.contrastive > 0,
            '"network_batch_size" {0.network_batch_size} and "contrastive" {0.contrastive}, a term that compares the '
            'cases of a batch: set "network_batch_size" to 2 or more, or "contrastive" to 0.',
        ),
    ),
    DistillationConfig: (
        _Conflict(
            lambda block: block.teacher_first > 0 and block.detach != "teacher",
            '"teacher_first" {0.teacher_first}, after which the teacher stays as it is, and "detach" {0.detach!r}, '
            'with which the hint moves it: set "teacher_first" to 0 or "detach" to "teacher".',
        ),
    ),
}
