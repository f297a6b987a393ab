"""nnU-Net's preprocessing for data sets in which only some cases are labelled.

Plans name nnU-Net's own ``DefaultPreprocessor``, with which prediction preprocesses new images. The subclass here
serves training cases alone: it copes with missing labels, and no label influences any image.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_oneshot.data.parallel import run_on_cases
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.verify import check_nifti, whole_labels
from nnunet_oneshot.data.written import record_cases
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_folder, writing
from nnunet_oneshot.names import inside

# What nnU-Net keeps of a preprocessed case.
_CASE_FILES = (".b2nd", ".npy", ".npz", ".pkl")


class OneShotPreprocessor(DefaultPreprocessor):
    """Preprocesses labelled and unlabelled training cases; images come out the same whatever the label holds."""

    def run_case(
        self,
        image_files: list[str],
        seg_file: str | None,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        dataset_json: dict[str, Any],
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Reads and preprocesses a case.

        An unusable label of a case that is no atlas counts as missing, with a warning. Without a label the segmentation
        is -1 outside the image's nonzero part and 0 inside, and no class has locations.

        Args:
            image_files: Channels, in order.
            seg_file: Label, or None.
            plans_manager: Plans.
            configuration_manager: Configuration.
            dataset_json: Content of ``dataset.json``.

        Returns:
            Image (C, X, Y, Z), segmentation (1, X, Y, Z) and properties, as nnU-Net's preprocessor gives them.
        """
        reader = plans_manager.image_reader_writer_class()
        image, properties = reader.read_images(image_files)
        label = None if seg_file is None else _usable_label(reader, seg_file, image.shape[1:])
        image, segmentation, properties = self.run_case_npy(
            image, label, properties, plans_manager, configuration_manager, dataset_json
        )
        properties.setdefault("class_locations", _no_locations(plans_manager.get_label_manager(dataset_json)))
        return image, segmentation, properties

    def _normalize(
        self,
        data: np.ndarray,
        seg: np.ndarray,
        configuration_manager: ConfigurationManager,
        foreground_intensity_properties_per_channel: dict,
    ) -> np.ndarray:
        """Normalises inside the image's nonzero mask, as nnU-Net does at prediction.

        For labelled cases nnU-Net takes ``seg >= 0``, into which labels outside the nonzero part leak.
        """
        mask = np.where(create_nonzero_mask(data), np.int8(0), np.int8(-1))[None]
        return super()._normalize(data, mask, configuration_manager, foreground_intensity_properties_per_channel)


def preprocess_configuration(
    raw: RawDataset,
    plans: dict[str, Any],
    configuration: str,
    dataset_folder: Path,
    *,
    atlases: Collection[str],
    num_processes: int,
    verbose: bool = False,
    show_progress: bool = True,
) -> Path:
    """Preprocesses every case for one configuration; the folder appears when all cases are done.

    Args:
        raw: The data set.
        plans: Plans.
        configuration: Name of a configuration in them.
        dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.
        atlases: Cases whose labels must be usable.
        num_processes: Worker processes.
        verbose: Whether to print what nnU-Net's preprocessor tells of each case.
        show_progress: Whether to show a progress bar.

    Returns:
        The folder that was written.

    Raises:
        OneShotError: A case failed, or the folder cannot be written.
    """
    identifier = PlansManager(plans).get_configuration(configuration).data_identifier
    target = inside(dataset_folder, identifier, "data_identifier", f"configuration {configuration} of the plans")
    _check_replaceable(target, configuration)
    with writing(dataset_folder), atomic_folder(target) as folder:
        shared = _Target(str(folder), plans, configuration, raw.dataset_json, verbose)
        run_on_cases(
            _preprocess_case,
            [(shared, case, raw.images(case), raw.label(case), case in atlases) for case in raw.cases],
            num_processes=num_processes,
            description=f"Preprocessing for {configuration}",
            show_progress=show_progress,
        )
    record_cases(dataset_folder, target.name, raw.cases)
    return target


def _check_replaceable(folder: Path, configuration: str) -> None:
    """Refuses to replace a folder that holds, or is to hold, anything but preprocessed cases."""
    if folder.name == "gt_segmentations" or folder.name.startswith("oneshot_"):
        raise OneShotError(
            f"{folder}, which the plans name as the data_identifier of configuration {configuration}, is the place of "
            f"labels or registrations: give the configuration another data_identifier."
        )
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise OneShotError(
            f"{folder}, which the plans name as the data_identifier of configuration {configuration}, is no folder but "
            f"a {'link' if folder.is_symlink() else 'file'}, and is not replaced: remove it yourself, or give the "
            f"configuration another data_identifier."
        )
    foreign = [path.name for path in sorted(folder.iterdir()) if path.suffix not in _CASE_FILES or path.is_dir()]
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise OneShotError(
            f"{folder}, which the plans name as the data_identifier of configuration {configuration}, holds other "
            f"things than preprocessed cases ({shown}) and is not replaced: give the configuration another "
            f"data_identifier."
        )


@dataclass(frozen=True)
class _Target:
    """What all cases are preprocessed for; ``verbose`` lets nnU-Net's preprocessor talk."""

    folder: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    verbose: bool


def _preprocess_case(target: _Target, case: str, images: Sequence[str], label: str | None, is_atlas: bool) -> None:
    configuration, dataset_json = target.configuration, target.dataset_json
    output = str(Path(target.folder) / case)
    plans_manager = PlansManager(target.plans)
    configuration_manager = plans_manager.get_configuration(configuration)
    preprocessor = OneShotPreprocessor(verbose=target.verbose)
    try:
        with warnings.catch_warnings():
            if is_atlas:
                warnings.simplefilter("error", UnusableLabelWarning)
            preprocessor.run_case_save(output, list(images), label, plans_manager, configuration_manager, dataset_json)
        _check_written(output)
    except (OSError, RuntimeError, UnusableLabelWarning) as error:
        raise OneShotError(
            f"Case {case} could not be preprocessed for {configuration} ({error}). Make sure that "
            f"{Path(output).parent.parent} is writable and has space left, and that the case's files are intact."
        ) from error


class UnusableLabelWarning(UserWarning):
    """A label that is no atlas's cannot be used; the case is treated as unlabelled."""


def _usable_label(reader: BaseReaderWriter, path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The label (1, X, Y, Z), or None with a warning where it is unreadable or does not fit its image."""
    try:
        check_nifti(path)
        label, _ = reader.read_seg(path)
        if label.shape != (1, *shape):
            raise ValueError(f"its shape is {label.shape[1:]}, the image's is {tuple(shape)}")
        if not np.isfinite(label).all():
            raise ValueError("it holds NaN or infinite values")
        label = whole_labels(label)
        if not np.array_equal(label, np.rint(label)):
            raise ValueError("it holds values that are no whole numbers")
    # Readers raise whatever the underlying library raises.
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        warnings.warn(
            f"{path} cannot be used ({detail}): the case is treated as unlabelled.", UnusableLabelWarning, stacklevel=2
        )
        return None
    return label


def _no_locations(label_manager: LabelManager) -> dict[int | tuple[int, ...], list]:
    """Every class with no location: nnU-Net's data loader looks some up without asking whether they are there."""
    classes = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    names: list[int | tuple[int, ...]] = [tuple(c) if isinstance(c, (list, tuple)) else int(c) for c in classes]
    if label_manager.has_ignore_label:
        names.append((-1, *(int(label) for label in label_manager.all_labels)))
    return {name: [] for name in names}


def _check_written(output: str) -> None:
    """Raises when a compressed array cannot be read back: a full disk need not stop its writer."""
    import blosc2

    for suffix in (".b2nd", "_seg.b2nd"):
        array = blosc2.open(urlpath=output + suffix, mode="r")
        array[(slice(-1, None),) * array.ndim]
