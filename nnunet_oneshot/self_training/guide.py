"""Networks that segment the preprocessed images of their own dataset, to guide their registration."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.inference import (
    CHECKPOINT,
    build_predictor,
    foreground_probabilities,
    load_predictor,
    read_model,
)
from nnunet_oneshot.precision import processor_autocast
from nnunet_oneshot.unet import as_unet

# Normalisations that compute with the foreground intensities of the plans.
_NORMALISED_BY_PLANS = ("CTNormalization",)


class SegmentingGuide(ABC):
    """A network of this dataset and configuration whose segmentations guide registrations.

    Attributes:
        labels: nnU-Net's label manager.
        trust: How far each foreground label, or region, is followed, (K,), 0 to 1; None is all the way.
    """

    labels: LabelManager
    trust: np.ndarray | None = None

    @property
    @abstractmethod
    def digest(self) -> str:
        """Checksum of the network's weights."""

    @abstractmethod
    def describe(self) -> str:
        """A sentence for the log."""

    @abstractmethod
    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Probability of every foreground label, or region, at every voxel.

        Args:
            image: (C, X, Y, Z), preprocessed, as `PreparedDataset.network_input` gives it.

        Returns:
            (K, X, Y, Z) float16.
        """

    def atlas_maps(self, segmentation: np.ndarray) -> np.ndarray:
        """The atlas's labels in the order of `probabilities`, and last where the atlas is not to be ignored.

        Args:
            segmentation: (1, X, Y, Z) label map of the atlas.

        Returns:
            (K + 1, X, Y, Z) bool.
        """
        groups = self.labels.foreground_regions if self.labels.has_regions else self.labels.foreground_labels
        ignored = [self.labels.ignore_label] if self.labels.has_ignore_label else []
        # Filled one by one: of many labels of a large atlas, each copy takes gigabytes.
        maps = np.empty((len(groups) + 1, *segmentation.shape[1:]), bool)
        for place, group in enumerate(groups):
            maps[place] = np.isin(segmentation[0], np.atleast_1d(group))
        maps[-1] = ~np.isin(segmentation[0], ignored)
        return maps


class Student(SegmentingGuide):
    """One fold of a trained model, checked to be one of this dataset, configuration and fold.

    Only images go through it. The same fold is asked for because a model of another fold may have learned from labels
    of this fold's validation cases.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION`` of nnU-Net's results, as given to
            ``nnUNetv2_predict_from_modelfolder``.
        prepared: The dataset whose images are to be segmented.
        fold: Number of the fold that is registered, or ``"all"``.
        device: Where the network runs.
        what: What it is for the user, the beginning of errors.

    Raises:
        OneShotError: There is no finished training of this fold, or it is one for other images or labels.
    """

    def __init__(
        self,
        folder: str | Path,
        prepared: PreparedDataset,
        *,
        fold: int | str,
        device: torch.device,
        what: str = "guide",
    ) -> None:
        self.what = what
        self.folder = Path(folder).expanduser()
        self.fold = str(fold)
        self.device = device
        self.checkpoint = self.folder / f"fold_{fold}" / CHECKPOINT
        self._check_files()
        own, described = read_model(self.folder)
        self._check_images(own, prepared)
        self._check_labels(described, prepared.dataset_json)
        self.trainer = self._check_checkpoint(prepared.configuration)
        self.labels = prepared.label_manager

    @cached_property
    def digest(self) -> str:
        """Checksum of the checkpoint: another training has another one, wherever it lies."""
        return hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()

    def describe(self) -> str:
        """A sentence for the log."""
        sentence = f"Registration is guided by the segmentations of {self.folder} (fold {self.fold}, {self.trainer})."
        if not self.trainer.startswith("OneShot"):
            sentence += (
                " This is no trainer of this package, unless the model was exported: it may have learned from the "
                "labels of all training cases."
            )
        return sentence

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        return foreground_probabilities(self._predictor, image)

    @cached_property
    def _predictor(self):
        with loading_checkpoint(self.checkpoint, advice="Train this fold again, or register without a guide."):
            return load_predictor(self.folder, [self.fold], self.device)

    def _check_files(self) -> None:
        expected = "expected nnU-Net's TRAINER__PLANS__CONFIGURATION with plans.json, dataset.json and fold folders"
        if not self.folder.is_dir():
            raise OneShotError(f"The {self.what} {self.folder} is no folder: {expected}.")
        missing = [name for name in ("plans.json", "dataset.json") if not (self.folder / name).is_file()]
        if missing:
            raise OneShotError(f"The {self.what} {self.folder} holds no {' and no '.join(missing)}: {expected}.")
        if not self.checkpoint.is_file():
            finished = sorted(path.parent.name for path in self.folder.glob(f"fold_*/{CHECKPOINT}"))
            raise OneShotError(
                f"The {self.what} {self.folder} has no finished training of fold {self.fold} ({CHECKPOINT}); finished: "
                f"{finished or 'none'}. A fold is guided by a model of the same fold, since those of other folds may "
                f"have learned from its validation cases: train it, or give another folder."
            )

    def _check_images(self, own: dict[str, Any], prepared: PreparedDataset) -> None:
        plans, configuration = prepared.plans, prepared.configuration
        self._same("dataset", own.get("dataset_name"), plans.get("dataset_name"))
        if configuration not in own["configurations"]:
            raise OneShotError(
                f"The {self.what} {self.folder} was planned without configuration {configuration}: expected a model "
                f"of it."
            )
        theirs, ours = PlansManager(own).get_configuration(configuration), prepared.configuration_manager
        if theirs.previous_stage_name is not None:
            raise OneShotError(
                f"The {self.what} {self.folder} is the second stage of a cascade, which needs another model's "
                f"segmentations: give a model of a configuration without a previous stage."
            )
        self._same("order of axes", own["transpose_forward"], plans["transpose_forward"])
        self._same("spacing", np.round(theirs.spacing, 6).tolist(), np.round(ours.spacing, 6).tolist())
        for name in ("normalization_schemes", "use_mask_for_norm"):
            self._same(name, getattr(theirs, name), getattr(ours, name))
        if any(scheme in _NORMALISED_BY_PLANS for scheme in ours.normalization_schemes):
            name = "foreground_intensity_properties_per_channel"
            self._same(name, own.get(name), plans.get(name))

    def _check_labels(self, described: dict[str, Any], dataset_json: dict[str, Any]) -> None:
        for name in ("labels", "regions_class_order", "channel_names"):
            self._same(f'"{name}" of dataset.json', described.get(name), dataset_json.get(name))

    def _check_checkpoint(self, configuration: str) -> str:
        """Compares what the checkpoint says about its training; returns the name of its trainer."""
        with loading_checkpoint(self.checkpoint, advice="Train this fold again, or register without a guide."):
            checkpoint = load_data(self.checkpoint)
            arguments, trainer = checkpoint["init_args"], str(checkpoint["trainer_name"])
            found = {"configuration": arguments["configuration"], "fold": str(arguments["fold"])}
        self._same("configuration", found["configuration"], configuration)
        self._same("fold", found["fold"], self.fold)
        return trainer

    def _same(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise OneShotError(
                f"The {self.what} {self.folder} was trained with another {what} ({_short(found)}) than the images that "
                f"are registered ({_short(expected)}): give a model of this dataset, or train one."
            )


class StudentInTraining(SegmentingGuide):
    """A copy of a student that is being trained; later steps of its training do not change it.

    Args:
        network: U-Net of nnU-Net's plans, on ``device``.
        prepared: The dataset that is trained on.
        mirror_axes: Axes of the patch that may be mirrored, or None.
        device: Where the network runs.
        precision: Of the settings, see `nnunet_oneshot.precision.uses_bfloat16`.
        trust: How far each foreground label, or region, is followed, (K,), 0 to 1.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        prepared: PreparedDataset,
        *,
        mirror_axes: Sequence[int] | None,
        device: torch.device,
        precision: str,
        trust: np.ndarray,
    ) -> None:
        self.trust = trust
        student = copy.deepcopy(network)
        as_unet(student).decoder.deep_supervision = False
        self.labels = prepared.label_manager
        self._context = partial(processor_autocast, device, precision)
        self._predictor = build_predictor(student, prepared, mirror_axes=mirror_axes, device=device)

    @cached_property
    def digest(self) -> str:
        weights = hashlib.sha256(np.asarray(self.trust, np.float64).tobytes())
        for name, values in sorted(self._predictor.list_of_parameters[0].items()):
            weights.update(name.encode())
            weights.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return weights.hexdigest()

    def describe(self) -> str:
        return "Registration is guided by the segmentations of the averaged student."

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        with self._context():
            return foreground_probabilities(self._predictor, image)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def guided_by(
    settings: RegistrationConfig, prepared: PreparedDataset, *, fold: int | str | None, device: torch.device
) -> SegmentingGuide | None:
    """The student that the settings name, or None.

    Args:
        settings: Of the registration.
        prepared: The dataset whose images are registered.
        fold: The fold that is registered.
        device: Where the student runs.

    Raises:
        OneShotError: It cannot be used; see `Student`.
    """
    if settings.guide is None:
        return None
    if settings.method == "network":
        raise OneShotError(
            'The registration "method" is "network", which a guide cannot change: set it to "refine" or '
            '"network+refine", or remove "guide".'
        )
    if fold is None:
        raise OneShotError("A guided registration needs the fold whose model guides it.")
    return Student(settings.guide, prepared, fold=fold, device=device)
