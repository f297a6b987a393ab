"""Closed forms of the distillation losses, and which side their gradients reach."""

import pytest
import torch

from nnunet_oneshot.distillation.functional import (
    global_cosine_hint,
    mask_patches,
    reconstruction_loss,
    scale_gradient,
    voxel_cosine_hint,
)

HINTS = [global_cosine_hint, voxel_cosine_hint]


@pytest.fixture
def features():
    return torch.rand(2, 4, 3, 5, 2, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("hint", HINTS)
def test_identical_features_cost_nothing(hint, features):
    assert hint(features, features).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hint", HINTS)
def test_scale_of_the_features_does_not_matter(hint, features):
    assert hint(3 * features, 0.2 * features).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hint", HINTS)
def test_opposite_features_cost_two(hint, features):
    assert hint(features, -features).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("hint", HINTS)
def test_orthogonal_features_cost_one(hint):
    student, teacher = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    student[:, 0], teacher[:, 1] = 1, 1
    assert hint(student, teacher).item() == pytest.approx(1, abs=1e-6)


def test_forms_differ_where_few_places_dominate():
    student, teacher = torch.ones(1, 1, 10, 10), -torch.ones(1, 1, 10, 10)
    student[..., 0, 0] = teacher[..., 0, 0] = 1e3
    assert voxel_cosine_hint(student, teacher).item() == pytest.approx(2 * 0.99, abs=1e-5)
    assert global_cosine_hint(student, teacher).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("hint", [*HINTS, reconstruction_loss])
def test_shapes_must_agree(hint, features):
    with pytest.raises(ValueError, match="one shape"):
        hint(features, features[:1])


@pytest.mark.parametrize("hint", HINTS)
def test_gradient_is_the_same_from_either_side(hint, features):
    student = features.clone().requires_grad_()
    teacher = features.flip(1).clone().requires_grad_()
    both = torch.autograd.grad(hint(student, teacher), (student, teacher))
    swapped = torch.autograd.grad(hint(teacher, student), (student, teacher))
    for own, other in zip(both, swapped, strict=True):
        assert own.abs().sum() > 0
        assert torch.allclose(own, other, atol=1e-7)


@pytest.mark.parametrize("loss", [*HINTS, reconstruction_loss])
def test_half_precision_is_computed_in_full(loss):
    large = torch.full((1, 2, 64, 64), 200.0, dtype=torch.float16)
    result = loss(large, large)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("loss", [*HINTS, reconstruction_loss])
def test_autocast_does_not_lower_the_precision(loss, features):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(features, features.flip(1)).dtype == torch.float32


def test_reconstruction_is_the_mean_square():
    assert reconstruction_loss(torch.full((2, 1, 4), 3.0), torch.ones(2, 1, 4)).item() == pytest.approx(4)


def test_masking_nothing_and_everything():
    image = torch.rand(2, 3, 8, 7, 5)
    assert mask_patches(image, share=0.0, block=4) is image
    mean = image.mean(dim=(2, 3, 4), keepdim=True).expand_as(image)
    assert torch.equal(mask_patches(image, share=1.0, block=4), mean)


@pytest.mark.parametrize("spatial", [(8, 8), (8, 8, 8)])
def test_masked_share_is_exact_and_shared_by_channels(spatial):
    image = torch.rand(3, 2, *spatial)
    changed = mask_patches(image, share=0.5, block=4) != image
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert changed.flatten(1).float().mean(1).tolist() == pytest.approx([0.5] * 3)


def test_masking_repeats_with_the_seed():
    image = torch.rand(1, 1, 16, 16)
    masked = [mask_patches(image, share=0.3, block=4, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*masked)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_scaled_gradient_keeps_the_values(factor):
    x = torch.ones(3, requires_grad=True)
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    (y * torch.ones(3, requires_grad=True)).sum().backward()
    assert (0 if x.grad is None else x.grad[0].item()) == pytest.approx(factor)
