"""The averaged student."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_oneshot.self_training.averaging import average_of


def test_average_moves_by_the_share_that_is_not_kept():
    student = nn.Conv3d(1, 1, 1)
    averaged = average_of(student, 0.9)
    start = student.weight.detach().clone()
    averaged.update_parameters(student)
    with torch.no_grad():
        student.weight += 1
    averaged.update_parameters(student)
    assert torch.allclose(averaged.module.weight, start + 0.1)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
