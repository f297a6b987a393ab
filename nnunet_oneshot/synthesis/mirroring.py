"""Decides from the atlas's labels and the orientation of the images which axes may be mirrored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from nnunet_oneshot.data.thumbnails import pool_volume

MIN_OVERLAP = 0.3
MARGIN = 0.1
MAX_SHIFT = 0.1
MIN_SHARE = 0.1


def decide_mirror_axes(
    setting: str | Sequence[int],
    *,
    dim: int,
    load_atlas_segs: Callable[[], Sequence[np.ndarray]],
    load_images: Callable[[], tuple[Sequence[np.ndarray], Sequence[np.ndarray]]],
    ignore_label: int | None = None,
    mixed_orders: bool = False,
) -> tuple[tuple[int, ...], str]:
    """The axes of the patch to mirror in training and at test time.

    Args:
        setting: ``"auto"`` (axes of both `allowed_mirror_axes` and `occurring_mirror_axes`) or the axes that the plans
            allow.
        dim: Number of axes of the patch; a 2D patch lies in the last two axes of a volume.
        load_atlas_segs: Returns the atlases' label maps; called for ``"auto"`` only.
        load_images: Returns images of the atlases and of the unlabelled training cases, each (C, X, Y, Z); called for
            ``"auto"`` only.
        ignore_label: A label that marks unlabelled voxels.
        mixed_orders: Whether the cases' arrays are stored in different axis orders. An axis of the patch can then be
            any axis of the subject: all axes are mirrored, or none if one of them exchanges labels.

    Returns:
        ``(axes, sentence)``: the axes, and a log message about them.
    """
    every = tuple(range(dim))
    if setting != "auto":
        axes = tuple(axis for axis in every if axis in setting)
        return axes, f"Mirroring: axes {list(axes)}, as the plans say."
    offset = 3 - dim
    volume_axes = [axis + offset for axis in every]
    if mixed_orders:
        kept = allowed_mirror_axes(load_atlas_segs(), (0, 1, 2), ignore_label=ignore_label)
        axes = every if len(kept) == 3 else ()
        reason = "" if axes else ", and mirroring the atlas lays labels on other labels (left on right)"
        return axes, f"Mirroring: axes {list(axes)}; the images are stored in different axis orders{reason}."
    keep_labels = allowed_mirror_axes(load_atlas_segs(), volume_axes, ignore_label=ignore_label)
    occur = occurring_mirror_axes(*load_images(), volume_axes)
    axes = tuple(axis for axis in every if axis + offset in keep_labels and axis + offset in occur)
    reasons = []
    if exchanged := [axis for axis in every if axis + offset not in keep_labels]:
        reasons.append(f"mirroring the atlas on {exchanged} lays labels on other labels (left on right)")
    if absent := [axis for axis in every if axis + offset not in occur]:
        reasons.append(f"images mirrored on {absent} do not occur among the unlabelled cases")
    if not reasons:
        return axes, f"Mirroring: axes {list(axes)}; none exchanges labels, and all occur among the unlabelled cases."
    return axes, (
        f'Mirroring: axes {list(axes)}; {"; ".join(reasons)}. Set "mirror_axes" in the plans\' "oneshot" block to '
        f"decide otherwise."
    )


def occurring_mirror_axes(
    atlases: Sequence[np.ndarray], cases: Sequence[np.ndarray], axes: Sequence[int]
) -> tuple[int, ...]:
    """The axes along which some cases look mirrored.

    If all scans have the same orientation, mirrored images do not help the network, but it still has to learn them:
    with one atlas and a short training, this costs accuracy. An axis is kept if at least one case in ten resembles the
    mirrored atlas more than the atlas itself, by the correlation of small blurred copies
    (`nnunet_oneshot.data.thumbnails`). Axes of symmetric anatomy pass this threshold; axes whose mirror image is upside
    down are far below it.

    Args:
        atlases: Images (C, X, Y, Z); only the first is used.
        cases: Images (C, X, Y, Z); if there are none, every axis is kept.
        axes: Axes of (X, Y, Z) to test.

    Returns:
        Those of ``axes`` that are kept, in the given order.
    """
    if not cases:
        return tuple(axes)
    atlas, *others = (_standardised(volume) for volume in (atlases[0], *cases))
    plain = np.array([np.mean(atlas * other) for other in others])
    kept = []
    for axis in axes:
        mirrored = np.array([np.mean(np.flip(atlas, axis + 1) * other) for other in others])
        if np.mean(mirrored > plain) >= MIN_SHARE:
            kept.append(axis)
    return tuple(kept)


def allowed_mirror_axes(
    atlas_segs: Sequence[np.ndarray], axes: Sequence[int], *, ignore_label: int | None = None
) -> tuple[int, ...]:
    """The axes along which mirroring does not exchange labels.

    Left and right labels (such as left and right hippocampus) change places in a mirrored image, but nnU-Net would keep
    their names. A network trained this way on one atlas cannot tell them apart.

    For each axis, the label map is mirrored about the plane where the foreground overlaps its mirror image most, among
    planes within a tenth of its extent from its middle. An axis is excluded if, in any atlas, a mirrored label lands on
    another label rather than on itself: its Dice with another label is at least 0.3, and at least 0.1 above its Dice
    with itself. The threshold is low because excluding an axis costs only some augmentation, whereas mirroring an axis
    that exchanges labels costs those labels.

    Args:
        atlas_segs: Label maps ``(1, X, Y, Z)`` or ``(X, Y, Z)``; values below 1 are background.
        axes: Axes of ``(X, Y, Z)`` to test.
        ignore_label: A label that marks unlabelled voxels, treated as background.

    Returns:
        Those of ``axes`` that may be mirrored, in the given order.
    """
    maps = [_foreground_crop(np.asarray(seg).reshape(np.shape(seg)[-3:]), ignore_label) for seg in atlas_segs]
    return tuple(axis for axis in axes if not any(_exchanges_labels(labels, axis) for labels in maps))


def _standardised(volume: np.ndarray) -> np.ndarray:
    """A small blurred copy of a volume (C, X, Y, Z) with every channel z-scored."""
    channels = [gaussian_filter(channel, 1.0) for channel in pool_volume(volume).astype(np.float64)]
    return np.stack([(channel - channel.mean()) / (channel.std() + 1e-8) for channel in channels])


def _foreground_crop(seg: np.ndarray, ignore_label: int | None) -> np.ndarray:
    """The bounding box of the foreground, background set to 0."""
    labels = np.where((seg < 1) | (seg == ignore_label) if ignore_label is not None else seg < 1, 0, seg).astype(
        np.int64
    )
    occupied = [np.flatnonzero(labels.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    if any(len(places) == 0 for places in occupied):
        return labels[:0]
    return labels[tuple(slice(places[0], places[-1] + 1) for places in occupied)]


def _exchanges_labels(labels: np.ndarray, axis: int) -> bool:
    """Whether mirroring a cropped label map ``(X, Y, Z)`` along ``axis`` moves a label onto another one."""
    if labels.size == 0:
        return False
    original, mirrored = _with_mirror_image(labels, axis)
    names = [name for name in np.unique(labels) if name > 0]
    index = np.zeros(int(labels.max()) + 1, dtype=np.int64)
    index[names] = np.arange(1, len(names) + 1)
    number = len(names) + 1
    joint = np.bincount(index[mirrored].ravel() * number + index[original].ravel(), minlength=number**2)
    overlap = joint.reshape(number, number)[1:, 1:]
    sizes = np.bincount(index[labels].ravel(), minlength=number)[1:]
    dice = 2 * overlap / (sizes[:, None] + sizes[None, :])
    own = np.diag(dice)
    other = np.where(np.eye(len(names), dtype=bool), 0.0, dice).max(axis=1)
    return bool(np.any((other >= MIN_OVERLAP) & (other >= own + MARGIN)))


def _with_mirror_image(labels: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """A label map and its mirror image, both padded along ``axis`` to maximise the overlap of their foregrounds.

    The overlap of the foreground with its mirror image about the plane ``s / 2`` is the self-convolution of the
    foreground along the axis at ``s``. Planes far from the middle are ignored: a large label overlaps itself most when
    mirrored about its own middle, whatever lies on the other side.
    """
    size = labels.shape[axis]
    profile = np.moveaxis(labels > 0, axis, -1).reshape(-1, size)
    spectrum = np.fft.rfft(profile.astype(np.float32), n=2 * size, axis=-1)
    overlap = np.fft.irfft((spectrum**2).sum(axis=0), n=2 * size)[: 2 * size - 1]
    # Percentiles, because a few stray voxels would shift the ends.
    low, high = np.percentile(np.repeat(np.arange(size), profile.sum(axis=0)), (1, 99))
    reach = 2 * MAX_SHIFT * (high - low + 1)
    near = [s for s in range(2 * size - 1) if abs(s - (low + high)) <= max(reach, 1)]
    # Equal overlaps may differ by rounding; the plane nearest the middle wins.
    best = [s for s in near if overlap[s] > max(overlap[near]) - 0.5]
    shift = min(best, key=lambda s: abs(s - (low + high))) - (size - 1)
    before, after = max(-shift, 0), max(shift, 0)
    original = np.pad(labels, [(before, after) if a == axis else (0, 0) for a in range(3)])
    return original, np.flip(original, axis)
