"""Image files as arrays with their place in the scanner's space.

Vocabulary:
    voxel coordinates: float index coordinates in array axis order (z, y, x), the reverse of SimpleITK's.
    frame: (4, 4) matrix, voxel coordinates -> mm in the patient space of the file (LPS, as in SimpleITK), components
        in the order (z, y, x) too, so that matrices compose. 2D images have a first axis of one voxel of 1 mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.data.headers import header_notes
from nnunet_oneshot.data.verify import check_nifti, detail_of, sheared_nifti, whole_labels
from nnunet_oneshot.errors import OneShotError

# Slices whose normals differ by more than about 10 degrees do not show the same plane.
_PARALLEL = 0.985


@dataclass(frozen=True)
class Volume:
    """An image as read from its files.

    Attributes:
        paths: One file a channel, or one file of all channels.
        array: (C, Z, Y, X) float32; (C, 1, Y, X) for 2D.
        frame: (4, 4), see the module.
        image: The first file as SimpleITK read it, for its geometry.
        warnings: What is contradictory in the headers of the files.
    """

    paths: tuple[str, ...]
    array: np.ndarray
    frame: np.ndarray
    image: sitk.Image
    warnings: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        """2 or 3, the number of axes of the file."""
        return self.image.GetDimension()

    @property
    def shape(self) -> tuple[int, ...]:
        """(Z, Y, X)."""
        return tuple(self.array.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """3 voxel edges, mm."""
        return tuple(np.linalg.norm(self.frame[:3, :3], axis=0).tolist())

    @property
    def centre(self) -> np.ndarray:
        """(4,) homogeneous voxel coordinates of the middle."""
        return np.array([*((n - 1) / 2 for n in self.shape), 1.0])

    def as_image(self, array: np.ndarray, *, is_vector: bool = False) -> sitk.Image:
        """An array on this grid, (Z, Y, X) or (Z, Y, X, components), as a SimpleITK image."""
        image = sitk.GetImageFromArray(array[0] if self.dimension == 2 else array, isVector=is_vector)
        image.CopyInformation(self.image)
        return image


def read_volume(files: str | Sequence[str], role: str) -> Volume:
    """Reads an image of one or several channels.

    Args:
        files: One path; paths joined by commas, one a channel; or a list of paths.
        role: What the image is, for errors, such as ``"fixed"``.

    Raises:
        OneShotError: A file is missing, unreadable, not finite, neither 2D nor 3D, constant, or on another
            grid than the first.
    """
    if isinstance(files, str):
        files = [files] if Path(files).exists() else [part.strip() for part in files.split(",") if part.strip()]
    if not files:
        raise OneShotError(f"No file of the {role} image is given.")
    first = _read(files[0], f"{role} image")
    channels, warnings = [_array(first)], _header_notes(files[0], first)
    for path in files[1:]:
        image = _read(path, f"{role} image")
        if difference := _grid_difference(image, first):
            raise OneShotError(
                f"{path}: {difference} of {files[0]}. All channels of the {role} image must lie on one grid."
            )
        channels.append(_array(image))
        warnings += _header_notes(path, image)
    array = np.concatenate(channels)
    if (
        array.shape[1] == 1
        and min(array.shape[2:]) < 2
        or array.shape[1] > 1
        and min(array.shape) == 1 != array.shape[0]
    ):
        raise OneShotError(
            f"{files[0]} has size {first.GetSize()}: at least 2 pixels an axis are needed, or one slice along the last."
        )
    if all(channel.min() == channel.max() for channel in array):
        raise OneShotError(
            f"Every voxel of the {role} image {', '.join(map(str, files))} has the same value: there is nothing to "
            f"register. Give another image."
        )
    return Volume(tuple(str(path) for path in files), array, _frame(first), first, tuple(warnings))


def read_labels(path: str, volume: Volume) -> tuple[np.ndarray, np.dtype]:
    """Reads the label map of a volume.

    Returns:
        The labels (1, Z, Y, X) int64, and the data type of the file.

    Raises:
        OneShotError: The file is missing, unreadable, empty, on another grid, or holds values that are no whole
            numbers.
    """
    image = _read(path, "label map")
    if difference := _grid_difference(image, volume.image):
        raise OneShotError(
            f"{path}: {difference} of the moving image {volume.paths[0]}. Labels must be drawn on the grid of the "
            f"moving image: resample them onto it."
        )
    array = _array(image, dtype=None)
    if len(array) != 1:
        raise OneShotError(
            f"{path} has {len(array)} channels, such as colours: expected one label map. Save it in grey values, "
            f"without colours or a palette."
        )
    labels = whole_labels(array)
    if not np.array_equal(labels, np.rint(labels)):
        raise OneShotError(f"{path} holds values that are no whole numbers: expected a label map.")
    if not labels.any():
        raise OneShotError(f"{path} is empty (background only): give the labels of the moving image.")
    return labels.astype(np.int64), sitk.GetArrayViewFromImage(image).dtype


def header_alignment(fixed: Volume, moving: Volume) -> tuple[np.ndarray, bool]:
    """The map fixed voxel -> moving voxel that the headers imply.

    Where the middle of neither image lies in the other, positions are taken to be arbitrary: then the middles are laid
    on each other and only the orientation comes from the headers.

    Returns:
        The map (4, 4), and whether the headers gave the position too.

    Raises:
        OneShotError: The two are single slices of different planes.
    """
    matrix = np.linalg.inv(moving.frame) @ fixed.frame
    if fixed.shape[0] == 1:
        normals = fixed.frame[:3, 0] / fixed.spacing[0], moving.frame[:3, 0] / moving.spacing[0]
        if abs(float(np.dot(*normals))) < _PARALLEL:
            raise OneShotError(
                f"{fixed.paths[0]} and {moving.paths[0]} are single slices of different planes, which do not show the "
                f"same anatomy: give volumes, or slices that are parallel."
            )
        matrix[0], matrix[:, 0] = (1, 0, 0, 0), (1, 0, 0, 0)
    if _inside(matrix @ fixed.centre, moving) or _inside(np.linalg.inv(matrix) @ moving.centre, fixed):
        return matrix, True
    matrix[:3, 3] += (moving.centre - matrix @ fixed.centre)[:3]
    return matrix, False


def _inside(point: np.ndarray, volume: Volume) -> bool:
    return bool(np.all(point[:3] >= -0.5) and np.all(point[:3] <= np.array(volume.shape) - 0.5))


def _read(path: str, role: str) -> sitk.Image:
    if not Path(path).is_file():
        raise OneShotError(f"The {role} {path} does not exist: expected an image file such as case_0000.nii.gz.")
    try:
        image = sitk.ReadImage(str(path))
        check_nifti(str(path))
        finite = bool(np.isfinite(sitk.GetArrayViewFromImage(image)).all())
    except Exception as error:
        # Libraries raise whatever they like here, from RuntimeError to zlib.error.
        if sheared_nifti(str(path)):
            raise OneShotError(
                f"The axes of the {role} {path} are sheared, not perpendicular, which SimpleITK does not read: "
                f"resample the file onto perpendicular axes."
            ) from error
        raise OneShotError(
            f"The {role} {path} cannot be used ({detail_of(error)}): it must be a complete image in a format that "
            f"SimpleITK reads, without NaN or infinite values."
        ) from error
    if not finite:
        raise OneShotError(f"The {role} {path} holds NaN or infinite values: replace them, for example by that of air.")
    if image.GetDimension() not in (2, 3):
        raise OneShotError(
            f"The {role} {path} has {image.GetDimension()} axes, size {image.GetSize()}: expected 2 or 3. Split a "
            f"series into one file a volume."
        )
    return image


def _header_notes(path: str, image: sitk.Image) -> list[str]:
    geometry = {"spacing": image.GetSpacing(), "origin": image.GetOrigin(), "direction": image.GetDirection()}
    return header_notes(str(path), {"sitk_stuff": geometry, "spacing": image.GetSpacing()[::-1]})


def _array(image: sitk.Image, dtype: type | None = np.float32) -> np.ndarray:
    """(C, Z, Y, X)."""
    array = sitk.GetArrayFromImage(image).astype(dtype, copy=False)
    array = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
    return array[:, None] if image.GetDimension() == 2 else array


def _frame(image: sitk.Image) -> np.ndarray:
    dim = image.GetDimension()
    axes = np.array(image.GetDirection()).reshape(dim, dim) * np.array(image.GetSpacing())
    frame = np.eye(4)
    frame[3 - dim : 3, 3 - dim : 3] = axes[::-1, ::-1]
    frame[3 - dim : 3, 3] = image.GetOrigin()[::-1]
    return frame


def _grid_difference(image: sitk.Image, reference: sitk.Image) -> str:
    """How the grids of two images differ, or an empty string."""
    if image.GetSize() != reference.GetSize():
        return f"size {image.GetSize()} differs from size {reference.GetSize()}"
    spacing = reference.GetSpacing()
    if not np.allclose(image.GetSpacing(), spacing, rtol=1e-3, atol=0):
        return f"spacing {_rounded(image.GetSpacing())} mm differs from {_rounded(spacing)} mm"
    if not np.allclose(image.GetDirection(), reference.GetDirection(), atol=1e-2):
        return f"direction {_rounded(image.GetDirection())} differs from {_rounded(reference.GetDirection())}"
    if np.linalg.norm(np.subtract(image.GetOrigin(), reference.GetOrigin())) > 0.1 * max(spacing):
        return f"origin {_rounded(image.GetOrigin())} mm differs from {_rounded(reference.GetOrigin())} mm"
    return ""


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)
