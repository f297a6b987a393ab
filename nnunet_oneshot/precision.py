"""The number format in which networks are trained on a processor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_HARDWARE = ("avx512_bf16", "amx_bf16")


def computes_bfloat16() -> bool:
    """Whether this x86 processor multiplies bfloat16 in hardware; elsewhere it is emulated, or has not been measured.

    Releases of torch that do not tell are answered with False.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in _HARDWARE)


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether training on ``device`` computes its convolutions in bfloat16.

    Args:
        device: Device of training.
        precision: ``"auto"`` or ``"float32"``.
    """
    return device.type == "cpu" and precision == "auto" and computes_bfloat16()


def processor_autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context with convolutions in bfloat16 where `uses_bfloat16`, else one that does nothing."""
    if uses_bfloat16(device, precision):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which networks run in training: nnU-Net's on CUDA, elsewhere `processor_autocast`."""
    return torch.autocast(device.type) if device.type == "cuda" else processor_autocast(device, precision)


class Float32Loss(nn.Module):
    """A loss of a network's outputs, taken in float32 whatever they were computed in.

    On CUDA autocast sees to it; on a processor softmax and cross-entropy would stay in the eight bits of bfloat16.

    Args:
        loss: A loss of (outputs, target), where outputs are a tensor or, under deep supervision, a list of them.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor | list[Tensor], target: Tensor | list[Tensor]) -> Tensor:
        if isinstance(outputs, (list, tuple)):
            return self.loss([output.float() for output in outputs], target)
        return self.loss(outputs.float(), target)
