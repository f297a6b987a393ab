"""Computes the decoder's features of a U-Net by calling its public parts."""

from __future__ import annotations

import torch
from torch import nn

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.unet import as_unet

_DECODER_PARTS = ("transpconvs", "stages", "seg_layers", "deep_supervision")


def decoder_features(
    network: nn.Module, x: torch.Tensor
) -> tuple[torch.Tensor | list[torch.Tensor], list[torch.Tensor]]:
    """Forward pass of a U-Net of dynamic-network-architectures that also returns the outputs of its decoder stages.

    Runs the same operations in the same order as ``network(x)``, so the outputs are bitwise equal. The function has no
    state and can be compiled with ``torch.compile``.

    Args:
        network: ``PlainConvUNet`` or ``ResidualEncoderUNet``; its ``decoder.deep_supervision`` is respected.
        x: Input ``(B, C, *spatial)``.

    Returns:
        ``(outputs, features)``: the result of ``network(x)``, and the decoder stages' outputs ``(B, C_k, *spatial_k)``,
        full resolution first.

    Raises:
        OneShotError: The network has no encoder and decoder of this kind.
    """
    _check_is_unet(network)
    unet = as_unet(network)
    decoder = unet.decoder
    skips = unet.encoder(x)
    features, outputs = [], []
    below = skips[-1]
    for stage in range(len(decoder.stages)):
        joined = torch.cat((decoder.transpconvs[stage](below), skips[-(stage + 2)]), 1)
        below = decoder.stages[stage](joined)
        features.append(below)
        if decoder.deep_supervision or stage == len(decoder.stages) - 1:
            outputs.append(decoder.seg_layers[stage](below))
    features, outputs = features[::-1], outputs[::-1]
    return (outputs if decoder.deep_supervision else outputs[0]), features


def feature_channels(network: nn.Module) -> list[int]:
    """Number of channels of each level of `decoder_features`, full resolution first."""
    _check_is_unet(network)
    unet = as_unet(network)
    return list(unet.encoder.output_channels[: len(unet.decoder.stages)])


def _check_is_unet(network: nn.Module) -> None:
    decoder = getattr(network, "decoder", None)
    if not hasattr(network, "encoder") or not all(hasattr(decoder, part) for part in _DECODER_PARTS):
        raise OneShotError(
            f"The network {type(network).__name__} of the plans has no U-Net encoder and decoder whose features can be "
            f"read: distillation needs PlainConvUNet or ResidualEncoderUNet. Use plans with one of them, or train with "
            f"OneShotSynthesisTrainer."
        )
