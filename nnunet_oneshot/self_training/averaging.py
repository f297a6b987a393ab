"""The average of a student over its training, steadier than the student itself."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a student's weights, which takes part in no backward pass.

    Args:
        student: The network that is trained; call ``update_parameters`` after each of its steps.
        decay: Share of the average that remains at each step.
    """
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return averaged.requires_grad_(False)
