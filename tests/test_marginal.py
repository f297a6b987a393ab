"""The marginal loss: what is known in closed form, with nnU-Net's own losses behind it."""

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.nn.functional import cross_entropy

from nnunet_oneshot.marginal import merged_outputs

# Probabilities of background and three labels at one voxel.
P = torch.tensor([0.1, 0.2, 0.3, 0.4])


def logits(samples=1):
    return (P.log() + 1.5).view(1, 4, 1, 1, 1).repeat(samples, 1, 1, 1, 1)


def nnunet_loss(batch_dice, ignore_label=None):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


@pytest.mark.parametrize(
    ("hidden", "target", "probability"),
    [((), 0, 0.1), ((2,), 0, 0.4), ((1, 3), 0, 0.7), ((1, 2, 3), 0, 1.0), ((2,), 1, 0.2), ((1, 3), 2, 0.3)],
)
def test_cross_entropy_is_that_of_the_union_of_background_and_hidden_labels(hidden, target, probability):
    merged = merged_outputs(logits(), [hidden])
    found = cross_entropy(merged, torch.full((1, 1, 1, 1), target))
    assert found.item() == pytest.approx(-torch.tensor(probability).log().item(), abs=1e-6)


def test_the_gradient_is_that_of_the_marginal_likelihood():
    outputs = logits().requires_grad_()
    cross_entropy(merged_outputs(outputs, [(2, 3)]), torch.zeros(1, 1, 1, 1, dtype=torch.long)).backward()
    # d/dz_k of -log(p_0 + p_2 + p_3) is p_k - p_k / (p_0 + p_2 + p_3) inside of the union, and p_k outside.
    inside = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert torch.allclose(outputs.grad.flatten(), P - inside * P / 0.8, atol=1e-6)


def test_samples_without_hidden_labels_are_left_as_they_are():
    outputs = torch.randn(3, 4, 5, 6)
    assert merged_outputs(outputs, [(), (), ()]) is outputs
    merged = merged_outputs(outputs, [(), (1,), ()])
    assert torch.equal(merged[[0, 2]], outputs[[0, 2]]) and not torch.equal(merged[1], outputs[1])
    assert torch.equal(merged_outputs(merged, [(), (1,), ()]), merged)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_a_hidden_label_is_not_taught_as_background(batch_dice):
    """Whatever a network says of a hidden label, nnU-Net's loss of this sample neither changes nor has a gradient."""
    torch.manual_seed(0)
    target = torch.randint(0, 2, (1, 1, 4, 4, 4))
    loss = nnunet_loss(batch_dice)
    certain = torch.where(target.bool(), 8.0, -8.0)
    values = []
    for hidden_probability in (0.1, 0.5, 0.9):
        # Label 1 is found everywhere; elsewhere background and label 2 share what is left.
        left = torch.stack([torch.tensor(1 - hidden_probability), torch.tensor(hidden_probability)]).log()
        outputs = torch.cat([left[0].expand_as(certain), certain, left[1].expand_as(certain)], dim=1).requires_grad_()
        value = loss(merged_outputs(outputs, [(2,)]), target)
        value.backward()
        assert outputs.grad[:, 2].abs().max() < 1e-3
        values.append(value.item())
    assert max(values) - min(values) < 1e-5
    with pytest.raises(AssertionError):
        assert loss(outputs.detach(), target) == pytest.approx(values[-1], abs=0.1)


def test_dice_of_a_label_counts_the_samples_that_show_it():
    """With Dice over the batch, a label of one sample has the value that it has in this sample alone."""
    torch.manual_seed(0)
    outputs, target = torch.randn(2, 3, 6, 6, 6), torch.randint(0, 3, (2, 1, 6, 6, 6))
    target[1][target[1] == 2] = 0
    dice = MemoryEfficientSoftDiceLoss(torch.nn.Softmax(1), batch_dice=True, do_bg=False, smooth=0, ddp=False)
    both = dice(merged_outputs(outputs, [(), (2,)]), target)
    probabilities = merged_outputs(outputs, [(), (2,)]).softmax(1)
    expected = []
    for label, samples in ((1, [0, 1]), (2, [0])):
        p, t = probabilities[samples, label], (target[samples, 0] == label).float()
        expected.append(2 * (p * t).sum() / (p.sum() + t.sum()))
    assert both.item() == pytest.approx(-torch.stack(expected).mean().item(), abs=1e-6)


def test_deep_supervision_ignored_voxels_and_half_precision():
    torch.manual_seed(0)
    outputs = [torch.randn(2, 3, 8, 8).half(), torch.randn(2, 3, 4, 4).half()]
    targets = [torch.randint(0, 4, (2, 1, 8, 8)), torch.randint(0, 4, (2, 1, 4, 4))]
    for target in targets:
        target[1][target[1] == 2] = 0
    loss = DeepSupervisionWrapper(nnunet_loss(True, ignore_label=3), [0.6, 0.4])
    value = loss(merged_outputs(outputs, [(), (2,)]), targets)
    assert torch.isfinite(value)
    changed = [output.clone() for output in outputs]
    for output, target in zip(changed, targets, strict=True):
        # What is ignored stays ignored.
        output[(target == 3).expand_as(output)] += 1
    assert loss(merged_outputs(changed, [(), (2,)]), targets).item() == pytest.approx(value.item(), abs=1e-6)
