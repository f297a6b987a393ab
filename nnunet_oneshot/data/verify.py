"""Checks of a raw data set: files first, then every image, then the labels that are used."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.data.headers import header_notes, is_nifti, is_sheared
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.structures import structures
from nnunet_oneshot.errors import OneShotError, listed

# Relative for spacings; absolute, as cosines, for directions: 0.1 is far beyond rounding, far below an exchanged axis.
_SPACING_TOLERANCE = 1e-3
_DIRECTION_TOLERANCE = 0.1
# Label values that a scaled header or a resampling moved by rounding are still the labels.
_LABEL_TOLERANCE = 1e-3
# How many times larger or smaller than the training images a new image may be without a warning.
_EXTENT_FACTOR = 3.0
_MOST_VOXELS = 4e9


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
        is_listed = "dataset" in raw.dataset_json
        place = f'"dataset" in {raw.folder / "dataset.json"} lists' if is_listed else f"{raw.folder / 'imagesTr'} holds"
        raise OneShotError(
            f"{place} {len(raw.cases)} training case(s), with files that end in {raw.file_ending}: at least 2 are "
            f"needed, one of them labelled. Add images, or correct dataset.json. Scans in other formats, such as DICOM,"
            f" become a data set by `nnunet_oneshot import`."
        )
    if not raw.labelled:
        raise OneShotError(
            f"{raw.name} has no label: {raw.folder / 'labelsTr'} holds no file named after one of its "
            f"{len(raw.cases)} cases, such as {raw.cases[0]}{raw.file_ending}. Label at least one case."
        )
    for case in raw.cases:
        absent = [path for path in raw.images(case) if not Path(path).is_file()]
        if absent:
            found = "is a link to nothing" if Path(absent[0]).is_symlink() else "does not exist or is no file"
            raise OneShotError(f"Case {case}: image file {absent[0]} {found}.")
        count = len(raw.images(case))
        if count > len(raw.channel_names):
            raise OneShotError(
                f"Case {case} has {count} image files, but dataset.json names {len(raw.channel_names)} channel(s) "
                f"{raw.channel_names}: remove the surplus files or declare the channels."
            )
    if unlabelled := sorted(set(raw.hidden_labels) - set(raw.labelled)):
        raise OneShotError(
            f"{raw.folder / 'dataset.json'} declares partial labels of {listed(unlabelled)}, which have no label: "
            f'add their labels, or remove them from "partial".'
        )
    raw.label_manager  # noqa: B018  (raises when the declared labels are not valid)
    return [*_count_note(raw), *_label_notes(raw)]


def _count_note(raw: RawDataset) -> list[str]:
    """Says how ``numTraining`` is understood."""
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


def _label_notes(raw: RawDataset) -> list[str]:
    """Names what looks like labels and is not used."""
    notes = []
    expected = {path for case in raw.cases if (path := raw.expected_label(case))}
    dangling = sorted(path for path in expected if os.path.islink(path) and not os.path.exists(path))
    if dangling:
        notes.append(f"{listed(dangling)} link to nothing: their cases count as unlabelled.")
    if "dataset" in raw.dataset_json:
        absent = sorted(path for path in expected - set(dangling) if not os.path.isfile(path))
        return [*notes, *([f"{listed(absent)} do not exist: their cases count as unlabelled."] if absent else [])]
    folder = raw.folder / "labelsTr"
    names = sorted(name for name in os.listdir(folder) if not name.startswith(".")) if folder.is_dir() else []
    unused = [str(folder / name) for name in names if str(folder / name) not in expected]
    if unused:
        notes.append(
            f"{listed(unused)} match no case and are not used: labels are named CASE{raw.file_ending}, such as "
            f"{raw.cases[0]}{raw.file_ending}."
        )
    return notes


def check_images(
    images: Mapping[str, Sequence[str]],
    reader_class: type,
    channel_names: Sequence[str],
    *,
    plans: Mapping[str, Any] | None = None,
    target_spacing: Sequence[float] = (),
) -> list[str]:
    """Reads and checks new images as training images are, before anything is made of them.

    Args:
        images: Case to its files, see `nnunet_oneshot.data.raw.find_images`.
        reader_class: nnU-Net's reader.
        channel_names: Names of the channels that the model or the data set has.
        plans: nnU-Net's plans, whose medians the images are compared with.
        target_spacing: Two or three voxel edges, mm, to which the plans' configuration resamples.

    Returns:
        Warnings.

    Raises:
        OneShotError: An image cannot be used; see `read_image`. Or nothing, or far too much, is left of it at the
            configuration's voxel size.
    """
    warnings = []
    for case, files in images.items():
        image = read_image(case, list(files), reader_class, list(channel_names))
        warnings += image.warnings
        if plans is not None:
            _check_resampled(case, image, plans, target_spacing)
            warnings += _extent_notes(case, image, plans)
    return warnings


def _check_resampled(case: str, image: CaseImage, plans: Mapping[str, Any], target_spacing: Sequence[float]) -> None:
    """Raises where an image has no voxel, or too many for any memory, once it is resampled."""
    axes = list(plans.get("transpose_forward", (0, 1, 2)))[3 - len(target_spacing) :]
    spacing = [float(edge) for edge in image.properties["spacing"]]
    sizes = [
        image.data.shape[1:][axis] * spacing[axis] / target for axis, target in zip(axes, target_spacing, strict=True)
    ]
    if sizes and (min(sizes) < 1 or math.prod(sizes) > _MOST_VOXELS):
        raise OneShotError(
            f"Case {case}: voxels of {_rounded(spacing)} mm make the image {_rounded(sizes)} voxels large at the "
            f"configuration's {_rounded(target_spacing)} mm, of which no segmentation can be made. Correct the voxel "
            f"size in its header, which must be in mm."
        )


def _extent_notes(case: str, image: CaseImage, plans: Mapping[str, Any]) -> list[str]:
    """Says that an image is far larger or smaller than the training images, which a wrong voxel size causes."""
    medians = [plans.get(f"original_median_{name}_after_transp") for name in ("spacing", "shape")]
    if any(not isinstance(median, list) or len(median) != 3 for median in medians):
        return []
    # Compared by size: the axes of new images may be stored in another order.
    usual = sorted(float(edge) * float(count) for edge, count in zip(*medians, strict=True))
    spacing = [float(edge) for edge in image.properties["spacing"]]
    found = sorted(edge * count for edge, count in zip(spacing, _occupied(image.data), strict=True))
    ratios = [max(a, b) / max(min(a, b), 1e-12) for a, b in zip(found, usual, strict=True)]
    if max(ratios) <= _EXTENT_FACTOR:
        return []
    return [
        f"Case {case}: the image measures {_rounded(found)} mm with voxels of {_rounded(spacing)} mm; the training "
        f"images measure {_rounded(usual)} mm (median, axes by size). If the voxel size in its header is wrong, "
        f"correct it: the labels would be wrong too."
    ]


def _occupied(data: np.ndarray) -> list[int]:
    """Voxels along each axis of the box that nnU-Net's cropping to nonzero voxels keeps."""
    present = (data != 0).any(0)
    sizes = []
    for axis in range(present.ndim):
        places = np.flatnonzero(present.any(axis=tuple(other for other in range(present.ndim) if other != axis)))
        sizes.append(int(places[-1] - places[0] + 1) if places.size else present.shape[axis])
    return sizes


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
        warnings += header_notes(path, found)
        parts.append(data)
        properties.append(found)
    data = np.concatenate(parts)
    if len(data) != len(channel_names):
        raise OneShotError(
            f"Case {case} has {len(data)} channel(s) in {', '.join(files)}, but dataset.json names "
            f"{len(channel_names)}: {channel_names}. Add the missing files or correct channel_names."
        )
    if min(data.shape[2:]) < 2:
        raise OneShotError(
            f"Case {case}: {', '.join(files)} has the shape {data.shape[1:]}, one voxel along an axis: at least 2 are "
            f"needed, except along the first axis, where one slice may lie. Replace it or remove the case."
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
    if len(label) != 1:
        raise OneShotError(
            f"Case {case}: the label {path} has {len(label)} channels, such as colours: expected one, whose values are "
            f"the numbers of the labels. Save it in grey values, without colours or a palette."
        )
    if label.shape[1:] != image.data.shape[1:]:
        raise OneShotError(
            f"Case {case}: shape {label.shape[1:]} of the label {path} differs from shape {image.data.shape[1:]} of "
            f"the image: draw or resample the label on the image's grid."
        )
    warnings = _compare_geometry(case, properties, path, image.properties, raw.images(case)[0])
    warnings += header_notes(path, properties)
    manager = raw.label_manager
    whole = declared_labels(label, manager, f"Case {case}: the label {path}")
    if not np.array_equal(whole, label):
        # nnU-Net cuts decimals off where it stores labels, so that 0.9999 would become 0.
        raise OneShotError(
            f"Case {case}: the label {path} holds values that are no whole numbers, such as "
            f"{float(label[whole != label][0]):.6g}, most often because its header scales them: save it as whole "
            f"numbers, without scaling."
        )
    hidden = set(raw.hidden_labels.get(case, ()))
    present = {float(value) for value in np.unique(label)}
    if surplus := sorted(value for value in hidden if value in present):
        raise OneShotError(
            f'Case {case}: the label {path} holds the values {surplus}, which "oneshot" in dataset.json declares as '
            f'not shown: list all structures that it shows under "partial", or correct the label.'
        )
    if not present - {0, manager.ignore_label}:
        raise OneShotError(f"Case {case}: the label {path} is empty (background only). Label it or name another atlas.")
    for name, values in structures(raw.dataset_json).items():
        members = set(values) if isinstance(values, (list, tuple)) else {values}
        if not members & (present | hidden):
            warnings.append(
                f"The label of case {case} has no voxel of {name!r} ({sorted(members)}): what the atlas does not show "
                f"cannot be learned from it."
            )
    return label, warnings


def declared_labels(label: np.ndarray, label_manager: Any, what: str) -> np.ndarray:
    """A label map whose values are whole numbers and declared.

    Args:
        label: As read.
        label_manager: nnU-Net's, of ``dataset.json``.
        what: What the label is, with its file, the beginning of the error.

    Raises:
        OneShotError: A value is no whole number within 1e-3, or not declared.
    """
    declared = {int(value) for value in label_manager.all_labels}
    if label_manager.has_ignore_label:
        declared.add(int(label_manager.ignore_label))
    whole = whole_labels(label)
    unexpected = sorted({float(value) for value in np.unique(whole)} - declared)
    if unexpected:
        values = listed(_plain(value) for value in unexpected)
        raise OneShotError(
            f"{what} holds values [{values}] that dataset.json does not declare ({sorted(declared)}): declare "
            f"them or correct the label."
        )
    return whole


def whole_labels(label: np.ndarray) -> np.ndarray:
    """A label map in which values within 1e-3 of a whole number are that number; others stay as they are."""
    if label.dtype.kind in "iub":
        return label
    rounded = np.rint(label)
    return np.where(np.abs(label - rounded) <= _LABEL_TOLERANCE, rounded, label)


def check_nifti(path: str) -> None:
    """Raises an error for what SimpleITK hides in NIfTI files: it puts 0 for missing bytes, NaN and infinity."""
    if not is_nifti(path):
        return
    import nibabel

    # Any: what nibabel declares to return is any file's content, which need not have an array.
    image: Any = nibabel.load(path)
    axes = np.asarray(image.affine)[:3, :3]
    if not np.isfinite(image.affine).all() or not np.linalg.norm(axes, axis=0).all():
        raise ValueError("the sform or qform in its header gives an axis no direction")
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
        if sheared_nifti(path):
            raise OneShotError(
                f"Case {case}: the axes of {path} are sheared, not perpendicular, which {reader_class.__name__} does "
                f'not read. Resample the file onto perpendicular axes, or set "overwrite_image_reader_writer": '
                f'"NibabelIO" in dataset.json.'
            ) from error
        raise OneShotError(
            f"Case {case}: {path} cannot be read ({detail_of(error)}). The file is truncated, damaged or not of its "
            f"suffix's format: replace it or remove the case."
        ) from error


def detail_of(error: BaseException) -> str:
    """The last line of what a library says of its failure, or the failure's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def sheared_nifti(path: str) -> bool:
    """Whether a file is complete NIfTI whose axes are not perpendicular."""
    if not is_nifti(path):
        return False
    import nibabel

    try:
        check_nifti(path)
        image: Any = nibabel.load(path)
        return is_sheared(image.affine)
    # As above: it cannot be read, whatever else it is.
    except Exception:
        return False


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
        # What the array follows: files in different orders are alike once they are reoriented.
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        cosines = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
        return {"direction": cosines.ravel().tolist(), "origin": affine[:3, 3].tolist()}
    return {}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]
