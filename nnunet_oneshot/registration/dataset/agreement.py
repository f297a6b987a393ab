"""How far a student and registration agree on cases without labels, which tells where either may be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
from nnunet_oneshot.inference import likeliest, likeliest_heads
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import atlas_coordinates, sample_label_probabilities
from nnunet_oneshot.self_training.guide import Student
from nnunet_oneshot.self_training.posterior import posterior_labels

# Probabilities of all labels that are in memory at a time.
_VALUES = 2**27


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
        carried = _carried(
            {atlas: registrations.load(atlas, case) for atlas in segmentations},
            segmentations,
            labels,
            prepared.hidden_labels,
        )
        corrected = _corrected(carried, image, config.distillation)
        found[case] = _compared(student.probabilities(image), corrected, prepared)
        log(f"{case}: Dice of student and registration {found[case].mean:.3f}")
    return found


def _carried(
    registrations: Mapping[str, Registration],
    segmentations: Mapping[str, np.ndarray],
    labels: Sequence[int],
    hidden: Mapping[str, Sequence[int]],
) -> np.ndarray:
    """The likeliest label (X, Y, Z) that atlases carry to a case, of the mean of their probabilities.

    Args:
        registrations: Atlas to its registration with the case.
        segmentations: Atlas to its label map (1, X, Y, Z).
        labels: Values, 0 first.
        hidden: Atlas to the labels that it does not show.
    """
    places = {atlas: atlas_coordinates(found) for atlas, found in registrations.items()}
    shape = next(iter(places.values())).shape[1:]
    found = np.empty(shape, np.int64)
    # In slabs: of many labels of a large image, all probabilities take gigabytes.
    planes = max(1, _VALUES // (len(labels) * math.prod(shape[1:])))
    for start in range(0, shape[0], planes):
        slab = slice(start, start + planes)
        probabilities = averaged_probabilities(
            (
                (atlas, sample_label_probabilities(segmentations[atlas], coordinates[:, slab], labels))
                for atlas, coordinates in places.items()
            ),
            labels,
            hidden,
        )
        found[slab] = np.asarray(labels)[likeliest(probabilities)]
    return found


def _corrected(carried: np.ndarray, image: np.ndarray, settings: DistillationConfig) -> np.ndarray:
    """Labels (X, Y, Z), corrected by the image (C, X, Y, Z) as in training."""
    corrected = posterior_labels(
        torch.from_numpy(image)[None],
        torch.from_numpy(carried)[None, None],
        blur=settings.posterior_blur,
        strength=settings.posterior_strength,
    )
    return corrected[0, 0].numpy()


def _compared(probabilities: np.ndarray, carried: np.ndarray, prepared: PreparedDataset) -> Agreement:
    """Dice of a student's probabilities (K, X, Y, Z) of foreground labels or regions with a label map (X, Y, Z)."""
    manager = prepared.label_manager
    groups = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    names = {tuple(np.atleast_1d(value).tolist()): name for name, value in prepared.score_labels().items()}
    places = None if manager.has_regions else likeliest_heads(probabilities)
    found = {}
    for place, (own, group) in enumerate(zip(probabilities, groups, strict=True), start=1):
        mask = own > 0.5 if places is None else places == place
        members = tuple(int(label) for label in np.atleast_1d(group))
        other = np.isin(carried, members)
        if size := int(mask.sum() + other.sum()):
            found[names[members]] = float(2 * (mask & other).sum() / size)
    return Agreement(found)
