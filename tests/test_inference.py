"""Probabilities of whole images: what nnU-Net's outputs become, without copies of all labels."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_oneshot import inference


@pytest.mark.parametrize("regions", [False, True])
def test_outputs_become_probabilities_in_parts(regions, monkeypatch):
    logits = torch.randn(5, 6, 7, 8, generator=torch.Generator().manual_seed(0)).half()
    seen = []

    def probabilities(part):
        seen.append(part.numel())
        return part.sigmoid() if regions else part.softmax(0)

    predictor = SimpleNamespace(
        predict_logits_from_preprocessed_data=lambda image: logits.clone(),
        label_manager=SimpleNamespace(apply_inference_nonlin=probabilities, has_regions=regions),
    )
    whole = inference.foreground_probabilities(predictor, np.zeros((1, 6, 7, 8)))
    assert seen == [logits.numel()] and whole.dtype == np.float16
    assert whole.shape == ((5, 6, 7, 8) if regions else (4, 6, 7, 8)) and whole.min() >= 0 and whole.max() <= 1
    seen.clear()
    monkeypatch.setattr(inference, "_PART", 2 * logits[:, 0].numel())
    assert np.array_equal(inference.foreground_probabilities(predictor, np.zeros((1, 6, 7, 8))), whole)
    assert len(seen) == 3 and max(seen) == inference._PART


def test_the_likeliest_label_is_found_without_a_copy():
    random = np.random.default_rng(0)
    values = np.moveaxis(random.dirichlet(np.full(41, 0.1), (16, 16, 16)), -1, 0).astype(np.float16)
    foreground = np.ascontiguousarray(values[1:])
    tracemalloc.start()
    found = inference.likeliest_heads(foreground)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    background = 1 - foreground.sum(0, dtype=np.float32, keepdims=True)
    assert np.array_equal(found, np.concatenate([background, foreground]).argmax(0))
    assert len(np.unique(found)) == 41 and peak < 0.3 * foreground.nbytes
