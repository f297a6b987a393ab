"""A tiny preprocessed dataset and trainers on it whose loaders are stubs, so that trainers are tested alone."""

from __future__ import annotations

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch

PLANS = "nnUNetOneShotCPUPlans"
_PREPARED: dict = {}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    from nnunet_oneshot.environment import TRAINER_FOLDER

    torch.set_num_threads(1)
    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))


@pytest.fixture(scope="session")
def _store(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture
def prepare(tiny_dataset, _store):
    """A function that makes a tiny dataset, plans and preprocesses it; equal ones are copied from the first."""
    from nnunet_oneshot.data.options import Options
    from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess
    from nnunet_oneshot.planners import OneShotCPUPlanner

    def make(configuration="3d_fullres", **settings):
        dataset = tiny_dataset(**{"labelled": "all", "n_cases": 6, **settings})
        key = json.dumps([configuration, settings], sort_keys=True)
        if key in _PREPARED:
            shutil.copytree(_PREPARED[key], dataset.preprocessed)
        else:
            options = Options(configurations=(configuration,), progress=False)
            plan_and_preprocess(dataset.id, OneShotCPUPlanner, options, log=lambda _: None)
            _PREPARED[key] = shutil.copytree(dataset.preprocessed, _store / str(len(_PREPARED)))
        return dataset

    return make


@pytest.fixture
def cascade(prepare):
    """A function that prepares a tiny dataset whose plans have a cascade of half the resolution."""
    from nnunet_oneshot.cli import main

    def make(**settings):
        dataset = prepare(**settings)
        path = dataset.preprocessed / f"{PLANS}.json"
        plans = json.loads(path.read_text())
        full = plans["configurations"]["3d_fullres"]
        spacing = [2 * edge for edge in full["spacing"]]
        low = {**full, "spacing": spacing, "data_identifier": f"{PLANS}_3d_lowres", "next_stage": "3d_cascade_fullres"}
        second = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
        plans["configurations"].update({"3d_lowres": low, "3d_cascade_fullres": second})
        path.write_text(json.dumps(plans))
        command = ["preprocess", "-d", str(dataset.id), "-p", PLANS, "-c", "3d_lowres", "--no_pbar"]
        assert main(command) == 0
        return dataset

    return make


@cache
def _found(name):
    """The class that nnU-Net finds; once, since its search fails where another thread is importing something."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    return recursive_find_trainer_class_by_name(name)


@pytest.fixture
def make_trainer():
    """A function that builds a trainer as ``nnUNetv2_train`` does."""

    def make(dataset, name, *, configuration="3d_fullres", fold=0, resume=False, edit=None):
        plans = json.loads((dataset.preprocessed / f"{PLANS}.json").read_text())
        if edit is not None:
            edit(plans)
        plans["continue_training"] = resume
        return _found(name)(
            plans=plans,
            configuration=configuration,
            fold=fold,
            dataset_json=json.loads((dataset.preprocessed / "dataset.json").read_text()),
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def short(monkeypatch):
    """Makes every trainer's epoch two iterations long and saves the latest checkpoint after each."""
    from nnunet_oneshot.trainers.base import OneShotTrainer

    original = OneShotTrainer.initialize

    def initialize(self):
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 1, 1
        original(self)

    monkeypatch.setattr(OneShotTrainer, "initialize", initialize)


class StubLoader:
    """Batches of noise in the layout of the one-shot loader; it keeps the arguments it was built with."""

    built: list[StubLoader] = []

    def __init__(self, prepared, registrations, *, settings, **arguments):
        arguments = self.arguments = {**vars(settings), **arguments, "registrations": registrations}
        self.random = np.random.RandomState(arguments["seed"] % 2**31)
        StubLoader.built.append(self)

    def __iter__(self):
        return self

    def __next__(self):
        size, number = self.arguments["initial_patch_size"], self.arguments["batch_size"]
        samples = [
            self.arguments["transforms"](
                image=torch.as_tensor(self.random.rand(1, *size), dtype=torch.float32),
                segmentation=torch.as_tensor(self.random.randint(0, 3, (1, *size)), dtype=torch.int16),
            )
            for _ in range(number)
        ]
        data = torch.stack([sample["image"] for sample in samples])
        segs = [sample["segmentation"] for sample in samples]
        if isinstance(segs[0], list):
            targets = [torch.stack(level) for level in zip(*segs, strict=True)]
        else:
            targets = torch.stack(segs)
        keys = list(self.arguments["cases"][:1]) * number
        return {
            "data": data,
            "target": targets,
            "real": data.flip(2),
            "from_real": torch.arange(number) % 2 < self.arguments["real_share"],
            "keys": keys,
        }


@pytest.fixture
def stubs(monkeypatch):
    """Replaces registration and loader; gives the loaders that are built and the arguments of registrations."""
    import nnunet_oneshot.trainers.warping as module
    from nnunet_oneshot.registration.dataset.register import DatasetRegistrar

    StubLoader.built = []
    registered = []
    monkeypatch.setattr(
        DatasetRegistrar, "register", lambda self, cases, **named: registered.append({"cases": cases, **named})
    )
    monkeypatch.setattr(
        DatasetRegistrar,
        "register_again",
        lambda self, cases, **named: registered.append({"cases": cases, **named}) or "guided",
    )
    monkeypatch.setattr(module, "build_oneshot_loader", StubLoader)
    return StubLoader.built, registered
