"""A label as annotation tools write it, brought onto the grid and the values that nnU-Net expects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.data.scans import modality_of, read_scan
from nnunet_oneshot.data.verify import whole_labels
from nnunet_oneshot.errors import OneShotError, listed

# 3D Slicer notes its segments so in the header of a .seg.nrrd file.
_SEGMENT = re.compile(r"Segment(\d+)_LabelValue")
# Of a voxel.
_OFF_GRID = 0.05


def read_drawn_label(path: str, image: sitk.Image, image_path: str) -> tuple[sitk.Image, dict[int, str]]:
    """Reads a label and lays it onto the grid of its image.

    A label that covers a part of the image, voxel for voxel, as 3D Slicer saves it, is filled up with background.

    Args:
        path: Label map in a format that SimpleITK reads, or DICOM-SEG where ``highdicom`` is installed.
        image: The image that it was drawn on.
        image_path: Where that lies, for errors.

    Returns:
        The label (int16) and the names that the file gives to its values.

    Raises:
        OneShotError: It cannot be read, holds no whole numbers, is empty, or lies on other voxels.
    """
    if modality_of(path) == "SEG":
        from nnunet_oneshot.data.dicom_seg import read_dicom_seg

        label, names = read_dicom_seg(path)
    else:
        label = read_scan([path])
        names = _segment_names(label)
    values = whole_labels(sitk.GetArrayFromImage(label))
    whole = values.astype(np.int16, casting="unsafe")
    if not np.array_equal(whole, values):
        raise OneShotError(f"The label {path} holds values that are no numbers of labels: save it as a label map.")
    if not whole.any():
        raise OneShotError(f"The label {path} is empty (background only): give the label that was drawn.")
    drawn = sitk.GetImageFromArray(whole)
    drawn.CopyInformation(label)
    return on_grid(drawn, image, path, image_path), names


def renumbered(
    labels: Sequence[np.ndarray], found: Mapping[int, str], names: Sequence[str] | None
) -> tuple[dict[int, int], dict[str, int]]:
    """Consecutive numbers, which nnU-Net needs, for the values of labels.

    Args:
        labels: Label maps of any shape.
        found: Names that their files give to values.
        names: Names that the user gives, in order of the values; None takes those found.

    Returns:
        Value in the files to number, and ``labels`` of ``dataset.json``.

    Raises:
        OneShotError: There are more or fewer names than values, or one twice.
    """
    values = sorted({int(value) for label in labels for value in np.unique(label)} - {0})
    if min(values) < 0:
        raise OneShotError(f"The labels hold the values {listed(values)}: expected 0 for background and numbers above.")
    if names is None:
        names = [found.get(value) or f"label_{value}" for value in values]
    if len(names) != len(values):
        raise OneShotError(
            f"--labels gives {len(names)} names, but the labels hold {len(values)} values besides 0 "
            f"({listed(values)}): give one name for each, in this order."
        )
    if len({"background", *names}) <= len(names):
        raise OneShotError(f"The labels are named {listed(names)}: each needs a name of its own, not background.")
    return (
        {value: number for number, value in enumerate(values, 1)},
        {"background": 0, **{name: number for number, name in enumerate(names, 1)}},
    )


def _segment_names(label: sitk.Image) -> dict[int, str]:
    matches = [match for key in label.GetMetaDataKeys() if (match := _SEGMENT.fullmatch(key))]
    return {
        int(label.GetMetaData(match[0])): label.GetMetaData(f"Segment{match[1]}_Name").strip()
        for match in matches
        if label.HasMetaDataKey(f"Segment{match[1]}_Name")
    }


def on_grid(label: sitk.Image, image: sitk.Image, path: str, image_path: str) -> sitk.Image:
    """The label on the image's grid, whose voxels it must share; its axes may lie in another order or direction.

    Args:
        label: Label map.
        image: An image.
        path: Where the label lies, for the error.
        image_path: What the image is, for the error.

    Raises:
        OneShotError: It lies on other voxels, or reaches beyond the image.
    """
    last = np.array(label.GetSize()) - 1
    # The first voxel, and the last one along each axis.
    corners = [np.zeros(3, int), *(last * axis for axis in np.eye(3, dtype=int))]
    places = np.array(
        [
            image.TransformPhysicalPointToContinuousIndex(label.TransformIndexToPhysicalPoint(corner.tolist()))
            for corner in corners
        ]
    )
    whole = np.rint(places).astype(int)
    steps = np.sort(np.abs(whole[1:] - whole[0]), axis=1)
    if np.abs(places - whole).max() > _OFF_GRID or not np.array_equal(steps, [[0, 0, size] for size in last]):
        raise OneShotError(
            f"The label {path} (size {label.GetSize()}, spacing {_rounded(label.GetSpacing())} mm) does not lie on the "
            f"voxels of {image_path} (size {image.GetSize()}, spacing {_rounded(image.GetSpacing())} mm): draw it on "
            f"this scan, or resample it onto it."
        )
    if whole.min() < 0 or np.any(whole.max(axis=0) >= image.GetSize()):
        raise OneShotError(
            f"The label {path} (size {label.GetSize()}) reaches beyond {image_path} (size {image.GetSize()}): give the "
            f"label of this scan."
        )
    # Nearest neighbour on shared voxels copies them.
    return sitk.Resample(label, image, sitk.Transform(), sitk.sitkNearestNeighbor, 0)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
