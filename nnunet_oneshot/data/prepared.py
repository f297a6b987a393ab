"""A planned and preprocessed dataset: one value that holds plans, cases, labels and images, and is passed whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.data.description import check_description, checked_labels
from nnunet_oneshot.data.orientation import aligned_by_headers, axes_of, in_common_order, name_of
from nnunet_oneshot.data.outline import restore_outline
from nnunet_oneshot.data.partial import check_partial, hidden_labels
from nnunet_oneshot.data.plans import check_plans
from nnunet_oneshot.data.preprocessed import (
    check_preprocessed,
    load_image,
    load_properties,
    load_segmentation,
    open_image,
)
from nnunet_oneshot.data.previous_stage import PreviousStage
from nnunet_oneshot.data.raw import dataset_name
from nnunet_oneshot.data.splits import Fold, resolve_fold
from nnunet_oneshot.data.written import check_written_cases
from nnunet_oneshot.errors import NotReadyError
from nnunet_oneshot.io import kept_folder, load_json_checked, require_env
from nnunet_oneshot.names import check_name, inside

# Images and properties; the label of an image in `.npz` lies in the same file.
_FILES_OF_A_CASE = (".b2nd", ".npy", ".npz", ".pkl")


@dataclass(frozen=True)
class PreparedDataset:
    """One configuration of a preprocessed dataset.

    Attributes:
        base: The dataset's folder, ``nnUNet_preprocessed/DatasetXXX_Name``.
        plans: Content of the plans file.
        plans_name: The plans' file is called after it.
        dataset_json: Content of ``dataset.json``.
        configuration: Such as ``3d_fullres``.
        previous: The segmentations that the second stage of a cascade sees beside the images; else None.
    """

    base: Path
    plans: dict[str, Any]
    plans_name: str
    dataset_json: dict[str, Any]
    configuration: str
    previous: PreviousStage | None = None

    @classmethod
    def open(cls, *, dataset: str | int, plans_name: str, configuration: str) -> PreparedDataset:
        """Opens a dataset that was planned and preprocessed.

        Raises:
            OneShotError: The dataset, its plans, the configuration or its preprocessed cases do not exist.
        """
        (preprocessed,) = require_env("nnUNet_preprocessed")
        base = preprocessed / dataset_name(dataset, preprocessed)
        check_name(plans_name, "name of the plans", "-p")
        if not (base / f"{plans_name}.json").is_file():
            found = sorted(p.stem for p in base.glob("*Plans*.json"))
            raise NotReadyError(
                f"{base} has no plans {plans_name!r}; found: {found or 'none'}. Run `nnunet_oneshot "
                f"plan_and_preprocess -d {dataset}` first, or correct -p."
            )
        path = base / f"{plans_name}.json"
        plans = check_plans(load_json_checked(path, "the plans file", dict), path)
        if configuration not in plans["configurations"]:
            raise NotReadyError(
                f"Plans {plans_name!r} of {base.name} have no configuration {configuration!r}: they have "
                f"{sorted(plans['configurations'])}. Correct -c."
            )
        check_name(configuration, "configuration", f"plans {plans_name}")
        description = base / "dataset.json"
        dataset_json = check_description(load_json_checked(description, "the dataset's description", dict), description)
        prepared = cls(base, plans, plans_name, dataset_json, configuration)
        prepared.check()
        return prepared

    def check(self) -> None:
        """Makes sure that the configuration has been preprocessed, and that its folder holds what was written there.

        Raises:
            OneShotError: Its folder is missing, or cases of it are missing or surplus.
        """
        owner, configurations = self.configuration, self.plans["configurations"]
        while "data_identifier" not in configurations[owner]:
            owner = configurations[owner]["inherits_from"]
        check_preprocessed(str(self.folder), owner)
        check_written_cases(self.base, self.folder)

    def check_previous(self, cases: Sequence[str]) -> None:
        """Makes sure that the second stage of a cascade finds the first stage's segmentation of each case.

        Raises:
            OneShotError: See `nnunet_oneshot.data.previous_stage.PreviousStage.check`.
        """
        if self.previous is not None:
            self.previous.check(cases, self.shape)

    @property
    def name(self) -> str:
        """``DatasetXXX_Name``."""
        return self.base.name

    @cached_property
    def plans_manager(self) -> Any:
        """nnU-Net's manager of the plans."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self.plans)

    @cached_property
    def configuration_manager(self) -> Any:
        """nnU-Net's manager of the configuration."""
        return self.plans_manager.get_configuration(self.configuration)

    @cached_property
    def label_manager(self) -> Any:
        """nnU-Net's manager of the labels.

        Raises:
            OneShotError: The labels are not what nnU-Net accepts.
        """
        build = partial(self.plans_manager.get_label_manager, self.dataset_json)
        return checked_labels(build, self.base / "dataset.json")

    @property
    def folder(self) -> Path:
        """Folder of the preprocessed cases.

        Raises:
            OneShotError: The plans name a place outside of the dataset's folder.
        """
        where = f"configuration {self.configuration} of plans {self.plans_name}"
        return inside(self.base, self.configuration_manager.data_identifier, "data_identifier", where)

    @property
    def kept(self) -> Path:
        """Folder of what registration and training add to the dataset; see `kept_folder`."""
        return kept_folder(self.base)

    @property
    def file_ending(self) -> str:
        """Suffix of images and labels, such as ``.nii.gz``."""
        return self.dataset_json["file_ending"]

    @property
    def num_channels(self) -> int:
        """Number of image channels."""
        return len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])

    @property
    def labels_folder(self) -> Path:
        """Folder of the reference segmentations in their original grid."""
        return self.base / "gt_segmentations"

    @cached_property
    def cases(self) -> Any:
        """nnU-Net's dataset of all preprocessed cases."""
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        return infer_dataset_class(str(self.folder))(str(self.folder))

    @property
    def identifiers(self) -> list[str]:
        """Names of all preprocessed cases, sorted."""
        return sorted(self.cases.identifiers)

    @property
    def labelled(self) -> list[str]:
        """The cases that have a file in ``gt_segmentations``, sorted. No label is opened."""
        return [case for case in self.identifiers if (self.labels_folder / f"{case}{self.file_ending}").is_file()]

    @cached_property
    def hidden_labels(self) -> dict[str, tuple[int, ...]]:
        """Partly labelled cases with the labels that they do not show; see `nnunet_oneshot.data.partial`."""
        check_partial(self.dataset_json, self.base / "dataset.json")
        return hidden_labels(self.dataset_json)

    def fold(self, number: int | str) -> Fold:
        """Cases of a fold; see `nnunet_oneshot.data.splits.resolve_fold`."""
        return resolve_fold(
            self.base, self.identifiers, self.labelled, number, kept=self.kept, partial=sorted(self.hidden_labels)
        )

    def image(self, case: str) -> np.ndarray:
        """Preprocessed image (C, X, Y, Z) float32, as a network of nnU-Net sees it."""
        return np.asarray(load_image(str(self.folder), case), np.float32)

    def network_input(self, case: str) -> np.ndarray:
        """What a network sees of a case, (C, X, Y, Z) float32.

        That is the image and, in the second stage of a cascade, the first stage's segmentation in one channel a label.
        """
        image = self.image(case)
        if self.previous is None:
            return image
        from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

        segmentation, labels = self.previous.open(case)[:], self.label_manager.foreground_labels
        return np.vstack((image, convert_labelmap_to_one_hot(segmentation, labels, output_dtype=image.dtype)))

    def registration_image(self, case: str) -> np.ndarray:
        """Preprocessed image (C, X, Y, Z) float32 as it is registered; see `with_outline`."""
        return self.with_outline(self.image(case))

    def with_outline(self, image: np.ndarray) -> np.ndarray:
        """A preprocessed image (C, X, Y, Z) with the outline that masked normalisation hides."""
        return restore_outline(image, self.configuration_manager.use_mask_for_norm)

    def segmentation(self, case: str) -> np.ndarray:
        """Preprocessed label map (1, X, Y, Z) int16 of a labelled case; in training and registration, of atlases."""
        return np.asarray(load_segmentation(str(self.folder), case), np.int16)

    def properties(self, case: str) -> dict[str, Any]:
        """What nnU-Net's export needs to return to the original grid."""
        return load_properties(str(self.folder), case)

    def spacing(self, case: str) -> tuple[float, ...]:
        """Three voxel edges of a preprocessed image, mm, array axis order."""
        return self.spacing_of({} if self._has_three_edges else self.properties(case))

    def spacing_of(self, properties: dict[str, Any]) -> tuple[float, ...]:
        """The same from the properties of a case; a 2D configuration keeps the original distance of the slices."""
        target = tuple(float(edge) for edge in self.configuration_manager.spacing)
        if self._has_three_edges:
            return target
        return (float(properties["spacing"][self.plans_manager.transpose_forward[0]]), *target)

    def axes(self, case: str) -> np.ndarray:
        """(3, 3), where the axes of the preprocessed image point; see `nnunet_oneshot.data.orientation`."""
        return self.axes_of(self.properties(case))

    def axes_of(self, properties: dict[str, Any]) -> np.ndarray:
        """The same from the properties of a case."""
        return axes_of(properties, self.plans_manager.transpose_forward)

    def orders(self, cases: Sequence[str]) -> dict[str, list[str]]:
        """The orders in which the axes of preprocessed images are stored, such as ``SPL``, each with its cases."""
        found: dict[str, list[str]] = {}
        for case in cases:
            found.setdefault(name_of(self.axes(case)), []).append(case)
        return found

    def alignment(
        self, case: str, atlas: str, case_shape: Sequence[int], atlas_shape: Sequence[int]
    ) -> np.ndarray | None:
        """The map case voxel -> atlas voxel, (4, 4), in which directions agree and the middles lie on each other.

        None where the axes of both preprocessed images point alike.
        """
        return aligned_by_headers(
            self.axes(case),
            self.axes(atlas),
            fixed=(case_shape, self.spacing(case)),
            moving=(atlas_shape, self.spacing(atlas)),
        )

    def image_in_common_order(self, case: str) -> np.ndarray:
        """The preprocessed image (C, X, Y, Z) with its axes in one order, whatever that of the file."""
        return in_common_order(self.image(case), self.axes(case))

    def digest(self, case: str) -> str:
        """Checksum of the preprocessed image, its shape included."""
        return image_digest(self.image(case))

    def shape(self, case: str) -> tuple[int, ...]:
        """Voxels (X, Y, Z) of the preprocessed image, which is not read."""
        return tuple(open_image(str(self.folder), case).shape[1:])

    def stamp(self, case: str) -> list[list[Any]]:
        """Name, size (bytes) and time of change (ns) of a case's preprocessed files, a separate label's left out.

        As long as it stays the same, so do image and properties: they need not be read to know.
        """
        found = []
        for suffix in _FILES_OF_A_CASE:
            with suppress(FileNotFoundError):
                status = os.stat(self.folder / f"{case}{suffix}")
                found.append([f"{case}{suffix}", status.st_size, status.st_mtime_ns])
        return found

    def score_labels(self) -> dict[str, Any]:
        """Name to label value, or to the label values of a region, of everything that is scored."""
        wanted = self.dataset_json["labels"]
        return {n: v for n, v in wanted.items() if n != "ignore" and (isinstance(v, (list, tuple)) or int(v) != 0)}

    @property
    def _has_three_edges(self) -> bool:
        return len(self.configuration_manager.spacing) == 3


def image_digest(image: np.ndarray) -> str:
    """Checksum of a preprocessed image (C, X, Y, Z), its shape included."""
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
