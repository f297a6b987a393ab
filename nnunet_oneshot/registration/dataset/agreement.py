"""How far a student and registration agree on cases without labels, which tells where either may be wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nnunet_oneshot.config import DistillationConfig, OneShotConfig
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.partial import averaged_probabilities
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError, listed
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar
from nnunet_oneshot.registration.pair.warp import warp_label_probabilities
from nnunet_oneshot.self_training.guide import Student
from nnunet_oneshot.self_training.posterior import posterior_labels


@dataclass(frozen=True)
class StudentRun:
    """A trained student and what it was trained on.

    Attributes:
        folder: ``TRAINER__PLANS__CONFIGURATION`` of nnU-Net's results.
        dataset: Number or name.
        plans_name: Such as ``nnUNetOneShotPlans``.
        configuration: Such as ``3d_fullres``.
        fold: Its number, or ``"all"``.
        device: ``cpu``, ``cuda`` or ``mps``.
    """

    folder: str | Path
    dataset: str
    plans_name: str
    configuration: str
    fold: str
    device: str


@dataclass(frozen=True)
class Agreement:
    """Dice between a student's prediction and the carried label of one case.

    Attributes:
        labels: Name of each label or region to its Dice; those that neither found are left out.
    """

    labels: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the labels; 1 where neither found any."""
        return float(np.mean(list(self.labels.values()))) if self.labels else 1.0


def agreement_with_registration(
    run: StudentRun, cases: Sequence[str], num_processes: int, log: Callable[[str], None]
) -> dict[str, Agreement]:
    """Dice between a student's predictions and the labels that registration carries, corrected by intensities.

    Registrations that the training left are used; missing ones are computed.

    Args:
        run: The student.
        cases: Preprocessed cases; only their images are read.
        num_processes: Processes that register.
        log: Called with messages for the user.

    Raises:
        OneShotError: The student is not one of this dataset, plans, configuration and fold, or a case is not
            preprocessed.
    """
    prepared = PreparedDataset.open(dataset=run.dataset, plans_name=run.plans_name, configuration=run.configuration)
    if absent := sorted(set(cases) - set(prepared.identifiers)):
        raise OneShotError(
            f"Cases {listed(absent)} are not preprocessed for {run.configuration}: run `nnunet_oneshot "
            f"plan_and_preprocess` again."
        )
    config, place, fold = OneShotConfig.from_plans(prepared.plans), usable_device(run.device), prepared.fold(run.fold)
    student = Student(run.folder, prepared, fold=fold.number, device=place, what="student")
    choice = resolve_atlases(prepared.base, config, fold, prepared.image_in_common_order, kept=prepared.kept)
    registrar = DatasetRegistrar(prepared, config, choice.atlases, place, log, num_processes=num_processes)
    registrations = registrar.register(cases, fold=fold.number)
    labels = [int(label) for label in prepared.label_manager.all_labels]
    segmentations = {atlas: prepared.segmentation(atlas) for atlas in choice.atlases}
    found = {}
    for case in cases:
        image = prepared.image(case)
        carried = averaged_probabilities(
            (
                (atlas, warp_label_probabilities(registrations.load(atlas, case), segmentation, labels))
                for atlas, segmentation in segmentations.items()
            ),
            labels,
            prepared.hidden_labels,
        )
        corrected = _corrected(carried, labels, image, config.distillation)
        found[case] = _compared(student.probabilities(image), corrected, prepared)
        log(f"{case}: Dice of student and registration {found[case].mean:.3f}")
    return found


def _corrected(
    probabilities: np.ndarray, labels: Sequence[int], image: np.ndarray, settings: DistillationConfig
) -> np.ndarray:
    """The likeliest labels (X, Y, Z), corrected by the image (C, X, Y, Z) as in training."""
    likeliest = torch.from_numpy(np.asarray(labels)[probabilities.argmax(0)])[None, None]
    blur, strength = settings.posterior_blur, settings.posterior_strength
    return posterior_labels(torch.from_numpy(image)[None], likeliest, blur=blur, strength=strength)[0, 0].numpy()


def _compared(probabilities: np.ndarray, carried: np.ndarray, prepared: PreparedDataset) -> Agreement:
    """Dice of a student's probabilities (K, X, Y, Z) of foreground labels or regions with a label map (X, Y, Z)."""
    manager = prepared.label_manager
    groups = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    names = {tuple(np.atleast_1d(value).tolist()): name for name, value in prepared.score_labels().items()}
    if manager.has_regions:
        masks = probabilities > 0.5
    else:
        background = 1 - probabilities.sum(0, keepdims=True)
        likeliest = np.concatenate([background, probabilities]).argmax(0)
        masks = likeliest == np.arange(1, len(probabilities) + 1)[:, None, None, None]
    found = {}
    for mask, group in zip(masks, groups, strict=True):
        members = tuple(int(label) for label in np.atleast_1d(group))
        other = np.isin(carried, members)
        if size := int(mask.sum() + other.sum()):
            found[names[members]] = float(2 * (mask & other).sum() / size)
    return Agreement(found)
