"""The parts of nnU-Net's U-Nets that this package calls by name, with their types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Encoder(Protocol):
    """Gives the skip connections, full resolution first; the attributes have one entry a level, in the same order."""

    conv_op: type[nn.Module]
    output_channels: Sequence[int]
    strides: Sequence[int | Sequence[int]]

    def __call__(self, x: Tensor) -> list[Tensor]: ...


class Head(Protocol):
    """A convolution that gives the network's outputs at one resolution."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor: ...


class Decoder(Protocol):
    """Turns skip connections into outputs; the sequences have one entry a stage, coarsest first."""

    stages: Sequence[Callable[[Tensor], Tensor]]
    transpconvs: Sequence[Callable[[Tensor], Tensor]]
    seg_layers: Sequence[Head]
    deep_supervision: bool

    def __call__(self, skips: Sequence[Tensor]) -> Any: ...


class UNet(Protocol):
    """``PlainConvUNet`` or ``ResidualEncoderUNet`` of dynamic-network-architectures."""

    encoder: Encoder
    decoder: Decoder


def as_unet(network: nn.Module) -> UNet:
    """The network itself, declared as a U-Net; nothing is checked.

    To a type checker any attribute of a module is a tensor or a module, whose own attributes are unknown.
    """
    unet: Any = network
    return unet
