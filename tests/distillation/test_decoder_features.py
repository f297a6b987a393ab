"""Features of the decoder: equal outputs, order, and networks that have none."""

import pytest
import torch
from tiny_networks import ARCHITECTURES, student

from nnunet_oneshot.distillation.features import decoder_features, feature_channels
from nnunet_oneshot.errors import OneShotError


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_equal_the_forward_pass(architecture, dim, deep_supervision):
    network = student(dim, architecture, deep_supervision=deep_supervision)
    x = torch.rand(2, 1, *[16] * dim)
    expected = network(x)
    outputs, _ = decoder_features(network, x)
    if deep_supervision:
        assert len(outputs) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    else:
        assert torch.equal(outputs, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_come_from_full_resolution_downwards(architecture):
    network = student(3, architecture)
    outputs, features = decoder_features(network, torch.rand(1, 1, 16, 8, 8))
    assert [tuple(f.shape) for f in features] == [(1, 4, 16, 8, 8), (1, 6, 8, 4, 4)]
    assert feature_channels(network) == [4, 6]
    assert torch.equal(network.decoder.seg_layers[-1](features[0]), outputs[0])


def test_deep_supervision_is_respected_when_it_is_switched():
    network = student(2)
    network.decoder.deep_supervision = False
    outputs, _ = decoder_features(network, torch.rand(1, 1, 8, 8))
    assert isinstance(outputs, torch.Tensor)


@pytest.mark.parametrize("function", [lambda n: decoder_features(n, torch.rand(1, 1, 8, 8)), feature_channels])
def test_network_without_decoder_is_refused(function):
    with pytest.raises(OneShotError, match="Sequential.*OneShotSynthesisTrainer"):
        function(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)))


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_it_compiles_to_one_graph(deep_supervision):
    network = student(2, deep_supervision=deep_supervision)
    compiled = torch.compile(decoder_features, backend="aot_eager", fullgraph=True)
    x = torch.rand(1, 1, 16, 16)
    outputs, features = compiled(network, x)
    expected, expected_features = decoder_features(network, x)
    first = outputs[0] if deep_supervision else outputs
    assert torch.allclose(first, expected[0] if deep_supervision else expected, atol=1e-6)
    (first.mean() + features[1].mean()).backward()
    assert all(p.grad is not None for p in network.encoder.parameters())
    assert torch.allclose(features[0], expected_features[0], atol=1e-6)
