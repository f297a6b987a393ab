"""The ``oneshot`` block of a plans file: every setting of this package, with its default, checked when it is read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registry import CHOSEN_BY_SETTING

OVERRIDES_VARIABLE = "nnUNet_oneshot_overrides"
BLOCK = "oneshot"


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

    method: str = "refine"
    affine: bool = True
    max_voxels: int = 2_097_152
    similarity: str = "lncc"
    lncc_kernel: int = 5
    smoothness: float = 0.2
    velocity_downsample: int = 2
    integration_steps: int = 5
    refine_iterations: tuple[int, ...] = (20, 25, 12)
    refine_learning_rate: float = 0.5
    search_reach: float = 0.2
    network_iterations: int = 1000
    network_batch_size: int = 2
    network_learning_rate: float = 1e-3
    contrastive: float = 0.01
    temperature: float = 0.1
    guide: str | None = None
    guide_weight: float = 0.3


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

    p_scale: float = 0.3
    scale_range: tuple[float, float] = (0.6, 1.4)
    p_mix: float = 0.3
    mix_range: tuple[float, float] = (0.0, 1.0)
    p_random: float = 0.5
    random_magnitude: float = 2.0
    random_smoothness: float = 6.0
    p_appearance: float = 0.5
    appearance_strength: tuple[float, float] = (0.0, 1.0)
    appearance_smoothness: float = 5.0


@dataclass(frozen=True)
class DistillationConfig:
    """Losses of teacher and student (arXiv 2408.03616).

    Attributes:
        hint: How the features are compared, one of the registered hints; ``"none"`` trains no teacher.
        hint_weight: Weight of the hint (the paper's lambda_hint).
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
            than synthetic; 0 has synthetic ones alone, as the paper does. In the rounds it is multiplied by the share
            of the labels on which student and registration agree.
        posterior_strength: How far the intensities of the real patch correct its propagated labels; 0 leaves them as
            they are.
        posterior_blur: Standard deviation by which a propagated label is blurred before that, voxels: how far it may
            be wrong; a thin label is blurred less.
        rounds: Shares (between 0 and 1) of the epochs after which the averaged student segments the unlabelled images
            and guides a new registration of the atlas to them. Before the first round the student sees synthetic
            patches alone. Without rounds, ``[]``, it sees real ones from the start, labelled by the first
            registration.
        guide_weight: Weight of the averaged student's segmentations in the registrations of a round; that of each label
            is multiplied by the trust in the student that held-out patches suggest.
        average_decay: Share of the averaged student that remains at each step.
    """

    hint: str = "voxel"
    hint_weight: float = 0.1
    reconstruction_weight: float = 1.0
    levels: int = 2
    detach: str = "teacher"
    teacher_first: float = 0.0
    warmup_epochs: float = 0.2
    teacher_learning_rate: float = 1e-3
    corruption: float = 0.0
    corruption_block: int = 8
    real_share: float = 0.75
    posterior_strength: float = 0.6
    posterior_blur: float = 1.0
    rounds: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    guide_weight: float = 2.0
    average_decay: float = 0.99


@dataclass(frozen=True)
class OneShotConfig:
    """All settings of a run; ``plans["oneshot"]`` is this dataclass as JSON.

    Attributes:
        version: Version of the block's layout.
        atlases: Labelled cases to warp, or None: ``oneshot_atlas.json`` beside ``splits_final.json`` decides.
        seed: Seed of synthesis, network initialisation and registration.
        initial_lr: Learning rate with which a student on warped atlases or real images starts (AdamW). The CPU preset
            has 0.003: its networks have a quarter to half of nnU-Net's features and are trained for few iterations.
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

    version: int = 1
    atlases: tuple[str, ...] | None = None
    seed: int = 12345
    initial_lr: float = 1e-3
    precision: str = "auto"
    mirror_axes: str | tuple[int, ...] = "auto"
    progress_cases: int = 8
    unlabelled_fraction: float = 1.0
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
        block = dict(plans.get(BLOCK, {}))
        where = f'the "{BLOCK}" block of plans {plans.get("plans_name", "")!r}'
        overrides = environment_overrides()
        if overrides:
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


_CHOICES: dict[str, Sequence[str]] = {
    "method": ("refine", "network", "network+refine"),
    "precision": ("auto", "float32"),
    "detach": ("teacher", "student", "none"),
}
_PROBABILITIES = (
    "p_scale",
    "p_mix",
    "p_random",
    "p_appearance",
    "corruption",
    "unlabelled_fraction",
    "teacher_first",
    "warmup_epochs",
    "real_share",
    "average_decay",
    "search_reach",
)
_AT_LEAST_ONE = ("corruption_block", "levels")
_NESTED = {
    "registration": RegistrationConfig,
    "synthesis": SynthesisConfig,
    "distillation": DistillationConfig,
}


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
        overrides = json.loads(text)
    except json.JSONDecodeError as error:
        raise OneShotError(
            f"The environment variable {OVERRIDES_VARIABLE} is not valid JSON ({error}): {advice}"
        ) from error
    if not isinstance(overrides, dict):
        raise OneShotError(f"The environment variable {OVERRIDES_VARIABLE} holds {text}, not a JSON object: {advice}")
    return overrides


def merge_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """``first`` with ``second`` laid over it, nested objects merged."""
    merged = dict(first)
    for key, value in second.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_settings(merged[key], value) if nested else value
    return merged


def _build(cls: type, block: Any, where: str) -> Any:
    """Builds a config dataclass from JSON, checking names, types and values."""
    if not isinstance(block, dict):
        raise OneShotError(f"{where} holds {block!r}: expected an object.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(block) - set(fields))
    if unknown:
        raise OneShotError(
            f"{where} has unknown settings {unknown}: known are {sorted(fields)}. Remove or rename them in the plans "
            f"file."
        )
    values = {}
    for name, value in block.items():
        if name in _NESTED:
            values[name] = _build(_NESTED[name], value, f'"{name}" in {where}')
        else:
            values[name] = _checked(name, value, fields[name], where)
    built = cls(**values)
    if cls is DistillationConfig and built.teacher_first and built.detach != "teacher":
        raise OneShotError(
            f'{where} has "teacher_first" {built.teacher_first}, after which the teacher stays as it is, and "detach" '
            f'{built.detach!r}, with which the hint moves it: set "teacher_first" to 0 or "detach" to "teacher".'
        )
    return built


def _checked(name: str, value: Any, spec: dataclasses.Field, where: str) -> Any:
    """One setting, converted from JSON and checked against the type of its default and its allowed values."""

    def fail(expected: str) -> OneShotError:
        return OneShotError(f'"{name}" in {where} is {value!r}: expected {expected}. Correct it in the plans file.')

    if name == "atlases":
        if value is None:
            return None
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise fail("null or a list of case names")
        return tuple(value)
    if name == "guide":
        if value is not None and not (isinstance(value, str) and value):
            raise fail("null or the folder of a trained model")
        return value
    if name == "mirror_axes":
        if value == "auto":
            return value
        if not isinstance(value, list) or not all(isinstance(v, int) and 0 <= v < 3 for v in value):
            raise fail('"auto" or a list of axes such as [0, 1]')
        return tuple(value)
    if name == "version" and value != spec.default:
        raise fail(f"{spec.default}, the layout this release reads")
    if name == "rounds":
        if not isinstance(value, list) or not all(_is_number(v) and 0 < v < 1 for v in value):
            raise fail("a list, empty or of numbers between 0 and 1 such as [0.4, 0.7]")
        return tuple(value)
    choices = CHOSEN_BY_SETTING.get(name, _CHOICES.get(name))
    if choices is not None and value not in choices:
        raise fail(f"one of {list(choices)}")
    default = spec.default
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise fail("true or false")
    elif isinstance(default, tuple):
        if not isinstance(value, list) or not value or not all(_is_number(v) and v >= 0 for v in value):
            raise fail(f"a list of numbers >= 0 such as {list(default)}")
        return tuple(value)
    elif isinstance(default, int):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise fail("a whole number >= 0")
        if name in _AT_LEAST_ONE and value < 1:
            raise fail("a whole number >= 1")
    elif isinstance(default, float):
        if not _is_number(value) or value < 0:
            raise fail("a number >= 0")
        if name in _PROBABILITIES and value > 1:
            raise fail("a number from 0 to 1")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
