"""Cross-entropy that does not teach a network, before it knows anything, that rare labels are nowhere."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, nn


class AdjustedLogits(nn.Module):
    """A loss of logits to each channel of which a constant is added first.

    With ``strength * log_priors(...)`` added, cross-entropy asks for the probabilities of labels as if all were equally
    frequent (logit adjustment: Menon et al., arXiv 2007.07314). Without it, a network first learns how rare a small
    structure is, and what Dice then adds for it has hardly a gradient.

    Args:
        loss: A loss of (logits (B, K, *spatial), target).

    Attributes:
        added: The constants, (K,) on the device of the logits; None adds nothing.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.added: Tensor | None = None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.added is None:
            return self.loss(logits, target)
        return self.loss(logits + self.added.view(1, -1, *[1] * (logits.ndim - 2)), target)


def adjust_cross_entropy(loss: nn.Module) -> AdjustedLogits | None:
    """Wraps the cross-entropy within a loss that nnU-Net builds, such as `DC_and_CE_loss` under deep supervision.

    Returns:
        The wrapper, which is now part of ``loss``; None if it holds no cross-entropy where nnU-Net's losses have it.
    """
    for module in loss.modules():
        if isinstance(cross_entropy := getattr(module, "ce", None), nn.Module):
            module.ce = AdjustedLogits(cross_entropy)
            return module.ce
    return None


def log_priors(segmentations: Iterable[np.ndarray], labels: LabelManager) -> Tensor:
    """How frequent each output of a network is: log of its share, for regions, which overlap, log of its odds.

    Args:
        segmentations: Label maps of any shape; voxels with the ignore label, or below 0, do not count.
        labels: Of the dataset.

    Returns:
        (K,) float32, finite: what is nowhere counts one voxel.
    """
    counts = np.zeros(max(labels.all_labels) + 1)
    for segmentation in segmentations:
        shown = segmentation[np.isin(segmentation, labels.all_labels)]
        counts += np.bincount(shown.astype(np.int64), minlength=len(counts))
    total = max(2, counts.sum())
    if labels.has_regions:
        counts = np.array([counts[list(np.ravel(region))].sum() for region in labels.foreground_regions])
    share = np.clip(counts, 1, total - 1) / total
    return torch.from_numpy(np.log(share / (1 - share) if labels.has_regions else share)).float()
