"""A tiny planned and preprocessed dataset for evaluation through the commands."""

import pytest
import torch

from nnunet_oneshot.cli import main

PLANS = "nnUNetOneShotCPUPlans"


@pytest.fixture
def prepared_dataset(tiny_dataset):
    """A function that makes a tiny dataset and plans and preprocesses it through the command."""
    torch.set_num_threads(1)

    def make(*, configuration="3d_fullres", **settings):
        dataset = tiny_dataset(**{"labelled": "all", "n_cases": 5, **settings})
        plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", configuration]
        assert main([*plan, "--no_pbar"]) == 0
        return dataset

    return make
