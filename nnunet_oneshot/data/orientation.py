"""How the axes of an array lie in the scanner's space, from what nnU-Net's readers keep of the header.

Vocabulary:
    axes: (3, 3) orthonormal matrix. Column k is the direction in which index k of an array grows, in the patient space
        of the file (LPS), components in the order (z, y, x). Files whose header tells no direction have the identity.
    order: the signed permutation nearest to the axes, as a permutation and flips that bring an array into the order in
        which its indices grow towards z, y and x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Cosines; directions that differ by less, about one degree, are taken for equal.
_TOLERANCE = 0.02


def axes_of(properties: Mapping[str, Any], transpose: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Directions of the axes of an array.

    Args:
        properties: What nnU-Net's readers give for a case.
        transpose: nnU-Net's ``transpose_forward`` where the array is preprocessed: its axis k is axis ``transpose[k]``
            of the array as read.

    Returns:
        (3, 3), see the module.
    """
    matrix = np.eye(3)
    if "sitk_stuff" in properties:
        direction = np.asarray(properties["sitk_stuff"]["direction"], float)
        if direction.size == 9:
            matrix = direction.reshape(3, 3)
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float)
        # NIfTI's world is RAS.
        matrix = np.diag([-1.0, -1.0, 1.0]) @ affine[:3, :3]
    return _orthonormal(matrix[::-1, ::-1])[:, list(transpose)]


def order_of(axes: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The permutation and the flips that bring an array into the common order.

    Args:
        axes: (3, 3), see `axes_of`.

    Returns:
        Axes of the array in the order z, y, x, and those of the result that are to be reversed.
    """
    remaining, permutation = [0, 1, 2], [0, 0, 0]
    flips: list[tuple[int, bool]] = []
    # The clearest axes are assigned first, so that each is assigned once whatever the angle.
    for direction, axis in sorted(np.ndindex(3, 3), key=lambda place: -abs(axes[place])):
        if axis in remaining and direction not in [d for d, _ in flips]:
            remaining.remove(axis)
            permutation[direction] = axis
            flips.append((direction, bool(axes[direction, axis] < 0)))
    return tuple(permutation), tuple(sorted(direction for direction, reverse in flips if reverse))


def in_common_order(volume: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """A view of a volume (C, X, Y, Z) whose indices grow towards z, y and x as nearly as may be."""
    permutation, flips = order_of(axes)
    moved = volume.transpose(0, *(axis + 1 for axis in permutation))
    return np.flip(moved, tuple(axis + 1 for axis in flips)) if flips else moved


def edges_in_common_order(spacing: Sequence[float], axes: np.ndarray) -> tuple[float, ...]:
    """The voxel edges of what `in_common_order` gives."""
    return tuple(spacing[axis] for axis in order_of(axes)[0])


def name_of(axes: np.ndarray) -> str:
    """The directions in which an array's axes grow, as viewers name them, such as ``SPL``."""
    names = (("I", "S"), ("A", "P"), ("R", "L"))
    permutation, flips = order_of(axes)
    letters = {axis: names[direction][direction not in flips] for direction, axis in enumerate(permutation)}
    return "".join(letters[axis] for axis in range(3))


def mixed_orders_note(orders: Mapping[str, str], *, reoriented: bool) -> str | None:
    """What a user should know of files in different axis orders, or None where all lie in one.

    Args:
        orders: Case -> the order of its axes, see `name_of`.
        reoriented: Whether the reader brings all into one order.
    """
    cases: dict[str, list[str]] = {}
    for case, order in sorted(orders.items()):
        cases.setdefault(order, []).append(case)
    if len(cases) < 2:
        return None
    listed = "; ".join(
        f"{order}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for order, names in sorted(cases.items(), key=lambda item: -len(item[1]))
    )
    found = f"the files are stored in {len(cases)} different axis orders ({listed})."
    if reoriented:
        return (
            f"{found} nnU-Net's NibabelIOWithReorient brings all of them into one; the plans name it, and prediction "
            f'uses it too. "overwrite_image_reader_writer" in dataset.json names another reader.'
        )
    return (
        f"{found} Registration starts from their headers, but the network has to learn every order, which takes it "
        f"many times as long: store them as NIfTI files, for which nnU-Net has a reader that reorients "
        f'(NibabelIOWithReorient), and remove "overwrite_image_reader_writer" from dataset.json if it is there.'
    )


def aligned_by_headers(
    fixed_axes: np.ndarray,
    moving_axes: np.ndarray,
    *,
    fixed: tuple[Sequence[int], Sequence[float]],
    moving: tuple[Sequence[int], Sequence[float]],
) -> np.ndarray | None:
    """The map fixed voxel -> moving voxel in which directions agree and the middles of both volumes lie on each other.

    Positions in the headers play no part: different subjects share no origin.

    Args:
        fixed_axes: (3, 3), see `axes_of`.
        moving_axes: Those of the other volume.
        fixed: Shape and voxel edges (mm) of the fixed volume.
        moving: Those of the other volume.

    Returns:
        (4, 4), or None where the axes of both volumes point alike.
    """
    rotation = relative_rotation(fixed_axes, moving_axes)
    if rotation is None:
        return None
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.asarray(fixed[1], float)[None] / np.asarray(moving[1], float)[:, None]
    centres = [(np.asarray(shape, float) - 1) / 2 for shape, _ in (fixed, moving)]
    matrix[:3, 3] = centres[1] - matrix[:3, :3] @ centres[0]
    return matrix


def relative_rotation(fixed_axes: np.ndarray, moving_axes: np.ndarray) -> np.ndarray | None:
    """How the axes of one array are turned against those of another, (3, 3); None where they point alike."""
    rotation = moving_axes.T @ fixed_axes
    return None if np.allclose(rotation, np.eye(3), atol=_TOLERANCE) else rotation


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """The orthonormal matrix nearest to one whose columns may have lengths or be sheared (polar decomposition)."""
    lengths = np.linalg.norm(matrix, axis=0)
    if not np.all(np.isfinite(matrix)) or np.any(lengths < 1e-12):
        return np.eye(3)
    left, _, right = np.linalg.svd(matrix / lengths)
    return left @ right
