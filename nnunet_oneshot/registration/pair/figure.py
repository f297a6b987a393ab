"""The picture of a registration: atlas, case, warped atlas, warped labels on the case, deformed grid."""

from __future__ import annotations

import numpy as np

_COLOURS = np.array(
    [(230, 60, 60), (60, 190, 90), (70, 120, 240), (240, 190, 40), (190, 80, 220), (50, 200, 210), (240, 130, 40)],
    np.uint8,
)
_PANEL_EDGE = 160
_GRID_STEP = 4


def registration_figure(
    *,
    atlas: np.ndarray,
    atlas_seg: np.ndarray,
    case: np.ndarray,
    warped: np.ndarray,
    warped_seg: np.ndarray,
    displacement: np.ndarray,
) -> np.ndarray:
    """One row of panels for each of the three axes, cut through the centre of the labels.

    The columns are the atlas with its labels outlined, the case, the warped atlas, the warped labels outlined on the
    case, and a regular grid of the atlas warped to the case.

    Args:
        atlas: (X, Y, Z) first channel of the atlas.
        atlas_seg: (X, Y, Z) labels.
        case: (U, V, W) first channel of the case.
        warped: (U, V, W) warped atlas.
        warped_seg: (U, V, W) warped labels.
        displacement: (3, U, V, W) location in the atlas of each voxel of the case, atlas voxels.

    Returns:
        (height, width, 3) uint8, red, green and blue.
    """
    axes = [axis for axis in range(3) if case.shape[axis] > 1 and atlas.shape[axis] > 1]
    axes = axes if len(axes) == 3 else [axis for axis in range(3) if axis not in axes]
    lines = _grid_lines(displacement)
    rows = []
    for axis in axes:
        atlas_at, case_at = _centre(atlas_seg, axis), _centre(warped_seg, axis)
        cut_atlas, cut_atlas_seg = (np.take(v, atlas_at, axis) for v in (atlas, atlas_seg))
        cuts = [np.take(v, case_at, axis) for v in (case, warped, warped_seg, lines)]
        panels = [
            _outlined(cut_atlas, cut_atlas_seg),
            _grey(cuts[0]),
            _grey(cuts[1]),
            _outlined(cuts[0], cuts[2]),
            _grey(cuts[3], window=(0.0, 1.0)),
        ]
        rows.append(np.concatenate([_fit(panel) for panel in panels], axis=1))
    return np.concatenate(rows, axis=0)


def _centre(seg: np.ndarray, axis: int) -> int:
    """The slice with the most foreground, or the middle one if there is none."""
    counts = (seg > 0).sum(axis=tuple(a for a in range(seg.ndim) if a != axis))
    return int(counts.argmax()) if counts.any() else seg.shape[axis] // 2


def _grid_lines(locations: np.ndarray) -> np.ndarray:
    """A regular grid of the atlas warped to the case, (U, V, W); 1 near its planes."""
    distance = np.abs((locations + _GRID_STEP / 2) % _GRID_STEP - _GRID_STEP / 2)
    varying = [axis for axis in range(3) if np.ptp(locations[axis]) > 0]
    return np.clip(1.0 - distance[varying].min(axis=0) if varying else np.zeros(locations.shape[1:]), 0, 1)


def _grey(cut: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    low, high = window or np.percentile(cut, (1, 99))
    scaled = np.clip((cut - low) / max(high - low, 1e-6), 0, 1) * 255
    return np.repeat(scaled.astype(np.uint8)[..., None], 3, axis=2)


def _outlined(cut: np.ndarray, seg: np.ndarray) -> np.ndarray:
    panel = _magnified(_grey(cut))
    labels = _magnified(seg)
    edge = np.zeros(labels.shape, bool)
    for axis in range(2):
        for shift in (-1, 1):
            edge |= labels != np.roll(labels, shift, axis)
    edge &= labels > 0
    panel[edge] = _COLOURS[(labels[edge].astype(int) - 1) % len(_COLOURS)]
    return panel


def _magnified(cut: np.ndarray) -> np.ndarray:
    factor = max(1, _PANEL_EDGE // max(cut.shape[:2]))
    return cut.repeat(factor, axis=0).repeat(factor, axis=1)


def _fit(panel: np.ndarray) -> np.ndarray:
    """The panel on a square canvas, magnified or subsampled by a whole number."""
    panel = _magnified(panel)
    step = -(-max(panel.shape[:2]) // _PANEL_EDGE)
    panel = panel[::step, ::step]
    canvas = np.zeros((_PANEL_EDGE + 4, _PANEL_EDGE + 4, 3), np.uint8)
    top, left = ((np.array(canvas.shape[:2]) - panel.shape[:2]) // 2).tolist()
    canvas[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    return canvas
