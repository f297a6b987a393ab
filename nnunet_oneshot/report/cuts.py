"""Cuts through volumes: seven planes in three directions, of square pixels, through what is labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.data.orientation import order_of
from nnunet_oneshot.registration.pair.functional import identity_grid, sample_at
from nnunet_oneshot.registration.pair.warp import sample_labels
from nnunet_oneshot.report.drawing import SCALE, data_uri, outlines

# Cuts through the first, second and third direction, at these shares of the labelled voxels.
_SHARES = ((0.25, 0.5, 0.75), (0.33, 0.67), (0.33, 0.67))
_DIRECTIONS = ("axial", "coronal", "sagittal")
_EDGE = 176
_COARSE_VOXELS = 200_000
# Bytes of one cut of one image.
CUT_BYTES = 4096
# What is shown around the labels, as a share of their extent and of the field of view.
_MARGINS = (0.3, 0.12)


@dataclass(frozen=True)
class Plane:
    """A plane through a volume.

    Attributes:
        name: For people.
        points: (3, 1, H, W) float32, voxel coordinates of its pixels.
    """

    name: str
    points: torch.Tensor


def coarse_points(shape: Sequence[int]) -> torch.Tensor:
    """Every n-th voxel of a volume along each axis, (3, x, y, z) float32 coordinates; few enough to be looked at."""
    step = max(1, int(np.ceil((np.prod(shape) / _COARSE_VOXELS) ** (1 / 3))))
    sizes = [-(-size // step) for size in shape]
    return identity_grid(sizes) * step


def planes_through(
    labelled: torch.Tensor, shape: Sequence[int], spacing: Sequence[float], axes: np.ndarray
) -> list[Plane]:
    """Planes through labelled voxels: three, two and two along the axes; one for a volume of one slice.

    Upwards is the head, to the left the right of the subject, as far as the header tells.

    Args:
        labelled: (3, N) voxel coordinates of what is labelled; all are shown. None gives the middle of the volume.
        shape: Voxels of the volume.
        spacing: Voxel edges, mm, array axis order.
        axes: Directions of the array's axes; see `nnunet_oneshot.data.orientation`.
    """
    sizes = np.array(shape, float)
    known = labelled.numpy() if labelled.numel() else np.stack([np.zeros(3), sizes - 1], axis=1)
    low, high = known.min(axis=1), known.max(axis=1)
    margin = np.maximum(_MARGINS[0] * (high - low), _MARGINS[1] * sizes)
    low, high = np.maximum(low - margin, 0), np.minimum(high + margin, sizes - 1)
    pitch = max(float(((high - low + 1) * spacing).max()) / _EDGE, 1e-6)
    permutation, flips = order_of(axes)
    flat = [axis for axis in range(3) if shape[axis] == 1]
    planes = []
    for direction, shares in enumerate(_SHARES):
        axis = permutation[direction]
        if flat and axis not in flat:
            continue
        steps = {}
        for other in (d for d in range(3) if d != direction):
            across = permutation[other]
            count = max(1, round((high[across] - low[across] + 1) * spacing[across] / pitch))
            edge = (high[across] - low[across] + 1) / count
            places = low[across] - 0.5 + (np.arange(count) + 0.5) * edge
            # Rows begin at the head, columns at the right of the subject, and rows at the front.
            backwards = (other in flips) != (other == 0)
            steps[across] = places[::-1].copy() if backwards else places
        for share in [0.5] if flat else shares:
            index = round(float(np.quantile(known[axis], share)))
            planes.append(Plane(f"{_DIRECTIONS[direction]}, index {index}", _grid(axis, index, steps)))
    return planes


def upright(cut: np.ndarray, axes: np.ndarray, across: int = 0) -> np.ndarray:
    """A slice (H, W) of an array across one of its axes, turned as the planes above are.

    Args:
        cut: The slice.
        axes: Directions of the array's axes.
        across: The axis that it is taken across.
    """
    permutation, flips = order_of(axes)
    directions = [permutation.index(axis) for axis in range(3) if axis != across]
    for place, direction in enumerate(directions):
        if (direction in flips) != (direction == 0):
            cut = np.flip(cut, place)
    return cut if directions[0] < directions[1] else cut.T


def _grid(axis: int, index: int, steps: dict[int, np.ndarray]) -> torch.Tensor:
    """Coordinates (3, 1, H, W); the first of the two axes of ``steps`` goes down, the second to the right."""
    (down, rows), (right, columns) = steps.items()
    points = np.empty((3, 1, len(rows), len(columns)), np.float32)
    points[axis], points[down], points[right] = index, rows[:, None], columns
    return torch.from_numpy(points)


def joined(planes: Sequence[Plane]) -> torch.Tensor:
    """The pixels of all planes in a row, (3, 1, 1, N), so that volumes are sampled once; see `divided`."""
    return torch.cat([plane.points.flatten(1) for plane in planes], dim=1)[:, None, None]


def divided(values: np.ndarray, planes: Sequence[Plane]) -> list[np.ndarray]:
    """Values at the points that `joined` gave, (1, 1, N), as a picture (H, W) of each plane."""
    shapes = [tuple(plane.points.shape[2:]) for plane in planes]
    parts = np.split(values.ravel(), np.cumsum([height * width for height, width in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def image_at(volume: np.ndarray, points: torch.Tensor) -> np.ndarray:
    """An image (X, Y, Z) at voxel coordinates (3, *out), three axes: (*out) float32, linear."""
    tensor = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None, None]
    return sample_at(tensor, points[None])[0, 0].numpy()


def labels_at(seg: torch.Tensor, points: torch.Tensor) -> np.ndarray:
    """A label map (1, X, Y, Z) int16 at voxel coordinates (3, *out): (*out) int16."""
    return sample_labels(seg, points)[0].numpy()


def stack(
    planes: Sequence[Plane],
    images: Sequence[tuple[str, Sequence[np.ndarray]]],
    contours: Sequence[tuple[str, Sequence[np.ndarray]]],
    labels: Sequence[int],
) -> dict[str, Any]:
    """Everything that the page shows of one case, as plain JSON types.

    Args:
        planes: Where it is cut.
        images: Name, and a picture (H, W) or (H, W, 3) uint8 of each plane.
        contours: Name, and a label map (H, W) of each plane.
        labels: Labels to outline.

    Returns:
        ``cuts`` (name, width and height of each plane), ``images`` (name and addresses) and ``contours`` (name and, for
        each plane, label -> path).
    """
    return {
        "scale": SCALE,
        "cuts": [{"name": p.name, "h": p.points.shape[2], "w": p.points.shape[3]} for p in planes],
        "images": [
            {"name": name, "src": [data_uri(cut, most_bytes=CUT_BYTES) for cut in cuts]} for name, cuts in images
        ],
        "contours": [{"name": name, "paths": [outlines(seg, labels) for seg in segs]} for name, segs in contours],
    }
