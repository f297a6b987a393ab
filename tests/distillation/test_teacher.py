"""Teacher, projections and the direction of their gradients in a training step."""

import pytest
import torch
from tiny_networks import ARCHITECTURES, configuration, student

from nnunet_oneshot.config import DistillationConfig
from nnunet_oneshot.distillation.features import decoder_features
from nnunet_oneshot.distillation.teacher import Distiller, FeatureProjection, build_teacher

FORMS = ["voxel", "voxel_raw", "global"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def distiller(dim=2, architecture="PlainConvUNet", channels=1, **settings):
    teacher = build_teacher(configuration(dim, architecture), channels)
    return Distiller(teacher, DistillationConfig(**settings))


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None]


def moved(module):
    return any(g.abs().sum() > 0 for g in gradients(module))


def batch(dim=2, channels=1):
    return torch.rand(2, channels, *[16] * dim), torch.rand(2, channels, *[16] * dim)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_returns_the_image_channels(architecture, dim):
    teacher = build_teacher(configuration(dim, architecture), 2)
    x = torch.rand(1, 2, *[16] * dim)
    assert teacher(x).shape == x.shape


def losses_of(own, net, synthetic, real, *, hint_weight=1.0):
    reconstruction, teacher = own.reconstruct(real)
    return own.hint(decoder_features(net, synthetic)[1], teacher, hint_weight=hint_weight), reconstruction


@pytest.mark.parametrize("form", FORMS)
def test_hint_moves_the_student_and_never_the_teacher(form):
    own, net = distiller(hint=form), student(2)
    losses_of(own, net, *batch())[0].backward()
    assert moved(net)
    assert not gradients(own.teacher)
    assert moved(own.projections) == (form == "voxel")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("detach", "moves"), [("student", (False, True)), ("none", (True, True))])
def test_the_hint_moves_the_side_that_is_not_detached(form, detach, moves):
    own, net = distiller(hint=form, detach=detach), student(2)
    losses_of(own, net, *batch())[0].backward()
    assert (moved(net), moved(own.teacher)) == moves
    assert moved(own.projections) == (form == "voxel")


def test_hint_weight_scales_the_gradient_of_the_teacher_too():
    own, net = distiller(hint="voxel_raw", detach="none"), student(2)
    images = batch()
    norms = {}
    for weight in (1.0, 0.25):
        net.zero_grad()
        own.zero_grad()
        losses_of(own, net, *images, hint_weight=weight)[0].backward()
        norms[weight] = [torch.stack([g.norm() for g in gradients(m)]).norm().item() for m in (net, own.teacher)]
    assert norms[0.25] == pytest.approx([0.25 * norm for norm in norms[1.0]], rel=1e-4)


def test_reconstruction_moves_the_teacher_alone():
    own, net = distiller(), student(2)
    losses_of(own, net, *batch())[1].backward()
    assert moved(own.teacher)
    assert not gradients(net)
    assert not gradients(own.projections)


def test_weight_zero_leaves_the_student_alone_while_projections_learn():
    own, net = distiller(), student(2)
    losses_of(own, net, *batch(), hint_weight=0.0)[0].backward()
    assert not gradients(net)
    assert moved(own.projections)


def test_hint_weight_scales_the_gradient_of_the_student_only():
    own, net = distiller(), student(2)
    images = batch()
    norms = {}
    for weight in (1.0, 0.5):
        net.zero_grad()
        own.zero_grad()
        losses_of(own, net, *images, hint_weight=weight)[0].backward()
        norms[weight] = [torch.stack([g.norm() for g in gradients(m)]).norm().item() for m in (net, own.projections)]
    assert norms[0.5][0] == pytest.approx(0.5 * norms[1.0][0], rel=1e-4)
    assert norms[0.5][1] == pytest.approx(norms[1.0][1], rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_training_aligns_the_features(form):
    own, net = distiller(hint=form), student(2)
    images = batch()
    optimizer = torch.optim.Adam([*net.parameters(), *own.projections.parameters()], lr=1e-2)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        hint, _ = losses_of(own, net, *images)
        hint.backward()
        optimizer.step()
        history.append(hint.item())
    assert history[-1] < 0.8 * history[0]


def test_no_hint_leaves_reconstruction():
    hint, reconstruction = losses_of(distiller(hint="none"), student(2), *batch())
    assert hint.item() == 0
    assert reconstruction.item() > 0


def test_hint_is_the_sum_over_levels():
    images, net = batch(), student(2)
    two = distiller(hint="global", levels=2)
    one = Distiller(two.teacher, DistillationConfig(hint="global", levels=1))
    more = Distiller(two.teacher, DistillationConfig(hint="global", levels=9))
    values = [losses_of(d, net, *images)[0].item() for d in (one, two, more)]
    assert 0 < values[0] < values[1] == values[2]


def test_reconstruction_weight_multiplies():
    _, real = batch()
    single = distiller(reconstruction_weight=1.0)
    triple = Distiller(single.teacher, DistillationConfig(reconstruction_weight=3.0))
    assert triple.reconstruct(real)[0].item() == pytest.approx(3 * single.reconstruct(real)[0].item())


def test_corruption_changes_what_the_teacher_sees_not_its_target():
    seen = []

    def spy(network, x):
        seen.append(x)
        return decoder_features(network, x)

    real = torch.rand(1, 1, 16, 16)
    config = DistillationConfig(corruption=0.5, corruption_block=4)
    own = Distiller(build_teacher(configuration(2), 1), config, features=spy)
    loss, _ = own.reconstruct(real)
    assert (seen[0] != real).float().mean().item() == pytest.approx(0.5)
    assert loss.item() == pytest.approx((own.teacher(seen[0]) - real).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("warmup", "progress", "expected"),
    [(0.2, 0.0, 0.0), (0.2, 0.1, 0.05), (0.2, 0.2, 0.1), (0.2, 1.0, 0.1), (0, 0, 0.1)],
)
def test_hint_rises_linearly(warmup, progress, expected):
    own = distiller(hint_weight=0.1, warmup_epochs=warmup)
    assert own.hint_weight(progress) == pytest.approx(expected)


@pytest.mark.parametrize(("conv_op", "spatial"), [(torch.nn.Conv2d, (5, 4)), (torch.nn.Conv3d, (5, 4, 3))])
def test_projection_keeps_the_shape_and_mixes_no_places(conv_op, spatial):
    projection = FeatureProjection(conv_op, 3)
    x = torch.rand(1, 3, *spatial)
    y = x.clone()
    y[(..., *[0] * len(spatial))] += 1
    changed = (projection(x) != projection(y)).any(1)
    assert projection(x).shape == x.shape
    assert changed.sum() == 1
