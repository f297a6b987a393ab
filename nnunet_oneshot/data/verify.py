"""Checks of a raw data set: files first, then every image, then the labels that are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.errors import OneShotError

# Relative for spacings; absolute, as cosines, for directions: 0.1 is far beyond rounding, far below an exchanged axis.
_SPACING_TOLERANCE = 1e-3
_DIRECTION_TOLERANCE = 0.1


@dataclass(frozen=True)
class CaseImage:
    """One case as read from its files.

    Attributes:
        data: (C, X, Y, Z) float32, in the reader's axis order.
        properties: The reader's properties; ``spacing`` is in mm, in the order of the array's axes.
        warnings: What differs between the channels' headers without being an error.
    """

    data: np.ndarray
    properties: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def check_files(raw: RawDataset) -> list[str]:
    """Checks what can be seen without opening images: that there are labels, and channels for every case.

    Returns:
        Notes for the user.

    Raises:
        OneShotError: Something is missing.
    """
    if len(raw.cases) < 2:
        raise OneShotError(
            f"{raw.folder} has {len(raw.cases)} training case(s): at least 2 are needed, one of them labelled."
        )
    if not raw.labelled:
        raise OneShotError(
            f"{raw.name} has no label: {raw.folder / 'labelsTr'} holds no file named after one of its "
            f"{len(raw.cases)} cases, such as {raw.cases[0]}{raw.file_ending}. Label at least one case."
        )
    for case in raw.cases:
        absent = [path for path in raw.images(case) if not Path(path).is_file()]
        if absent:
            raise OneShotError(f"Case {case}: image file {absent[0]} does not exist.")
        count = len(raw.images(case))
        if count > len(raw.channel_names):
            raise OneShotError(
                f"Case {case} has {count} image files, but dataset.json names {len(raw.channel_names)} channel(s) "
                f"{raw.channel_names}: remove the surplus files or declare the channels."
            )
    raw.label_manager  # noqa: B018  (raises when the declared labels are not valid)
    declared = raw.dataset_json.get("numTraining")
    if declared == len(raw.cases):
        return []
    if declared is None or declared == len(raw.labelled):
        counted = "is missing" if declared is None else f"= {declared} counts labelled cases only"
        return [f"numTraining in dataset.json {counted}: {len(raw.cases)} training images are used."]
    raise OneShotError(
        f"numTraining in {raw.folder / 'dataset.json'} is {declared!r}, but there are {len(raw.cases)} training "
        f"images, {len(raw.labelled)} of them labelled: set it to {len(raw.cases)}, or add the files that are missing."
    )


def read_image(case: str, files: list[str], reader_class: type, channel_names: list[str]) -> CaseImage:
    """Reads and checks the image of a case.

    Raises:
        OneShotError: A file is unreadable or incomplete, channels disagree or are not as many as declared, or values
            are not finite.
    """
    parts: list[np.ndarray] = []
    properties: list[dict[str, Any]] = []
    warnings: list[str] = []
    for path in files:
        data, found = _read(case, path, reader_class)
        if parts and data.shape[1:] != parts[0].shape[1:]:
            raise OneShotError(
                f"Case {case}: shape {data.shape[1:]} of {path} differs from shape {parts[0].shape[1:]} of {files[0]}: "
                f"all channels of a case must lie on one grid."
            )
        if properties:
            warnings += _compare_geometry(case, found, path, properties[0], files[0])
        parts.append(data)
        properties.append(found)
    data = np.concatenate(parts)
    if len(data) != len(channel_names):
        raise OneShotError(
            f"Case {case} has {len(data)} channel(s) in {', '.join(files)}, but dataset.json names "
            f"{len(channel_names)}: {channel_names}. Add the missing files or correct channel_names."
        )
    if all(channel.min() == channel.max() for channel in data):
        raise OneShotError(f"Case {case}: every voxel of {', '.join(files)} has the same value. Replace or remove it.")
    return CaseImage(data=data, properties=properties[0], warnings=warnings)


def read_label(raw: RawDataset, case: str, image: CaseImage) -> tuple[np.ndarray, list[str]]:
    """Reads and checks the label of a case against its image and ``dataset.json``.

    Returns:
        The label, (1, X, Y, Z), and warnings.

    Raises:
        OneShotError: The label is unreadable, empty, on another grid than the image or holds undeclared values.
    """
    path = raw.label(case)
    if path is None:
        raise OneShotError(
            f"Case {case} of {raw.name} has no label, so it cannot be the atlas. Labelled: {', '.join(raw.labelled)}."
        )
    label, properties = _read(case, path, raw.reader_class)
    if label.shape[1:] != image.data.shape[1:] or len(label) != 1:
        raise OneShotError(
            f"Case {case}: shape {label.shape[1:]} of the label {path} differs from shape {image.data.shape[1:]} of "
            f"the image: draw or resample the label on the image's grid."
        )
    warnings = _compare_geometry(case, properties, path, image.properties, raw.images(case)[0])
    present = {float(value) for value in np.unique(label)}
    manager = raw.label_manager
    declared = {int(value) for value in manager.all_labels}
    if manager.has_ignore_label:
        declared.add(int(manager.ignore_label))
    unexpected = sorted(present - declared)
    if unexpected:
        raise OneShotError(
            f"Case {case}: the label {path} holds values {[_plain(value) for value in unexpected]} that dataset.json "
            f"does not declare ({sorted(declared)}): declare them or correct the label."
        )
    if not present - {0, manager.ignore_label}:
        raise OneShotError(f"Case {case}: the label {path} is empty (background only). Label it or name another atlas.")
    for name, values in raw.dataset_json["labels"].items():
        members = set(values) if isinstance(values, (list, tuple)) else {values}
        if name not in ("background", "ignore") and not members & present:
            warnings.append(
                f"The label of case {case} has no voxel of {name!r} ({sorted(members)}): what the atlas does not show "
                f"cannot be learned from it."
            )
    return label, warnings


def check_nifti(path: str) -> None:
    """Raises an error for what SimpleITK hides in NIfTI files: it puts 0 for missing bytes, NaN and infinity."""
    if not path.lower().endswith((".nii", ".nii.gz")):
        return
    import nibabel

    # Any: what nibabel declares to return is any file's content, which need not have an array.
    image: Any = nibabel.load(path)
    stored = image.dataobj.get_unscaled()
    if stored.dtype.kind == "f" and (count := int(np.count_nonzero(~np.isfinite(stored)))):
        raise NotFiniteError(f"{count} voxels are NaN or infinite")


class NotFiniteError(ValueError):
    """An image holds NaN or infinite values."""


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _read(case: str, path: str, reader_class: type) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads one file with nnU-Net's reader, which does not notice every kind of damage itself."""
    try:
        check_nifti(path)
        data, properties = reader_class().read_images([path])
        if count := int(np.count_nonzero(~np.isfinite(data))):
            raise NotFiniteError(f"{count} voxels are NaN or infinite")
        return data, properties
    except NotFiniteError as error:
        raise OneShotError(
            f"Case {case}: {error} in {path}. Replace them, for example with the value of air, or 0 in a label."
        ) from error
    # Readers raise whatever the underlying library raises, from RuntimeError to zlib.error.
    except Exception as error:
        detail = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise OneShotError(
            f"Case {case}: {path} cannot be read ({detail}). The file is truncated, damaged or not of its suffix's "
            f"format: replace it or remove the case."
        ) from error


def _compare_geometry(case: str, found: dict, path: str, reference: dict, reference_path: str) -> list[str]:
    """Compares spacing, direction and origin of two files of a case."""
    if not np.allclose(found["spacing"], reference["spacing"], rtol=_SPACING_TOLERANCE, atol=0):
        raise OneShotError(
            f"Case {case}: spacing {_rounded(found['spacing'])} mm of {path} differs from "
            f"{_rounded(reference['spacing'])} mm of {reference_path}. Correct the header or resample the file."
        )
    warnings = []
    for name, values in _frame(found).items():
        other = _frame(reference).get(name)
        if other is None or len(other) != len(values):
            continue
        difference = float(np.max(np.abs(np.subtract(values, other))))
        if name == "direction" and difference > _DIRECTION_TOLERANCE:
            raise OneShotError(
                f"Case {case}: direction {_rounded(values)} of {path} differs from {_rounded(other)} of "
                f"{reference_path}: the axes point elsewhere. Reorient the file, or, where the arrays do agree, copy "
                f"the image's header to it."
            )
        if not np.allclose(values, other, rtol=1e-4, atol=1e-2):
            warnings.append(
                f"Case {case}: {name} {_rounded(values)} of {path} differs from {_rounded(other)} of {reference_path}: "
                f"make sure that the two files overlap (nnUNetv2_plot_overlay_pngs shows it)."
            )
    return warnings


def _frame(properties: dict) -> dict[str, list[float]]:
    """Direction cosines and origin (mm) as nnU-Net's readers store them."""
    if "sitk_stuff" in properties:
        stored = properties["sitk_stuff"]
        return {"direction": list(stored["direction"]), "origin": list(stored["origin"])}
    if "nibabel_stuff" in properties:
        affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
        cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        return {"direction": cosines.ravel().tolist(), "origin": affine[:3, 3].tolist()}
    return {}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]
