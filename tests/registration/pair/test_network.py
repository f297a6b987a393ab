"""The registration network: it starts at the identity, takes any shape, and learns to bring images together."""

import numpy as np
import pytest
import torch
from tiny_networks import configuration
from tiny_volumes import blobs

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.dataset.network_store import build_network
from nnunet_oneshot.registration.pair.functional import integrate_on, warp
from nnunet_oneshot.registration.pair.network import TrainingPairs, coarse_velocity, fit_network
from nnunet_oneshot.registration.pair.similarities import similarity_loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(19, 22), (13, 18, 11)])
def test_an_untrained_network_leaves_images_where_they_are(shape):
    network = build_network(configuration(len(shape)), 2)
    atlas, fixed = (torch.rand(3, 2, *shape) for _ in range(2))
    velocity, atlas_features, case_features = network(atlas, fixed)
    assert velocity.shape == (3, len(shape), *shape)
    assert velocity.abs().max() < 1e-2
    assert atlas_features.shape == case_features.shape == (3, 8)


def test_both_images_pass_the_same_encoder():
    network = build_network(configuration(2), 1)
    image = torch.rand(1, 1, 16, 16)
    _, atlas_features, case_features = network(image, image)
    assert torch.equal(atlas_features, case_features)


def trained(iterations, **settings):
    """A network trained on two pairs, and the dissimilarity of the pairs with its velocity fields."""
    atlas = torch.from_numpy(blobs((24, 20)))[None]
    fixed = [torch.from_numpy(np.roll(atlas[0].numpy(), shift, axis=1))[None] for shift in (2, 3)]
    mask = torch.ones_like(atlas)
    torch.manual_seed(0)
    network = build_network(configuration(2), 1)
    config = RegistrationConfig(
        method="network", network_iterations=iterations, network_learning_rate=1e-2, contrastive=0.0, **settings
    )
    losses = fit_network(
        network,
        TrainingPairs([atlas], [(1.0, 1.0)], [0, 0], lambda index: (fixed[index], mask)),
        config,
        seed=1,
        device=CPU,
        precision="float32",
    )
    with torch.no_grad():
        both = torch.cat(fixed)
        velocity = coarse_velocity(network(atlas.expand_as(both), both)[0], config)
        warped = warp(atlas.expand_as(both), integrate_on(velocity, both.shape[2:]))
    return losses, similarity_loss(warped, both)


def test_training_brings_images_together():
    losses, after = trained(80)
    _, before = trained(0)
    assert len(losses) == 80
    assert (after < before - 0.1).all()


def test_training_depends_on_its_seed_alone():
    assert trained(4)[0] == trained(4)[0]
