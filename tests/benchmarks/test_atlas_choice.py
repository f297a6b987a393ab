"""The benchmark of the suggested atlas on tiny data."""

from __future__ import annotations

import pytest
import torch

from nnunet_oneshot.benchmarks.atlas_choice import report, score_atlases
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.data.raw import find_dataset
from nnunet_oneshot.errors import OneShotError


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_atlases_are_scored_in_order_of_the_ranking(tiny_dataset):
    dataset = tiny_dataset(n_cases=5, shape=(12, 14, 12), labelled="all")
    config = RegistrationConfig(refine_iterations=(5,))
    scores = score_atlases(find_dataset(dataset.id), atlases=3, cases=2, config=config, show_progress=False)
    assert [score.ranked.rank for score in scores] == [1, 3, 5]
    assert all(0.3 < score.dice <= 1 for score in scores)
    text = report(scores)
    assert "Spearman" in text
    assert scores[0].ranked.case in text


def test_all_cases_must_be_labelled(tiny_dataset):
    dataset = tiny_dataset(n_cases=3, shape=(12, 12, 12))
    with pytest.raises(OneShotError, match="case_01, case_02 have no label"):
        score_atlases(find_dataset(dataset.id), show_progress=False)
