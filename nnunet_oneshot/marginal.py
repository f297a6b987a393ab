"""The marginal loss for partly labelled samples: what a label map does not show may be anywhere in its background."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Its softmax beside any real output is 0, and it has a place in half precision.
_NEVER = -1e4


def merged_outputs(outputs: Tensor | list[Tensor], hidden: Sequence[Sequence[int]]) -> Tensor | list[Tensor]:
    """A network's outputs in which, sample by sample, hidden labels are part of the background.

    The probability of the background becomes that of the background or any hidden label, and that of a hidden label 0
    without a gradient (Shi et al., Medical Image Analysis 70, 2021, 101979). Cross-entropy with a target whose
    background holds hidden structures then is the marginal one, and in Dice these samples count for no hidden label.

    Args:
        outputs: Logits (B, labels, *spatial), background first; with deep supervision a list of these.
        hidden: For each sample the labels that its label map does not show.

    Returns:
        The same for samples without hidden labels; in float32 where any sample has some.
    """
    if not any(hidden):
        return outputs
    if isinstance(outputs, (list, tuple)):
        return [_merged(output, hidden) for output in outputs]
    return _merged(outputs, hidden)


def _merged(logits: Tensor, hidden: Sequence[Sequence[int]]) -> Tensor:
    logits = logits.float()
    absent = torch.zeros(logits.shape[:2], dtype=torch.bool)
    for sample, labels in enumerate(hidden):
        absent[sample, list(labels)] = True
    absent = absent.to(logits.device).view(*logits.shape[:2], *[1] * (logits.ndim - 2))
    background = absent.clone()
    background[:, 0] = True
    merged = logits.masked_fill(~background, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([merged, logits.masked_fill(absent, _NEVER)[:, 1:]], dim=1)
