"""Real patches with propagated labels count where the averaged student agrees with them."""

from __future__ import annotations

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_oneshot.distillation.agreement import average_of, build_agreement_loss, mask_disagreement

LABELS = {"num_heads": 3, "has_regions": False, "has_ignore": False}


def logits_of(labels: torch.Tensor, heads: int = 3) -> torch.Tensor:
    """Certain logits (B, heads, *spatial) for labels (B, 1, *spatial)."""
    return 20 * nn.functional.one_hot(labels[:, 0].long(), heads).movedim(-1, 1).float()


def label_loss(**dice):
    return DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, **dice}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )


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


def test_disagreeing_voxels_are_marked_and_no_others():
    target = torch.tensor([0, 1, 2, 1]).view(1, 1, 4, 1, 1)
    predicted = torch.tensor([0, 1, 1, 0]).view(1, 1, 4, 1, 1)
    assert mask_disagreement(target, logits_of(predicted), **LABELS).flatten().tolist() == [0, 1, 3, 3]


def test_without_a_prediction_every_label_counts():
    target = torch.randint(0, 3, (2, 1, 4, 4, 4))
    assert torch.equal(mask_disagreement(target, None, **LABELS), target)


def test_every_scale_of_deep_supervision_is_marked():
    target = [torch.ones(1, 1, 8, 8, 8), torch.ones(1, 1, 4, 4, 4)]
    wrong = logits_of(torch.zeros(1, 1, 8, 8, 8))
    assert [level.unique().tolist() for level in mask_disagreement(target, wrong, **LABELS)] == [[3], [3]]


def test_regions_disagree_where_any_of_them_does():
    target = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).view(1, 2, 3, 1)
    prediction = torch.tensor([[5.0, 5.0, -5.0], [5.0, 5.0, -5.0]]).view(1, 2, 3, 1)
    marked = mask_disagreement(target, prediction, num_heads=2, has_regions=True, has_ignore=False)
    assert marked.shape == (1, 3, 3, 1)
    assert marked[0, -1].flatten().tolist() == [False, True, False]


def test_the_datasets_own_ignore_channel_stays_ignored():
    target = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(1, 2, 2, 1)
    marked = mask_disagreement(target, None, num_heads=1, has_regions=True, has_ignore=True)
    assert marked[0, -1].flatten().tolist() == [False, True]


def test_marked_voxels_give_no_gradient():
    target = torch.tensor([0.0, 1.0, 2.0, 1.0]).view(1, 1, 2, 2, 1)
    loss = build_agreement_loss(label_loss(), num_heads=3, has_regions=False)
    output = torch.zeros(1, 3, 2, 2, 1, requires_grad=True)
    marked = target.clone()
    marked[..., 1, 1, :] = 3
    loss(output, marked).backward()
    assert not output.grad[:, :, 1, 1].any()
    assert output.grad[:, :, 0].any()


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_with_full_agreement_the_loss_is_nnunets(deep_supervision):
    own = label_loss()
    target, output = torch.randint(0, 3, (2, 1, 6, 6, 6)).float(), torch.randn(2, 3, 6, 6, 6)
    if deep_supervision:
        own = DeepSupervisionWrapper(own, [0.7, 0.3])
        target, output = [target, target], [output, output]
    loss = build_agreement_loss(own, num_heads=3, has_regions=False)
    assert torch.allclose(loss(output, target), own(output, target), atol=1e-5)


def test_region_loss_ignores_marked_voxels():
    own = DC_and_BCE_loss(
        {}, {"batch_dice": True, "do_bg": True, "smooth": 1e-5}, dice_class=MemoryEfficientSoftDiceLoss
    )
    loss = build_agreement_loss(own, num_heads=2, has_regions=True)
    output = torch.zeros(1, 2, 4, 4, 4, requires_grad=True)
    target = torch.zeros(1, 3, 4, 4, 4, dtype=torch.bool)
    target[:, 0, :2] = True
    target[:, 2, 3] = True
    loss(output, target).backward()
    assert not output.grad[:, :, 3].any()
    assert output.grad[:, :, 0].any()
