"""Drawing, writing and reading tiny images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_blobs(shape: Sequence[int], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (uint8) of two blobs side by side along the last axis, with labels 1 and 2."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    label = np.zeros(shape, np.uint8)
    for value, side in ((1, -0.45), (2, 0.45)):
        centre = random.normal(0, 0.08, len(shape))
        centre[-1] += side
        radius = random.uniform(0.3, 0.4)
        distance = np.sqrt(sum((axis - position) ** 2 for axis, position in zip(grid, centre, strict=True)))
        label[distance < radius] = value
    image = 40.0 + 60 * (label == 1) + 110 * (label == 2) + random.normal(0, 6, shape)
    return np.clip(image, 1, 255).astype(np.uint8), label


def write_image(path: Path, array: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0), **geometry: object) -> None:
    """Writes an array with the given spacing (array axis order, mm), ``origin`` and ``direction``."""
    if path.name.endswith(".png"):
        from skimage import io

        io.imsave(path, array, check_contrast=False)
        return
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(value) for value in spacing][::-1][: array.ndim])
    if "origin" in geometry:
        image.SetOrigin(geometry["origin"])
    if "direction" in geometry:
        image.SetDirection(geometry["direction"])
    sitk.WriteImage(image, str(path), True)


def read_image(path: Path) -> np.ndarray:
    """The array of an image file."""
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
