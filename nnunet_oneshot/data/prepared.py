"""A planned and preprocessed dataset, opened by name: plans, cases, labels and image arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.data.preprocessed import check_preprocessed, load_image
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import load_json_checked, require_env


def dataset_name(dataset: str | int) -> str:
    """The name ``DatasetXXX_Name`` of a dataset given by name or number.

    Raises:
        OneShotError: No dataset, or more than one, has this number.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise OneShotError(f"Dataset {dataset!r} was not found. {error}") from error


@dataclass(frozen=True)
class PreparedDataset:
    """One configuration of a preprocessed dataset.

    Attributes:
        name: ``DatasetXXX_Name``.
        base: Its folder in ``nnUNet_preprocessed``.
        plans: Content of the plans file.
        plans_name: The plans' file is called after it.
        dataset_json: Content of ``dataset.json``.
        configuration: Such as ``3d_fullres``.
    """

    name: str
    base: Path
    plans: dict[str, Any]
    plans_name: str
    dataset_json: dict[str, Any]
    configuration: str

    @classmethod
    def open(cls, *, dataset: str | int, plans_name: str, configuration: str) -> PreparedDataset:
        """Opens a dataset that was planned and preprocessed.

        Raises:
            OneShotError: The dataset, its plans, the configuration or its preprocessed cases do not exist.
        """
        (preprocessed,) = require_env("nnUNet_preprocessed")
        name = dataset_name(dataset)
        base = preprocessed / name
        if not (base / f"{plans_name}.json").is_file():
            found = sorted(p.stem for p in base.glob("*Plans*.json"))
            raise OneShotError(
                f"{base} has no plans {plans_name!r}; found: {found or 'none'}. Run `nnunet_oneshot "
                f"plan_and_preprocess -d {dataset}` first, or correct -p."
            )
        plans = load_json_checked(base / f"{plans_name}.json", "the plans file")
        if configuration not in plans.get("configurations", {}):
            raise OneShotError(
                f"Plans {plans_name!r} of {name} have no configuration {configuration!r}: they have "
                f"{sorted(plans.get('configurations', {}))}. Correct -c."
            )
        dataset_json = load_json_checked(base / "dataset.json", "the dataset's description")
        prepared = cls(name, base, plans, plans_name, dataset_json, configuration)
        check_preprocessed(str(prepared.folder), configuration)
        return prepared

    @cached_property
    def plans_manager(self) -> Any:
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        return PlansManager(self.plans)

    @cached_property
    def configuration_manager(self) -> Any:
        return self.plans_manager.get_configuration(self.configuration)

    @cached_property
    def label_manager(self) -> Any:
        return self.plans_manager.get_label_manager(self.dataset_json)

    @property
    def folder(self) -> Path:
        """Folder of the preprocessed cases."""
        return self.base / self.configuration_manager.data_identifier

    @property
    def file_ending(self) -> str:
        return self.dataset_json["file_ending"]

    @property
    def labels_folder(self) -> Path:
        """Folder of the reference segmentations in their original grid."""
        return self.base / "gt_segmentations"

    @cached_property
    def cases(self) -> Any:
        """nnU-Net's dataset of all preprocessed cases."""
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        return infer_dataset_class(str(self.folder))(str(self.folder))

    def image(self, case: str) -> np.ndarray:
        """Preprocessed image (C, X, Y, Z) float32."""
        return load_image(str(self.folder), case).astype(np.float32)

    def registration_image(self, case: str) -> np.ndarray:
        """Preprocessed image (C, X, Y, Z) float32 as it is registered; see `with_outline`."""
        return self.with_outline(self.image(case))

    def with_outline(self, image: np.ndarray) -> np.ndarray:
        """A preprocessed image (C, X, Y, Z) with the outline that masked normalisation hides."""
        from nnunet_oneshot.registration.outline import restore_outline

        return restore_outline(image, self.configuration_manager.use_mask_for_norm)

    def segmentation(self, case: str) -> np.ndarray:
        """Preprocessed label map (1, X, Y, Z) of a labelled case."""
        return np.asarray(self.cases.load_case(case)[1][:])

    def properties(self, case: str) -> dict[str, Any]:
        """What nnU-Net's export needs to return to the original grid."""
        return self.cases.load_case(case)[3]

    def spacing(self, properties: dict[str, Any]) -> list[float]:
        """Three voxel edges (mm, array axis order) of a preprocessed array, given its properties.

        A 2D configuration leaves the distance of the slices as it is in the file.
        """
        target = list(self.configuration_manager.spacing)
        if len(target) == 3:
            return target
        return [properties["spacing"][self.plans_manager.transpose_forward[0]], *target]

    @property
    def identifiers(self) -> list[str]:
        return sorted(self.cases.identifiers)

    def score_labels(self) -> dict[str, Any]:
        """Name to label value, or to the label values of a region, of everything that is scored."""
        wanted = self.dataset_json["labels"]
        return {n: v for n, v in wanted.items() if n != "ignore" and not (np.isscalar(v) and int(v) == 0)}
