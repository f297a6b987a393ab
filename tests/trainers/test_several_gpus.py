"""Trainings on two ranks: by nnU-Net's own command, and step by step."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from two_ranks import on_ranks, run_ddp

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.locks import free
from nnunet_oneshot.ranks import Ranks

PLANS = "nnUNetOneShotCPUPlans"
OTHERS = ["OneShotAtlasTrainer_1epoch", "OneShotPropagationTrainer_1epoch", "OneShotSynthesisTrainer_1epoch"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    settings = {
        "precision": "float32",
        "registration": {"refine_iterations": [3, 3, 2]},
        "distillation": {"rounds": [0.2], "hint_interval": 2, "hint_weight": 1.0},
    }
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(settings))
    # nnU-Net's command sets it for its processes.
    monkeypatch.delenv("MASTER_PORT", raising=False)


def make(preprocessed, name, **changes):
    """A trainer as nnU-Net makes it, with changes to the configuration of its plans."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    plans = json.loads((preprocessed / f"{PLANS}.json").read_text())
    plans["configurations"]["3d_fullres"].update(changes)
    plans["continue_training"] = False
    description = json.loads((preprocessed / "dataset.json").read_text())
    trainer = recursive_find_trainer_class_by_name(name)
    return trainer(plans, "3d_fullres", 0, description, torch.device("cpu"))


def vector(module, gradients=False):
    """All parameters of a module one after the other, or their gradients; none is zero."""
    values = [p.grad if gradients and p.grad is not None else p.detach() * (not gradients) for p in module.parameters()]
    return torch.cat([value.clone().flatten() for value in values])


def step(trainer, batch):
    """Gradients of student, teacher and projections after a step that moves nothing."""
    for optimizer in (trainer.optimizer, trainer.teacher_optimizer):
        optimizer.step = lambda: None
    trainer.current_epoch = 1
    trainer.train_step(batch)
    return [vector(m, True) for m in (trainer.network, trainer.distiller.teacher, trainer.distiller.projections)]


def gradients_of_a_half(preprocessed, batch, cases):
    found = []
    for changes in cases:
        trainer = make(preprocessed, "OneShotDistillTrainer_5epochs", **changes)
        trainer.initialize()
        part = slice(trainer.local_rank * trainer.batch_size, (trainer.local_rank + 1) * trainer.batch_size)
        own = {k: [level[part] for level in v] if isinstance(v, list) else v[part] for k, v in batch.items()}
        found.append(step(trainer, own))
    return found


def test_two_ranks_give_the_gradients_of_one_process(prepare, stubs, tmp_path):
    dataset = prepare()
    cases = [{"batch_size": 4, "batch_dice": batch_dice} for batch_dice in (False, True)]
    expected = []
    for changes in cases:
        trainer = make(dataset.preprocessed, "OneShotDistillTrainer_5epochs", **changes)
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
        expected.append(step(trainer, batch))
    for rank in on_ranks(gradients_of_a_half, tmp_path, dataset.preprocessed, batch, cases):
        for found, single in zip(rank, expected, strict=True):
            for two, one in zip(found, single, strict=True):
                assert one.abs().max() > 0
                torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def observed_training(preprocessed):
    """Trains and tells what must be the same in all ranks, and what must not."""
    import nnunet_oneshot.trainers.distill as module
    from nnunet_oneshot.registration.dataset.register import DatasetRegistrar

    registered, trust, drawn = [], [], []
    for name in ("register", "register_again"):
        method = getattr(DatasetRegistrar, name)

        def wrapped(*args, _name=name, _method=method, **named):
            registered.append(_name)
            return _method(*args, **named)

        setattr(DatasetRegistrar, name, wrapped)
    module.trust_in = lambda *dice: trust.append(np.nan_to_num(dice)) or np.ones(2)
    trainer = make(preprocessed, "OneShotDistillTrainer_5epochs", batch_size=3)
    inner = trainer.train_step
    trainer.train_step = lambda batch: drawn.append(batch) or inner(batch)
    trainer.run_training()
    same = {
        "networks": torch.cat([vector(m) for m in (trainer.network, trainer.distiller)]).numpy(),
        "averaged": vector(trainer.distiller.averaged).numpy(),
        "trust": np.stack(trust),
        "losses": np.array(trainer.logger.get_value("train_losses", None)),
        "dice": np.array(trainer.logger.get_value("mean_fg_dice", None)),
    }
    return {
        "same": same,
        "data": [batch["data"].numpy() for batch in drawn],
        "registered": registered,
        "oversample": trainer.oversample_foreground_percent,
    }


def test_ranks_share_all_but_their_patches(prepare, tmp_path, capfd):
    dataset = prepare()
    first, second = on_ranks(observed_training, tmp_path, dataset.preprocessed)
    for name, value in first["same"].items():
        np.testing.assert_array_equal(value, second["same"][name], err_msg=name)
    assert not np.array_equal(first["same"]["networks"], np.zeros(1)) and first["same"]["trust"].size
    assert first["registered"] == ["register", "register", "register_again"] and second["registered"] == []
    assert [len(rank["data"][0]) for rank in (first, second)] == [2, 1]
    # As nnU-Net does: the last third of a batch of three is centred on foreground.
    assert [rank["oversample"] for rank in (first, second)] == [0.0, 1.0]
    assert not any(np.array_equal(a[:1], b) for a, b in zip(first["data"], second["data"], strict=True))
    assert capfd.readouterr().out.count("Epoch 1") == 1
    (folder,) = dataset.results.glob("OneShotDistillTrainer_5epochs__*/fold_0")
    assert len(list(folder.glob("training_log_*"))) == 1
    assert sorted(p.name for p in folder.glob("*.pth")) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def train(dataset, name, monkeypatch, num_gpus=2, **options):
    from nnunetv2.run import run_training as command

    monkeypatch.setattr(command, "run_ddp", run_ddp)
    monkeypatch.setattr(command.mp, "spawn", partial(command.mp.start_processes, start_method="fork"))
    device = torch.device("cuda" if num_gpus > 1 else "cpu")
    command.run_training(str(dataset.id), "3d_fullres", 0, name, PLANS, num_gpus=num_gpus, device=device, **options)
    return dataset.results / f"{name}__{PLANS}__3d_fullres" / "fold_0"


def test_command_goes_on_with_a_training_of_one_process(prepare, short, monkeypatch):
    from nnunet_oneshot.trainers.base import OneShotTrainer

    dataset = prepare()
    name = "OneShotDistillTrainer_5epochs"
    original = OneShotTrainer.on_train_epoch_start

    def interrupted(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(OneShotTrainer, "on_train_epoch_start", interrupted)
        train(dataset, name, patch, num_gpus=1)
    # The end of its process would do so.
    (lock,) = dataset.results.rglob("training.lock")
    free(lock)
    folder = train(dataset, name, monkeypatch, continue_training=True, val_with_best=True)
    logging = torch.load(folder / "checkpoint_final.pth", weights_only=False)["logging"]
    assert len(logging["train_losses"]) == 2
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert {os.path.basename(case["prediction_file"])[:7] for case in summary["metric_per_case"]} == set(
        json.loads((dataset.preprocessed / "splits_final.json").read_text())[0]["val"]
    )
    assert not (folder / "training.lock").exists() and not list(folder.glob("*_teacher*.pth"))


def trained(preprocessed, names):
    found = []
    for name in names:
        trainer = make(preprocessed, name)
        trainer.run_training()
        found.append((vector(trainer.network), trainer.ranks.count))
    return found


def test_all_trainers_train(prepare, tmp_path):
    dataset = prepare(labelled=("case_00", "case_01", "case_02"))
    first, second = on_ranks(trained, tmp_path, dataset.preprocessed, OTHERS)
    for (one, count), (two, _) in zip(first, second, strict=True):
        assert count == 2 and torch.isfinite(one).all() and torch.equal(one, two)


def killed(preprocessed, when):
    from nnunet_oneshot.registration.dataset.register import DatasetRegistrar

    trainer = make(preprocessed, "OneShotSynthesisTrainer_5epochs")

    def end(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "registering" and trainer.local_rank == 0:
        DatasetRegistrar.register = end
    elif when == "training" and trainer.local_rank == 1:
        trainer.on_train_epoch_end = end
    trainer.run_training()


@pytest.mark.parametrize(("when", "survivor"), [("registering", 1), ("training", 0)])
def test_ranks_that_lose_one_say_so(when, survivor, prepare, tmp_path):
    found = on_ranks(killed, tmp_path, prepare().preprocessed, when)
    assert found[1 - survivor] is None
    assert found[survivor].startswith("OneShotError: Another of the 2 processes") and "--c" in found[survivor]


def ended_while_it_waits():
    """The first rank ends the second as nnU-Net's command does; returns how a forked worker ended before."""
    ranks = Ranks()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    worker.terminate()
    worker.join(30)
    pids = ranks.gathered([os.getpid()])
    try:
        ranks.once(lambda: os.kill(pids[1], signal.SIGTERM) or time.sleep(1))
    except OneShotError as error:
        return worker.exitcode, str(error)
    return worker.exitcode, "not missed"


def test_a_rank_that_nnunet_ends_says_so_even_while_it_waits(tmp_path, capfd):
    (code, message), nothing = on_ranks(ended_while_it_waits, tmp_path)
    assert code == -signal.SIGTERM and nothing is None and message.startswith("Another of the 2 processes")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: Process 1 of the 2 processes") and "its own message says why" in line


COMMAND = """
import multiprocessing, os, signal, time
from nnunet_oneshot.ranks import _tell_when_ended

def rank(late):
    if late:
        while os.getppid() == multiprocessing.parent_process().pid:
            time.sleep(0.01)
    else:
        _tell_when_ended(0, 2)
    print("ready", flush=True)
    _tell_when_ended(0, 2)
    time.sleep(60)

# As in the background of a script, where torch's own signal to its ranks is ignored.
signal.signal(signal.SIGINT, signal.SIG_IGN)
multiprocessing.get_context("fork").Process(target=rank, args=[LATE]).start()
if LATE:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize(("late", "sentence"), [(False, "was ended (SIGTERM)"), (True, "was killed: give it again")])
def test_a_rank_ends_with_its_command(late, sentence):
    code = COMMAND.replace("LATE", str(late))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    # Closed once the rank has ended too.
    assert sentence in process.communicate(timeout=30)[1]


def refused(preprocessed):
    (preprocessed / "splits_final.json").write_text("[]")
    make(preprocessed, "OneShotSynthesisTrainer_5epochs").run_training()


def test_what_stops_the_first_rank_is_told_by_all(prepare, tmp_path):
    for message in on_ranks(refused, tmp_path, prepare().preprocessed):
        assert message.startswith("OneShotError") and "splits_final.json holds no fold" in message


@pytest.mark.parametrize(("size", "batch_dice", "message"), [(1, False, "one sample"), (3, True, "equal parts")])
def test_batches_that_cannot_be_divided_are_refused(size, batch_dice, message, prepare, monkeypatch):
    dataset = prepare()
    monkeypatch.setattr(Ranks, "__init__", lambda self: setattr(self, "count", 2))
    with pytest.raises(OneShotError, match=message):
        make(dataset.preprocessed, "OneShotSynthesisTrainer_5epochs", batch_size=size, batch_dice=batch_dice)
    assert not dataset.results.exists()
