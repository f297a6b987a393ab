"""Scans as people have them: volumes in files of many formats and DICOM series, in a folder and in those below it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.data.image_folder import channels_of
from nnunet_oneshot.data.verify import check_nifti, detail_of
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import load_json_checked

# What SimpleITK reads, and FreeSurfer's formats, which nibabel reads.
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr", ".mgz", ".mgh")
_FREESURFER = (".mgz", ".mgh")
_MODALITY, _SERIES_NUMBER, _POSITION, _ORIENTATION = "0008|0060", "0020|0011", "0020|0032", "0020|0037"
# DICOM objects that are no images of a patient's inside.
_NO_IMAGES = ("SEG", "RTSTRUCT", "RTDOSE", "RTPLAN", "PR", "KO", "SR", "DOC", "REG", "FID")
# Of the distance between slices.
_UNEVEN, _TILT = 0.1, 0.02
_UNSAFE = re.compile(r"[^A-Za-z0-9-]+")


@dataclass(frozen=True)
class Scan:
    """An image as it lies on the disk.

    Attributes:
        name: Name of its case, made of its path below the folder.
        channels: The files of each channel: one, or the slices of a DICOM series in order.
        modality: DICOM's, such as ``CT``; None for other formats.
    """

    name: str
    channels: tuple[tuple[str, ...], ...]
    modality: str | None = None

    @property
    def source(self) -> str:
        """Where it was found: its file, or the folder of its series."""
        first = self.channels[0][0]
        return first if self.modality is None else str(Path(first).parent)


def find_scans(folder: str | os.PathLike, *, without: Sequence[str] = ()) -> list[Scan]:
    """The scans in a folder and in those below it, sorted by name.

    Files named CASE_0000, CASE_0001, ... are the channels of one scan where all files are named so.

    Args:
        folder: The folder.
        without: Files that are no scans, such as labels.

    Raises:
        OneShotError: There is no such folder, no scan in it, or it is a data set in a format of nnU-Net already.
    """
    folder = Path(folder)
    _check_folder(folder)
    passed_over = {os.path.realpath(path) for path in without}
    stems: dict[str, str] = {}
    found = []
    for directory, names in _folders(folder):
        names = [name for name in names if os.path.realpath(directory / name) not in passed_over]
        volumes = [name for name in names if volume_suffix(name)]
        for name in volumes:
            stem = str(directory.relative_to(folder) / name[: -len(volume_suffix(name) or "")])
            if stem in stems:
                raise OneShotError(f"{stems[stem]} and {directory / name} have one name: move one out of {folder}.")
            stems[stem] = str(directory / name)
        if len(volumes) < len(names):
            found += _series(directory, list(directory.relative_to(folder).parts) or [folder.resolve().name])
    grouped = channels_of(list(stems)) or {stem: [stem] for stem in stems}
    found += [Scan(_name(Path(case).parts), tuple((stems[part],) for part in parts)) for case, parts in grouped.items()]
    if not found:
        raise OneShotError(
            f"{folder} and the folders in it hold no scan: expected DICOM series, or files that end in "
            f"{', '.join(VOLUME_SUFFIXES)}."
        )
    named: dict[str, list[Scan]] = {}
    for scan in found:
        named.setdefault(scan.name, []).append(scan)
    for name, scans in named.items():
        if len(scans) > 1:
            raise OneShotError(
                f"{' and '.join(scan.source for scan in scans[:2])} would both become the case {name}: rename one, or "
                f"move it out of {folder}."
            )
    return [named[name][0] for name in sorted(named)]


def read_scan(files: Sequence[str]) -> sitk.Image:
    """Reads one channel of a scan.

    Args:
        files: A file, or the slices of a DICOM series in order.

    Returns:
        A volume with three axes and one value a voxel.

    Raises:
        OneShotError: It cannot be read, or it is no such volume; the message begins with the path.
    """
    path = files[0] if len(files) == 1 else str(Path(files[0]).parent)
    try:
        image = _read(files)
        problem = _problem(image) or (_slices_problem(files) if len(files) > 1 else "")
    # Readers raise whatever the underlying library raises.
    except Exception as error:
        raise OneShotError(f"{path} cannot be read ({detail_of(error)}).") from error
    if problem:
        raise OneShotError(f"{path} {problem}.")
    return image[..., 0] if image.GetDimension() == 4 else image


def modality_of(path: str) -> str | None:
    """The modality of a DICOM file, such as ``CT``, or None where the file is none."""
    return _tags(path, _MODALITY).get(_MODALITY)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise OneShotError(f"{folder} is not a folder: name the one that holds the scans.")
    description = folder / "dataset.json"
    if not description.is_file():
        return
    content = load_json_checked(description, "the data set's description", dict)
    if "file_ending" in content:
        raise OneShotError(
            f"{folder} is a data set in nnU-Net's format already: lay it into nnUNet_raw, and go on with "
            f"`nnunet_oneshot plan_and_preprocess`."
        )
    if "training" in content:
        raise OneShotError(
            f"{folder} is a data set in the format of the Medical Segmentation Decathlon: convert it with "
            f"`nnUNetv2_convert_MSD_dataset -i {folder}` (one of the first nnU-Net: "
            f"`nnUNetv2_convert_old_nnUNet_dataset`)."
        )


def _folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(directory), sorted(name for name in names if not name.startswith("."))


def volume_suffix(name: str) -> str | None:
    """The suffix of `VOLUME_SUFFIXES` that a file's name ends in, in its own letter case."""
    found = next((suffix for suffix in VOLUME_SUFFIXES if name.lower().endswith(suffix)), None)
    return None if found is None else name[-len(found) :]


def _series(directory: Path, parts: list[str]) -> list[Scan]:
    """The DICOM series of one directory, without single slices and objects that are no images."""
    found = []
    for identifier in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(directory)):
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(directory), identifier)
        tags = _tags(files[0], _MODALITY, _SERIES_NUMBER)
        if tags and tags.get(_MODALITY) not in _NO_IMAGES:
            found.append((tags.get(_SERIES_NUMBER, identifier), files, tags.get(_MODALITY, "")))
    alone = len(found) == 1
    return [
        Scan(_name(parts if alone else [*parts, f"s{number}"]), (tuple(files),), modality)
        for number, files, modality in found
    ]


def _tags(path: str, *wanted: str) -> dict[str, str]:
    """The wanted tags that a DICOM file holds; none where it holds no image."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return {}
    return {tag: reader.GetMetaData(tag).strip() for tag in wanted if reader.HasMetaDataKey(tag)}


def _name(parts: Sequence[str]) -> str:
    """A name that nnU-Net and every file system takes."""
    return "_".join(word for part in parts if (word := _UNSAFE.sub("_", part).strip("_-"))) or "scan"


def _read(files: Sequence[str]) -> sitk.Image:
    if len(files) > 1:
        return sitk.ReadImage(list(files))
    if files[0].lower().endswith(_FREESURFER):
        return _freesurfer(files[0])
    check_nifti(files[0])
    return sitk.ReadImage(files[0])


def _freesurfer(path: str) -> sitk.Image:
    import nibabel

    # Any: stubs do not know the class of what is loaded.
    volume: Any = nibabel.load(path)
    array = np.asarray(volume.dataobj)
    # The format keeps the other order of bytes.
    array = array.astype(array.dtype.newbyteorder("="))
    image = sitk.GetImageFromArray(array.T)
    edges = np.linalg.norm(volume.affine[:3, :3], axis=0)
    # NIfTI counts from left to right and from back to front, ITK the other way.
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing([*edges.tolist(), *[1.0] * (array.ndim - 3)])
    if array.ndim == 3:
        image.SetDirection((flip @ volume.affine[:3, :3] / edges).ravel().tolist())
        image.SetOrigin((flip @ volume.affine[:3, 3]).tolist())
    return image


def _problem(image: sitk.Image) -> str:
    """Why an image is no volume with one value a voxel, a clause; empty where it is one."""
    size, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if components > 1:
        return f"holds {components} values a voxel, such as colours: save one volume for each channel"
    if len(size) == 4 and size[3] > 1:
        return f"is a series of {size[3]} volumes: save each as a file of its own, or CASE_0000, CASE_0001 as channels"
    if len(size) < 3 or min(size[:3]) < 2:
        return f"has the size {size}, which is no volume"
    return ""


def _slices_problem(files: Sequence[str]) -> str:
    """Why the slices of a DICOM series make no regular volume, a clause; empty where they do."""
    tags = [_tags(file, _POSITION, _ORIENTATION) for file in files]
    if not all(len(found) == 2 for found in tags):
        return "has slices that do not say where they lie: convert it with dcm2niix"
    axes = np.array([_numbers(found[_ORIENTATION]) for found in tags])
    if np.ptp(axes, axis=0).max() > 1e-3:
        return "has slices in different directions, as a localiser has: keep one direction in a folder"
    normal = np.cross(axes[0, :3], axes[0, 3:])
    steps = np.diff([_numbers(found[_POSITION]) for found in tags], axis=0)
    along = np.abs(steps @ normal)
    distance = float(np.median(along))
    if along.min() < _UNEVEN * max(distance, 1e-3):
        return "holds several slices at one place: it is more than one volume; split it, for example with dcm2niix"
    if np.ptp(along) > _UNEVEN * distance:
        return (
            f"has slices {along.min():.2f} to {along.max():.2f} mm apart: one is missing, or their distance changes; "
            f"complete the series, or convert it with dcm2niix"
        )
    if np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max() > _TILT * distance:
        return "was taken with a tilted gantry: convert it with dcm2niix, which corrects the tilt"
    return ""


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split("\\")]
