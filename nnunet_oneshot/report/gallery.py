"""Synthetic patches beside the real ones aligned with them, from the loader that training uses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.report.cuts import upright
from nnunet_oneshot.report.drawing import SCALE, data_uri, grey, outlines, window_of
from nnunet_oneshot.seeding import seed_everything
from nnunet_oneshot.synthesis.data_loader import PatchSettings, build_oneshot_loader

PATCHES = 6
_BYTES = 8192


def patches(
    prepared: PreparedDataset,
    cache: RegistrationCache,
    config: OneShotConfig,
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[int],
) -> list[dict[str, Any]]:
    """Patches as training makes them, before nnU-Net's own augmentation, each cut where it shows most labels.

    Args:
        prepared: The dataset.
        cache: Holds the registrations.
        config: Settings in force.
        pairs: Registrations (atlas, case) to draw from.
        labels: Labels to outline.

    Returns:
        For each patch ``case``, ``atlas``, ``w``, ``h``, ``synthetic`` and ``real`` (addresses of images) and ``paths``
        (label -> outline).
    """
    chosen = [pairs[i] for i in np.unique(np.linspace(0, len(pairs) - 1, PATCHES).round().astype(int))]
    atlases, cases = (sorted({pair[side] for pair in chosen}) for side in (0, 1))
    unwanted: Collection[tuple[str, str]] = {(a, c) for a in atlases for c in cases if (a, c) not in chosen}
    size = prepared.configuration_manager.patch_size
    settings = PatchSettings(
        batch_size=PATCHES,
        initial_patch_size=size,
        patch_size=size,
        transforms=_plain_transforms(prepared),
        synthesis=config.synthesis,
        real_share=0.0,
        augment=True,
        oversample_foreground_percent=1.0,
        masked=prepared.configuration_manager.use_mask_for_norm,
    )
    loader = build_oneshot_loader(
        prepared, cache, atlases=atlases, cases=cases, settings=settings, seed=config.seed, rejected=unwanted
    )
    seed_everything(config.seed)
    batch = loader.generate_train_batch()
    drawn = zip(*(batch[name] for name in ("data", "real", "target", "keys", "atlases")), strict=True)
    return [
        {
            **_shown(data.numpy(), real.numpy(), target.numpy(), prepared.axes(case), labels),
            "case": case,
            "atlas": atlas,
        }
        for data, real, target, case, atlas in drawn
    ]


def _plain_transforms(prepared: PreparedDataset) -> Any:
    """nnU-Net's transforms of validation patches at one scale, which leave label maps as they are."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    manager = prepared.label_manager
    return nnUNetTrainer.get_validation_transforms(
        None, foreground_labels=manager.foreground_labels, regions=None, ignore_label=manager.ignore_label
    )


def _shown(
    data: np.ndarray, real: np.ndarray, target: np.ndarray, axes: np.ndarray, labels: Sequence[int]
) -> dict[str, Any]:
    """A patch (C, *patch) of two or three axes for the page, cut across its first axis; ``axes`` as of its case."""
    seg, images = target[0], [data[0], real[0]]
    if seg.ndim == 3:
        index = int((seg > 0).sum(axis=(1, 2)).argmax())
        seg, images = seg[index], [image[index] for image in images]
    seg, *images = (upright(cut, axes) for cut in (seg, *images))
    addresses = [data_uri(grey(image, window_of(image)), most_bytes=_BYTES) for image in images]
    height, width = seg.shape
    return {
        "w": width,
        "h": height,
        "scale": SCALE,
        "synthetic": addresses[0],
        "real": addresses[1],
        "paths": outlines(seg, labels),
    }
