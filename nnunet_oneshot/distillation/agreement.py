"""Real images with propagated labels, where the averaged student agrees with the registration."""

from __future__ import annotations

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average_of(student: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a student's weights, which takes part in no backward pass.

    Args:
        student: The network that is trained; call ``update_parameters`` after each of its steps.
        decay: Share of the average that remains at each step.
    """
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return averaged.requires_grad_(False)


def build_agreement_loss(loss: nn.Module, *, num_heads: int, has_regions: bool) -> nn.Module:
    """nnU-Net's segmentation loss of a trainer, in the form that leaves out voxels marked to be ignored.

    Args:
        loss: The trainer's loss, deep supervision included; its weights of scales and of the Dice term are taken over.
        num_heads: Number of the network's outputs; for labels also the value that marks ignored voxels.
        has_regions: Whether outputs are regions (targets then carry one more channel, 1 where ignored).
    """
    inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    dice = {"batch_dice": inner.dc.batch_dice, "smooth": inner.dc.smooth, "do_bg": inner.dc.do_bg, "ddp": False}
    if has_regions:
        masked = DC_and_BCE_loss({}, dice, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    else:
        masked = DC_and_CE_loss(dice, {}, ignore_label=num_heads, dice_class=MemoryEfficientSoftDiceLoss)
    if isinstance(loss, DeepSupervisionWrapper):
        return DeepSupervisionWrapper(masked, loss.weight_factors)
    return masked


def mask_disagreement(
    target: Tensor | list[Tensor], prediction: Tensor | None, *, num_heads: int, has_regions: bool, has_ignore: bool
) -> Tensor | list[Tensor]:
    """Marks as ignored every voxel where a prediction and a propagated label differ.

    Args:
        target: Propagated labels (B, 1, *spatial), or regions (B, R, *spatial) with a last channel for the dataset's
            own ignore label where it has one; a list of them, full resolution first, under deep supervision.
        prediction: Logits (B, num_heads, *spatial) at full resolution, or None: nothing is marked but what the
            dataset itself ignores.
        num_heads: See `build_agreement_loss`.
        has_regions: Whether heads are regions.
        has_ignore: Whether regions come with that last channel.

    Returns:
        Of the same structure, in the form that the loss of `build_agreement_loss` takes.
    """
    if isinstance(target, list):
        options = {"num_heads": num_heads, "has_regions": has_regions, "has_ignore": has_ignore}
        return [mask_disagreement(level, prediction, **options) for level in target]
    if has_regions:
        regions = target[:, :-1] if has_ignore else target
        ignored = target[:, -1:].bool() if has_ignore else torch.zeros_like(target[:, :1], dtype=torch.bool)
        if prediction is not None:
            predicted = nearest((prediction > 0).float(), target.shape[2:]) > 0.5
            ignored = ignored | (predicted != regions.bool()).any(1, keepdim=True)
        return torch.cat([regions.bool(), ignored], dim=1)
    if prediction is None:
        return target
    predicted = nearest(prediction.argmax(1, keepdim=True).float(), target.shape[2:])
    return torch.where(predicted == target, target, torch.full_like(target, num_heads))


def nearest(volume: Tensor, shape: torch.Size) -> Tensor:
    """(B, C, *spatial) at another resolution, by nearest neighbours; ``shape`` is the new spatial shape."""
    if volume.shape[2:] == shape:
        return volume
    return nn.functional.interpolate(volume, size=tuple(shape), mode="nearest-exact")
