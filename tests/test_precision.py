"""The number format of training on a processor."""

import pytest
import torch
from torch import nn

from nnunet_oneshot.precision import Float32Loss, autocast, computes_bfloat16, uses_bfloat16

CPU = torch.device("cpu")


@pytest.fixture
def hardware(monkeypatch):
    """Sets what the processor is said to compute in hardware."""

    def pretend(**capabilities: bool) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return pretend


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16"])
def test_bfloat16_is_used_where_the_processor_computes_it(hardware, name):
    hardware(avx512_f=True, **{name: True})
    assert uses_bfloat16(CPU, "auto")
    assert not uses_bfloat16(CPU, "float32")
    assert not uses_bfloat16(torch.device("mps"), "auto")


def test_other_processors_compute_in_float32(hardware):
    hardware(avx512_f=True, avx512_bf16=False)
    assert not uses_bfloat16(CPU, "auto")


def test_a_torch_that_does_not_tell_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not computes_bfloat16()


def test_convolutions_run_in_the_format_of_the_context(hardware):
    layer, image = nn.Conv3d(1, 2, 3), torch.ones(1, 1, 4, 4, 4)
    hardware(avx512_bf16=True)
    with autocast(CPU, "auto"):
        assert layer(image).dtype == torch.bfloat16
    with autocast(CPU, "float32"):
        assert layer(image).dtype == torch.float32
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("deep", [False, True])
def test_losses_are_taken_in_float32(deep):
    seen = []

    def loss(outputs, target):
        outputs = outputs if deep else [outputs]
        seen.extend(output.dtype for output in outputs)
        return sum((output - target).abs().mean() for output in outputs)

    output = torch.full((1, 2), 1.0, dtype=torch.bfloat16)
    # 1 + 2^-10 has no bfloat16: there, the difference would be lost.
    target = torch.full((1, 2), 1.0 + 2**-10)
    value = Float32Loss(loss)([output, output] if deep else output, target)
    assert seen == [torch.float32] * (2 if deep else 1)
    assert value.item() == pytest.approx(2**-10 * (2 if deep else 1))
