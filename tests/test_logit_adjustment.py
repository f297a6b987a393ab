"""Logit adjustment: closed forms, with nnU-Net's own losses around it."""

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_oneshot.logit_adjustment import adjust_cross_entropy, log_priors
from nnunet_oneshot.precision import Float32Loss

DICE = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
LABELS = {"background": 0, "large": 1, "small": 2}
PRIOR = torch.tensor([0.9, 0.09, 0.01])


def compound(**options):
    return DC_and_CE_loss(dict(DICE), {}, dice_class=MemoryEfficientSoftDiceLoss, **options)


def segmentation():
    seg = np.zeros((1, 10, 10, 1), np.int16)
    seg[0, :9, 0], seg[0, 9, 9] = 1, 2
    return seg


def test_flat_logits_with_priors_have_the_entropy_of_the_labels():
    loss = compound(weight_dice=0)
    adjust_cross_entropy(loss).added = PRIOR.log()
    target = torch.from_numpy(segmentation()).long()[None]
    found = loss(torch.full((1, 3, 10, 10, 1), 2.5), target)
    assert found.item() == pytest.approx(-(PRIOR * PRIOR.log()).sum().item(), abs=1e-5)


def test_flat_logits_are_where_the_gradient_of_cross_entropy_vanishes():
    """So that at first Dice alone says how much of a rare label there is."""
    target = torch.from_numpy(segmentation()).long()[None]
    gradients = {}
    for added in (None, PRIOR.log()):
        loss, bias = compound(weight_dice=0), torch.zeros(3, requires_grad=True)
        adjust_cross_entropy(loss).added = added
        loss(bias.view(1, 3, 1, 1, 1).expand(1, 3, 10, 10, 1), target).backward()
        gradients[added is None] = bias.grad
    assert torch.allclose(gradients[False], torch.zeros(3), atol=1e-6)
    assert torch.allclose(gradients[True], 1 / 3 - PRIOR, atol=1e-6)


def test_dice_and_other_losses_are_left_as_they_are():
    torch.manual_seed(0)
    logits, target = torch.randn(1, 3, 10, 10, 1), torch.from_numpy(segmentation()).long()[None]
    loss = compound(weight_ce=0)
    before = loss(logits, target)
    adjust_cross_entropy(loss).added = PRIOR.log()
    assert loss(logits, target) == before
    assert adjust_cross_entropy(torch.nn.L1Loss()) is None


def test_found_under_deep_supervision_and_without_effect_until_asked_for():
    torch.manual_seed(0)
    outputs = [torch.randn(1, 3, 8, 8, 8), torch.randn(1, 3, 4, 4, 4)]
    targets = [torch.randint(0, 4, (1, 1, 8, 8, 8)), torch.randint(0, 4, (1, 1, 4, 4, 4))]
    loss = Float32Loss(DeepSupervisionWrapper(compound(ignore_label=3), [0.6, 0.4]))
    before = loss(outputs, targets)
    adjusted = adjust_cross_entropy(loss)
    assert loss(outputs, targets) == before
    adjusted.added = PRIOR.log()
    changed = loss(outputs, targets)
    assert changed != before
    # Ignored voxels still count for nothing.
    outputs[0] += (targets[0] == 3) * torch.randn(1, 3, 1, 1, 1)
    assert torch.allclose(loss(outputs, targets), changed, atol=1e-6)


def test_regions_are_shifted_by_their_odds():
    loss = DC_and_BCE_loss({}, {**DICE, "do_bg": True}, weight_dice=0, dice_class=MemoryEfficientSoftDiceLoss)
    manager = LabelManager({"background": 0, "both": (1, 2), "small": 2}, regions_class_order=(1, 2))
    adjust_cross_entropy(loss).added = log_priors([segmentation()], manager)
    bias = torch.zeros(2, requires_grad=True)
    seg = torch.from_numpy(segmentation())
    target = torch.stack([seg > 0, seg == 2], dim=1).float()
    loss(bias.view(1, 2, 1, 1, 1).expand(1, 2, 10, 10, 1), target).backward()
    assert torch.allclose(bias.grad, torch.zeros(2), atol=1e-6)


def test_priors_are_those_of_the_atlases_without_ignored_and_outer_voxels():
    seg = segmentation()
    ignored = np.concatenate([seg, np.full_like(seg, -1), np.full_like(seg, 3)])
    manager = LabelManager({**LABELS, "ignore": 3}, None)
    assert torch.allclose(log_priors([ignored, seg], manager), PRIOR.log())


def test_a_label_that_is_nowhere_has_a_finite_prior():
    manager = LabelManager({**LABELS, "absent": 3}, None)
    assert log_priors([segmentation()], manager)[3].item() == pytest.approx(np.log(0.01))
    regions = LabelManager({"background": 0, "all": (1, 2), "absent": 3}, regions_class_order=(1, 2))
    assert torch.isfinite(log_priors([np.ones((1, 4, 4, 4), np.int16)], regions)).all()
