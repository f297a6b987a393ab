"""``nnUNetv2_train -pretrained_weights`` with the one-shot trainers."""

import json

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

NAMES = ["OneShotAtlasTrainer_5epochs", "OneShotSynthesisTrainer_5epochs", "OneShotDistillTrainer_5epochs"]
PLANS = "nnUNetOneShotCPUPlans"


def stock_checkpoint(dataset, **_):
    """What nnU-Net's own trainer saves."""
    plans = json.loads((dataset.preprocessed / f"{PLANS}.json").read_text())
    description = json.loads((dataset.preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", 0, description, torch.device("cpu"))
    trainer.initialize()
    return saved(trainer)


def own_checkpoint(dataset, make_trainer):
    trainer = make_trainer(dataset, "OneShotDistillTrainer_1epoch")
    trainer.initialize()
    for parameter in trainer.network.parameters():
        parameter.data.add_(0.1)
    trainer.distiller.averaged.update_parameters(trainer.network)
    return saved(trainer)


def saved(trainer):
    path = f"{trainer.output_folder}/checkpoint_final.pth"
    trainer.save_checkpoint(path)
    return path


def body(network):
    """The weights but those of the segmentation layers, which nnU-Net does not take over."""
    return {name: value.clone() for name, value in network.state_dict().items() if ".seg_layers." not in name}


@pytest.mark.parametrize("checkpoint", [stock_checkpoint, own_checkpoint])
@pytest.mark.parametrize("name", NAMES)
def test_the_student_starts_from_them_and_the_teacher_does_not(name, checkpoint, prepare, make_trainer):
    dataset = prepare()
    path = checkpoint(dataset, make_trainer=make_trainer)
    trainer, other = make_trainer(dataset, name), make_trainer(dataset, name)
    other.initialize()
    maybe_load_checkpoint(trainer, False, False, path)
    wanted = torch.load(path, weights_only=False)["network_weights"]
    found = body(trainer.network)
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    assert not all(torch.equal(value, body(other.network)[key]) for key, value in found.items())
    if "Distill" in name:
        pairs = zip(trainer.distiller.teacher.parameters(), other.distiller.teacher.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_the_average_begins_with_them(prepare, make_trainer, short, stubs):
    dataset = prepare()
    path = own_checkpoint(dataset, make_trainer)
    trainer = make_trainer(dataset, "OneShotDistillTrainer_5epochs")
    maybe_load_checkpoint(trainer, False, False, path)
    trainer.optimizer.step = lambda: None
    trainer.train_step(next(trainer.get_dataloaders()[0]))
    wanted = body(trainer.network)
    assert all(torch.equal(value, wanted[key]) for key, value in body(trainer.distiller.averaged.module).items())


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda weights: {k: v for k, v in weights.items() if k.startswith("encoder.")}, "decoder.* is missing"),
        (lambda weights: {k: v[..., :1] for k, v in weights.items()}, "shape"),
    ],
    ids=["an encoder alone, as nnssl writes it", "another topology"],
)
def test_what_does_not_fit_is_refused_by_nnunet(keep, message, prepare, make_trainer, tmp_path):
    dataset = prepare()
    content = torch.load(own_checkpoint(dataset, make_trainer), weights_only=False)
    path = tmp_path / "pretrained.pth"
    torch.save({**content, "network_weights": keep(content["network_weights"])}, path)
    trainer = make_trainer(dataset, "OneShotDistillTrainer_5epochs")
    with pytest.raises(AssertionError, match=message):
        maybe_load_checkpoint(trainer, False, False, str(path))
