"""How nnU-Net finds the trainers, and what Python needs to pickle them."""

import inspect
import multiprocessing
import pickle

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

import nnunet_oneshot.trainers as trainers
from nnunet_oneshot.locks import WorkerContext

KINDS = [
    *("OneShotAtlasTrainer", "OneShotPropagationTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer"),
    *("OneShotSupervisedAtlasTrainer", "OneShotSupervisedTrainer"),
]
LENGTHS = ["1epoch", "5epochs", "10epochs", "20epochs", "50epochs", "100epochs", "250epochs", "500epochs"]
NAMES = KINDS + [f"{kind}_{length}" for kind in KINDS for length in LENGTHS]


def test_every_name_is_exported_and_no_other():
    assert sorted(trainers.__all__) == sorted(NAMES)


@pytest.mark.parametrize("name", trainers.__all__)
def test_class_pickles_by_name(name):
    trainer = getattr(trainers, name)
    assert trainer.__name__ == trainer.__qualname__ == name
    assert pickle.loads(pickle.dumps(trainer)) is trainer


@pytest.mark.parametrize("name", trainers.__all__)
def test_signature_is_that_of_nnunet(name):
    expected = list(inspect.signature(nnUNetTrainer.__init__).parameters)
    assert list(inspect.signature(getattr(trainers, name).__init__).parameters) == expected


@pytest.mark.parametrize("name", trainers.__all__)
def test_name_says_the_number_of_epochs(name):
    number = int(name.split("_")[1].removesuffix("epochs").removesuffix("epoch")) if "_" in name else 1000
    assert getattr(trainers, name).epochs == number


@pytest.mark.parametrize("name", ["OneShotDistillTrainer", "OneShotAtlasTrainer_5epochs"])
def test_nnunet_finds_it_by_name(name):
    found = recursive_find_trainer_class_by_name(name)
    assert found is getattr(trainers, name)
    assert pickle.loads(pickle.dumps(found)) is found


def test_workers_of_a_command_that_has_found_it_end_with_the_command():
    recursive_find_trainer_class_by_name("OneShotDistillTrainer")
    assert multiprocessing.get_context("spawn").Process is WorkerContext.Process
