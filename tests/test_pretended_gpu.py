"""On a pretended GPU: everything that runs on a device runs there, alike, and seldom waits for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pretended_gpu import OnGpu, PretendedGpu
from tiny_networks import ARCHITECTURES, configuration, student

from nnunet_oneshot.config import DistillationConfig, RegistrationConfig
from nnunet_oneshot.distillation.features import decoder_features
from nnunet_oneshot.distillation.functional import mask_patches
from nnunet_oneshot.distillation.hints import HINTS
from nnunet_oneshot.distillation.teacher import Distiller, build_teacher
from nnunet_oneshot.registration.pair import affine, functional
from nnunet_oneshot.registration.pair.network import RegistrationNetwork, TrainingPairs, fit_network
from nnunet_oneshot.registration.pair.registrar import AtlasRegistrar, register_arrays
from nnunet_oneshot.registration.pair.similarities import SIMILARITIES, similarity_loss
from nnunet_oneshot.self_training.averaging import average_of
from nnunet_oneshot.self_training.posterior import posterior_target

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which tests/test_cuda.py runs")

DEVICES = ("cpu", "cuda:0")


@pytest.fixture(autouse=True)
def gpu():
    torch.set_num_threads(1)
    functional.constants.cache_clear()
    with PretendedGpu() as pretended:
        yield pretended
    functional.constants.cache_clear()


def blobs(dim=3, seed=0, size=24):
    """Image (1, *shape) of a bright and a dark blob, and their labels (1, *shape)."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * dim, indexing="ij"))
    label = np.zeros([size] * dim, np.int64)
    for value in (1, 2):
        centre = size * (0.25 + 0.25 * value) + random.normal(0, 1, dim)
        label[((grid - centre.reshape(-1, *[1] * dim)) ** 2).sum(0) < (size / 5) ** 2] = value
    image = (label == 1) - 0.7 * (label == 2) + random.normal(0, 0.1, label.shape)
    return image[None].astype(np.float32), label[None]


def on_host(tensor):
    return tensor.cpu() if isinstance(tensor, OnGpu) else tensor


def alike(first, second):
    torch.testing.assert_close(on_host(first), on_host(second), rtol=1e-5, atol=1e-6)


def test_an_operation_between_both_devices_fails_and_waiting_is_counted(gpu):
    there = torch.ones(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    assert float(there.sum()) == 3 and gpu.waits.total() == 1
    assert there.device == torch.device("cuda", 0) and there[1:].device == there.device
    parameter = torch.nn.Parameter(torch.zeros(2).to("cuda:0"))
    (parameter * there[:2]).sum().backward()
    alike(parameter.grad, torch.ones(2))


@pytest.mark.parametrize("similarity", list(SIMILARITIES))
@pytest.mark.parametrize("dim", [2, 3])
def test_similarities(similarity, dim):
    first, second = (torch.from_numpy(blobs(dim, seed)[0])[None] for seed in range(2))
    found = []
    for device in DEVICES:
        moving = first.clone().to(device).requires_grad_()
        mask = torch.ones_like(moving.detach())
        loss = similarity_loss(moving, second.to(device), mask, similarity=similarity)
        loss.sum().backward()
        found.append((loss.detach(), moving.grad))
    alike(found[0][0], found[1][0])
    alike(found[0][1], found[1][1])


@pytest.mark.parametrize("metric", ["correlation", "mutual_information"])
def test_affine_registration_waits_no_more_for_more_steps(metric, gpu, monkeypatch):
    images = [blobs(seed=seed)[0] for seed in range(2)]
    found, waits = [], []
    for device, steps in (("cpu", 3), ("cuda:0", 3), ("cuda:0", 6)):
        monkeypatch.setattr(affine, "_STAGES", ((1_000, steps, 0.1), (2_000, steps, 0.1), (4_000, steps, 0.01)))
        gpu.waits.clear()
        spacings = {"fixed_spacing": [1.0] * 3, "moving_spacing": [1.0] * 3}
        found.append(affine.register_affine(*images, **spacings, metric=metric, device=device))
        waits.append(gpu.waits.total())
    np.testing.assert_allclose(found[0].matrix, found[1].matrix, rtol=1e-4, atol=1e-4)
    assert found[0].start == found[1].start
    assert waits[0] == 0 and 0 < waits[2] <= waits[1] + 1


@pytest.mark.parametrize("dim", [2, 3])
def test_a_pair_is_registered_alike_and_waits_no_more_for_more_steps(dim, gpu):
    (atlas, labels), (case, _) = blobs(dim), blobs(dim, 1)
    if dim == 2:
        atlas, labels, case = atlas[:, None], labels[:, None], case[:, None]
    found, waits, copies = [], [], []
    for device, steps in (("cpu", 3), ("cuda:0", 3), ("cuda:0", 9)):
        config = RegistrationConfig(affine=False, refine_iterations=(steps, steps), method="refine")
        gpu.waits.clear()
        gpu.copies = 0
        found.append(
            register_arrays(
                atlas,
                case,
                atlas_spacing=[1.0] * 3,
                case_spacing=[1.0] * 3,
                config=config,
                device=device,
                atlas_labels=labels,
            )
        )
        waits.append(gpu.waits.total())
        copies.append(gpu.copies)
    np.testing.assert_allclose(found[0].velocity, found[1].velocity, rtol=1e-4, atol=1e-4)
    assert waits[0] == 0 and 0 < waits[2] <= waits[1] and copies[2] <= copies[1]


def test_a_guided_pair_is_registered_alike():
    (atlas, labels), (case, case_labels) = blobs(), blobs(seed=1)
    maps = [np.stack([(seg[0] == value) for value in (1, 2)]).astype(np.float32) for seg in (labels, case_labels)]
    atlas_maps = np.concatenate([maps[0], np.ones_like(maps[0][:1])])
    found = []
    for device in DEVICES:
        config = RegistrationConfig(affine=False, refine_iterations=(3, 3))
        registrar = AtlasRegistrar("atlas", atlas, [1.0] * 3, config=config, device=torch.device(device))
        aligned = [registrar.align(case, [1.0] * 3)]
        guide = registrar.guide(atlas_maps, [maps[1]], aligned, np.array([1.0, 0.5]))
        found.append(registrar.deform(aligned, ["case"], [case.shape[1:]], guide=guide)[0])
    np.testing.assert_allclose(found[0].velocity, found[1].velocity, rtol=1e-4, atol=1e-4)
    assert found[0].quality["guide_dice_after"] == pytest.approx(found[1].quality["guide_dice_after"], abs=1e-4)


def test_a_registration_network_is_trained_alike_and_waits_no_more_for_more_steps(gpu):
    images = [torch.from_numpy(blobs(seed=seed, size=16)[0])[None] for seed in range(3)]
    found, waits = [], []
    for device, steps in (("cpu", 2), ("cuda:0", 2), ("cuda:0", 4)):
        torch.manual_seed(0)
        network = RegistrationNetwork(_unet(channels=1, outputs=3), 3).to(device)
        pairs = TrainingPairs(
            [images[0]], [[1.0] * 3], [0, 0], lambda pair: (images[1 + pair], torch.ones(1, 1, 16, 16, 16))
        )
        gpu.waits.clear()
        config = RegistrationConfig(network_iterations=steps)
        found.append(fit_network(network, pairs, config, seed=0, device=torch.device(device), precision="float32"))
        waits.append(gpu.waits.total())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert len(found[2]) == 4 and waits[2] == waits[1] == 1


def _unet(channels, outputs):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    manager = configuration(3)
    return get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        channels,
        outputs,
        deep_supervision=False,
    )


@pytest.mark.parametrize("hint", list(HINTS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_and_hint_are_alike(architecture, hint, gpu):
    synthetic, real = torch.rand(2, 2, 1, 16, 16, 16)
    found = []
    for device in DEVICES:
        torch.manual_seed(0)
        net = student(3, architecture).to(device)
        own = Distiller(build_teacher(configuration(3, architecture), 1), DistillationConfig(hint=hint)).to(device)
        own.follow(average_of(net, 0.9))
        gpu.waits.clear()
        loss, teacher = own.reconstruct(real.to(device))
        total = loss + own.hint(decoder_features(net, synthetic.to(device))[1], teacher, hint_weight=0.5)
        total.backward()
        own.averaged.update_parameters(net)
        assert gpu.waits.total() == 0
        found.append([total.detach(), next(own.teacher.parameters()).grad])
    alike(found[0][0], found[1][0])
    alike(found[0][1], found[1][1])


def test_masked_patches_lie_on_the_device():
    masked = mask_patches(torch.rand(2, 1, 16, 16, 16, device="cuda:0"), share=0.5, block=4)
    assert masked.device.type == "cuda"


@pytest.mark.parametrize("has_regions", [False, True])
def test_corrected_labels_are_alike(has_regions, gpu):
    image, labels = (torch.from_numpy(array)[None] for array in blobs())
    target = torch.cat([labels > 0, labels == 2], dim=1).float() if has_regions else labels
    levels = [target, target[..., ::2, ::2, ::2]]
    heads = 2 if has_regions else 3
    found = [
        posterior_target(
            image.to(device),
            [level.to(device) for level in levels],
            num_heads=heads,
            has_regions=has_regions,
            blur=1.0,
            strength=0.6,
        )
        for device in DEVICES
    ]
    assert not torch.equal(found[0][0], target)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, on_host(second))
