"""Structures that look alike, such as vertebrae: how much a network must see to tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two labels are copies of each other if one, shifted onto the other, covers it with this Dice ...
_SAME_SHAPE = 0.7
# ... and if the images around both correlate by at least this much.
_SAME_SURROUNDINGS = 0.5
# A pair can be told apart by its sides, as kidneys can; of three or more, those between look the same to both sides.
_SMALLEST_ROW = 3


@dataclass(frozen=True)
class Row:
    """Structures of which each looks like another, surroundings included.

    Attributes:
        labels: Their values, ascending.
        extent: Edges of the box around all of them, mm, in the order of the axes.
    """

    labels: tuple[int, ...]
    extent: tuple[float, ...]


def longest_row(image: np.ndarray, segmentation: np.ndarray, spacing: Sequence[float]) -> Row | None:
    """The row with the longest box among the labels of a case.

    Two labels belong to one row if a shift that brings the centre of the one onto that of the other makes them overlap,
    and also makes the images around them alike: within a box as far to each side as the shift is long, plus half the
    label. A network that sees no further cannot tell which of the two it sees.

    Args:
        image: (C, X, Y, Z).
        segmentation: (X, Y, Z) label map; 0 and negative values are background.
        spacing: 3 voxel edges, mm.

    Returns:
        The row, or None if there is none of at least three labels.
    """
    labels = [int(label) for label in np.unique(segmentation) if label > 0]
    voxels = {label: np.argwhere(segmentation == label) for label in labels}
    rows: list[set[int]] = [{label} for label in labels]
    for index, first in enumerate(labels):
        for second in labels[index + 1 :]:
            own, other = (next(row for row in rows if label in row) for label in (first, second))
            if own is not other and _are_copies(image, segmentation, voxels, first, second):
                own |= other
                rows.remove(other)
    found = [_row(row, voxels, spacing) for row in rows if len(row) >= _SMALLEST_ROW]
    return max(found, key=lambda row: max(row.extent), default=None)


def _row(labels: set[int], voxels: dict[int, np.ndarray], spacing: Sequence[float]) -> Row:
    places = np.concatenate([voxels[label] for label in labels])
    extent = (places.max(0) - places.min(0) + 1) * np.asarray(spacing, float)
    return Row(tuple(sorted(labels)), tuple(float(edge) for edge in extent))


def _are_copies(
    image: np.ndarray, segmentation: np.ndarray, voxels: dict[int, np.ndarray], first: int, second: int
) -> bool:
    smaller, larger = sorted((len(voxels[first]), len(voxels[second])))
    if 2 * smaller / (smaller + larger) < _SAME_SHAPE:
        return False
    centre = voxels[first].mean(0)
    shift = np.round(voxels[second].mean(0) - centre).astype(int)
    if _shifted_overlap(segmentation, voxels[first], shift, second) * 2 / (smaller + larger) < _SAME_SHAPE:
        return False
    shape = np.array(segmentation.shape)
    reach = np.abs(shift).max() + (voxels[first].max(0) - voxels[first].min(0) + 1) / 2
    # Only what is inside of the image before and after the shift.
    low = np.maximum(np.maximum(centre - reach, 0), -shift).round().astype(int)
    high = np.minimum(np.minimum(centre + reach + 1, shape), shape - shift).round().astype(int)
    here, there = (
        image[:, a[0] : b[0], a[1] : b[1], a[2] : b[2]] for a, b in ((low, high), (low + shift, high + shift))
    )
    return _correlation(here, there) >= _SAME_SURROUNDINGS


def _shifted_overlap(segmentation: np.ndarray, places: np.ndarray, shift: np.ndarray, label: int) -> int:
    """How many of the places (N, 3), shifted, have the label."""
    moved = places + shift
    inside = ((moved >= 0) & (moved < segmentation.shape)).all(1)
    return int((segmentation[tuple(moved[inside].T)] == label).sum())


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two images (C, ...), the mean over the channels; 0 where one is constant."""
    found = []
    for one, other in zip(first.astype(float), second.astype(float), strict=True):
        deviations = one.std() * other.std()
        found.append(((one - one.mean()) * (other - other.mean())).mean() / deviations if deviations > 0 else 0.0)
    return float(np.mean(found))
