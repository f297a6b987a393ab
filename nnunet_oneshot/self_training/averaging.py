"""The moving average of a student's weights, which is more stable than the student itself."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a student's weights, without gradients.

    Args:
        student: The trained network; call ``update_parameters`` after each training step.
        decay: Share of the old average that is kept at each step.
    """
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return averaged.requires_grad_(False)
