"""The distilling trainer's step, and the teacher's file beside the checkpoints."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset.cache import GuidedRegistrations
from nnunet_oneshot.report.training import read_training

NAME = "OneShotDistillTrainer_5epochs"


@pytest.fixture
def trainer(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(hint_weight=1.0))
    trainer.initialize()
    return trainer


def copies(*modules):
    return [torch.cat([p.detach().clone().flatten() for p in module.parameters()]) for module in modules]


def files(folder):
    return sorted(file for file in os.listdir(folder) if file.endswith(".pth"))


def test_step_moves_student_teacher_and_projections(trainer):
    loader, _ = trainer.get_dataloaders()
    trainer.current_epoch = 4
    parts = (trainer.network, trainer.distiller.teacher, trainer.distiller.projections)
    before = copies(*parts)
    losses = trainer.train_step(next(loader))
    assert set(losses) == {"loss", "hint", "reconstruction"}
    assert all(not torch.equal(a, b) for a, b in zip(before, copies(*parts), strict=True))


def gradients_of_a_step(trainer, batch, **settings):
    """Student's gradients after a step whose optimisers do not move anything."""
    from dataclasses import replace

    trainer.distiller.config = replace(trainer.distiller.config, **settings)
    for optimizer in (trainer.optimizer, trainer.teacher_optimizer):
        optimizer.step = lambda: None
    trainer._step_of_epoch = 0
    trainer.train_step(batch)
    student, teacher = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (trainer.network, trainer.distiller.teacher)
    )
    return student, teacher


def test_hint_reaches_the_student_and_not_the_teacher(trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.current_epoch = 4
    plain = gradients_of_a_step(trainer, batch, hint_weight=0.0)
    hinted = gradients_of_a_step(trainer, batch, hint_weight=1.0)
    assert not torch.allclose(plain[0], hinted[0])
    assert torch.allclose(plain[1], hinted[1])


def test_reconstruction_reaches_the_teacher_and_not_the_student(trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.current_epoch = 4
    none = gradients_of_a_step(trainer, batch, reconstruction_weight=0.0)
    full = gradients_of_a_step(trainer, batch, reconstruction_weight=1.0)
    assert torch.allclose(none[0], full[0])
    assert none[1].abs().max() == 0 < full[1].abs().max()


@pytest.mark.parametrize(("detach", "moves"), [("student", (False, True)), ("none", (True, True))])
def test_hint_reaches_the_side_that_is_not_detached(detach, moves, trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.current_epoch = 4
    plain = gradients_of_a_step(trainer, batch, detach=detach, hint_weight=0.0)
    hinted = gradients_of_a_step(trainer, batch, detach=detach, hint_weight=1.0)
    assert tuple(not torch.allclose(a, b) for a, b in zip(plain, hinted, strict=True)) == moves


def test_with_both_moved_the_reconstruction_still_reaches_the_teacher(trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.current_epoch = 4
    none = gradients_of_a_step(trainer, batch, detach="none", reconstruction_weight=0.0)
    full = gradients_of_a_step(trainer, batch, detach="none", reconstruction_weight=1.0)
    assert torch.allclose(none[0], full[0]) and not torch.allclose(none[1], full[1])


def teacher_first(**settings):
    settings = {"hint_weight": 1.0, "teacher_first": 0.4, "rounds": [], **settings}
    return lambda plans: plans["oneshot"]["distillation"].update(settings)


@pytest.mark.parametrize("hint", ["voxel", "global"])
def test_a_teacher_that_comes_first_stays_as_it_is(hint, prepare, make_trainer, short, stubs, monkeypatch):
    built, _ = stubs
    trainer = make_trainer(prepare(), NAME, edit=teacher_first(hint=hint))
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parts = (trainer.network, trainer.distiller.teacher)
    before = copies(*parts)
    trainer.on_train_start()
    after = copies(*parts)
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert "alone for 4 iterations" in Path(trainer.log_file).read_text()
    assert built[1].arguments["seed"] == built[3].arguments["seed"]
    trainer.current_epoch = 4
    trainer.on_train_epoch_start()
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert losses["hint"] > 0 and losses["reconstruction"] > 0
    last = copies(*parts)
    assert not torch.equal(after[0], last[0]) and torch.equal(after[1], last[1])


def test_a_resumed_training_does_not_train_the_teacher_first_again(prepare, make_trainer, short, stubs):
    dataset = prepare()
    first = make_trainer(dataset, NAME, edit=teacher_first())
    first.on_train_start()
    first.on_train_epoch_start()
    first.train_step(next(first.dataloader_train))
    first.save_checkpoint(latest(first))
    second = make_trainer(dataset, NAME, resume=True, edit=teacher_first())
    second.load_checkpoint(latest(first))
    second.on_train_start()
    assert torch.equal(*(copies(t.distiller.teacher)[0] for t in (first, second)))
    second.on_train_epoch_start()
    second.train_step(next(second.dataloader_train))
    assert torch.equal(*(copies(t.distiller.teacher)[0] for t in (first, second)))


def test_without_hint_and_real_patches_the_student_is_that_of_synthesis(prepare, make_trainer, stubs, short):
    dataset = prepare()
    weights = []
    for name in ("OneShotSynthesisTrainer_1epoch", "OneShotDistillTrainer_1epoch"):
        settings = {"hint": "none", "real_share": 0.0}
        trainer = make_trainer(dataset, name, edit=lambda p, s=settings: p["oneshot"]["distillation"].update(s))
        trainer.run_training()
        weights.append(copies(trainer.network)[0])
    assert torch.equal(*weights)


def test_a_teacher_that_nobody_hears_is_not_trained(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(hint="none"))
    trainer.initialize()
    before = copies(trainer.network, trainer.distiller.teacher)
    losses = trainer.train_step(next(trainer.get_dataloaders()[0]))
    after = copies(trainer.network, trainer.distiller.teacher)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert set(losses) == {"loss"} and losses["loss"] > 0


def test_teacher_and_hint_take_part_in_one_of_so_many_steps(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(hint_interval=3))
    trainer.initialize()
    trainer.on_train_epoch_start()
    loader = trainer.get_dataloaders()[0]
    moved = []
    for _ in range(7):
        before = copies(trainer.distiller.teacher)[0]
        losses = trainer.train_step(next(loader))
        moved.append(not torch.equal(before, copies(trainer.distiller.teacher)[0]))
        assert ("hint" in losses) == ("reconstruction" in losses) == moved[-1]
    assert moved == [True, False, False, True, False, False, True]


def test_teacher_learns_to_reconstruct(trainer):
    batch = next(trainer.get_dataloaders()[0])
    values = []
    for _ in range(12):
        trainer._step_of_epoch = 0
        values.append(float(trainer.train_step(batch)["reconstruction"]))
    assert values[-1] < 0.7 * values[0]


def state(trainer):
    return {name: value.clone() for name, value in trainer.distiller.averaged.module.state_dict().items()}


def keeping(monkeypatch, numbers):
    """Lets rounds keep so many guided registrations, one number a round."""
    wanted = iter(numbers)

    def kept_of(first, guided, pairs):
        return GuidedRegistrations(first, guided, frozenset(sorted(pairs)[: next(wanted)]))

    monkeypatch.setattr("nnunet_oneshot.trainers.distill.kept_of", kept_of)


def test_student_guides_the_registrations_from_the_first_round_on(prepare, make_trainer, short, stubs, monkeypatch):
    built, registered = stubs
    settings = {"real_share": 0.5, "rounds": [0.4, 0.7], "round_cases": 2}
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(settings))
    answers = iter([(np.array([0.9, 0.3]), np.ones(2)), (np.ones(2), np.array([0.7, 0.8]))])
    monkeypatch.setattr(trainer, "_compare", lambda progress: next(answers))
    keeping(monkeypatch, [1, 2])
    weights = []
    original = trainer.on_train_epoch_start
    monkeypatch.setattr(trainer, "on_train_epoch_start", lambda: weights.append(state(trainer)) or original())
    trainer.run_training()
    progress, training = built[::2], built[1::2]
    assert [loader.arguments["real_share"] for loader in training] == [0.5] * 3
    first, *later = (loader.arguments["registrations"] for loader in training)
    assert first is None and [(chosen.guided, len(chosen.kept)) for chosen in later] == [("guided", 1), ("guided", 2)]
    assert [loader.arguments["registrations"] for loader in progress] == [None] * 3
    assert len({loader.arguments["seed"] for loader in training}) == 3
    rounds = [arguments for arguments in registered if "guide" in arguments]
    cases = rounds[0]["cases"]
    assert len(cases) == 2 and set(cases) <= set(trainer.roles.unlabelled)
    assert [arguments["cases"] for arguments in rounds] == [cases] * 2
    assert [loader.arguments["real_cases"] for loader in training] == [None, cases, cases]
    for epoch, trust, arguments in zip((2, 4), ([0.9, 0.0], [0.7, 0.8]), rounds, strict=True):
        first, guide, folder = (arguments[name] for name in ("first", "guide", "folder"))
        assert guide.trust == pytest.approx(trust)
        assert first is None
        assert Path(folder).parent == Path(trainer.output_folder)
        digest = guide.digest
        vars(guide).pop("digest")
        guide.trust = guide.trust + 0.1
        assert guide.digest != digest
        values = guide._predictor.list_of_parameters[0]
        assert all(torch.equal(values[name], value) for name, value in weights[epoch].items())
    # The page about a training reads these sentences of the log.
    shown = read_training(Path(trainer.output_folder))
    assert [(r.epoch, r.trust, r.kept[0]) for r in shown.rounds] == [(2, (0.9, 0.0), 1), (4, (0.7, 0.8), 2)]
    assert shown.is_finished and shown.epochs == 5 and np.isfinite(shown.terms["reconstruction"]).all()


def test_a_round_that_improves_nothing_is_not_repeated(prepare, make_trainer, short, stubs, monkeypatch):
    built, registered = stubs
    settings = {"rounds": [0.4, 0.7]}
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(settings))
    monkeypatch.setattr(trainer, "_compare", lambda progress: (np.array([0.9, 0.9]),) * 2)
    keeping(monkeypatch, [0])
    trainer.run_training()
    assert len([arguments for arguments in registered if "guide" in arguments]) == 1
    log = Path(trainer.log_file).read_text()
    assert "0 of " in log and "There is no further round." in log


def test_a_student_that_knows_no_label_guides_nothing_and_is_asked_again(
    prepare, make_trainer, short, stubs, monkeypatch
):
    built, registered = stubs
    settings = {"rounds": [0.4, 0.7]}
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(settings))
    answers = iter([(np.array([0.4, np.nan]),) * 2, (np.array([0.6, 0.1]),) * 2])
    monkeypatch.setattr(trainer, "_compare", lambda progress: next(answers))
    keeping(monkeypatch, [1])
    trainer.run_training()
    assert len([arguments for arguments in registered if "guide" in arguments]) == 1
    assert "agree on no label well enough yet" in Path(trainer.log_file).read_text()


def test_the_averaged_student_is_asked_for_both_images_of_the_same_patches(trainer):
    loader, progress = (loader.data_loader for loader in trainer.get_dataloaders())
    network, averaged, seen = trainer.network, trainer.distiller.averaged.module, []
    averaged.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    results = trainer._compare(progress)
    assert trainer.network is network
    assert len(seen) >= 100
    assert all(torch.equal(real, data.flip(2)) for data, real in zip(seen[::2], seen[1::2], strict=True))
    for found in results:
        assert found.shape == (2,)
        assert ((found >= 0) & (found <= 1)).all()


def test_of_large_patches_fewer_are_compared(trainer, monkeypatch):
    progress = trainer.get_dataloaders()[1].data_loader
    seen = []
    trainer.distiller.averaged.module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("nnunet_oneshot.trainers.distill._COMPARED_VOXELS", 1)
    trainer._compare(progress)
    assert 2 * 20 <= sum(seen) < 2 * (20 + trainer.batch_size)


def test_a_training_resumed_after_a_round_asks_the_student_again(prepare, make_trainer, short, stubs, monkeypatch):
    from nnunet_oneshot.trainers.distill import OneShotDistillTrainer

    monkeypatch.setattr(OneShotDistillTrainer, "_compare", lambda self, progress: (np.array([0.9, 0.9]),) * 2)
    keeping(monkeypatch, [1])
    built, registered = stubs
    dataset = prepare()
    first = make_trainer(dataset, NAME)
    first.initialize()
    first.current_epoch = 2
    first.save_checkpoint(latest(first))
    second = make_trainer(dataset, NAME, resume=True)
    second.load_checkpoint(latest(first))
    second.on_train_start()
    assert second.current_epoch == 3
    assert built[1].arguments["registrations"].guided == "guided"
    assert built[1].arguments["real_share"] > 0
    second.on_train_epoch_start()
    assert len(built) == 2


def test_without_rounds_real_patches_come_from_the_start(prepare, make_trainer, short, stubs):
    built, registered = stubs
    trainer = make_trainer(prepare(), NAME, edit=lambda p: p["oneshot"]["distillation"].update(rounds=[]))
    trainer.run_training()
    assert [loader.arguments["real_share"] for loader in built] == [0.0, trainer.config.distillation.real_share]
    assert len(registered) == 1
    assert not hasattr(trainer.distiller, "averaged")


def test_epochs_log_the_losses_and_the_weight(prepare, make_trainer, short, stubs):
    trainer = make_trainer(prepare(), NAME)
    trainer.run_training()
    lines = [
        line for line in Path(trainer.log_file).read_text().splitlines() if "reconstruction" in line and "hint " in line
    ]
    assert len(lines) == 5
    assert "(weight 0.0000)" in lines[0]
    assert "(weight 0.1000)" in lines[-1]
    assert files(trainer.output_folder) == [
        "checkpoint_best.pth",
        "checkpoint_final.pth",
    ]
    assert trainer.teacher_optimizer.param_groups[0]["lr"] < 1e-3


def latest(trainer):
    return os.path.join(trainer.output_folder, "checkpoint_latest.pth")


def test_resume_restores_student_teacher_and_optimisers(prepare, make_trainer, short, stubs):
    dataset = prepare()
    first = make_trainer(dataset, NAME)
    first.on_train_start()
    first.on_train_epoch_start()
    for _ in range(2):
        first._step_of_epoch = 0
        first.train_step(next(first.dataloader_train))
    first.save_checkpoint(latest(first))
    second = make_trainer(dataset, NAME, resume=True)
    second.load_checkpoint(latest(first))
    second.on_train_start()
    assert second.current_epoch == 1
    for a, b in zip(copies(first.network, first.distiller), copies(second.network, second.distiller), strict=True):
        assert torch.equal(a, b)
    moments = [t.teacher_optimizer.state_dict()["state"][0] for t in (first, second)]
    assert moments[0]["step"] == moments[1]["step"] == 2
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])


def saved_run(dataset, make_trainer):
    trainer = make_trainer(dataset, NAME)
    trainer.initialize()
    trainer.save_checkpoint(latest(trainer))
    return latest(trainer), latest(trainer).replace(".pth", "_teacher.pth")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (os.remove, "does not exist"),
        (lambda path: Path(path).write_bytes(b"damaged"), "is damaged"),
        (lambda path: torch.save({"distiller": {}}, path), "is damaged or belongs"),
    ],
)
def test_missing_or_damaged_teacher_stops_the_resume(harm, message, prepare, make_trainer, stubs):
    dataset = prepare()
    student, teacher = saved_run(dataset, make_trainer)
    harm(teacher)
    trainer = make_trainer(dataset, NAME, resume=True)
    trainer.load_checkpoint(student)
    with pytest.raises(OneShotError, match=f"{teacher}.*{message}.*train again without --c"):
        trainer.on_train_start()


def test_teacher_of_another_epoch_stops_the_resume(prepare, make_trainer, stubs):
    dataset = prepare()
    student, teacher = saved_run(dataset, make_trainer)
    content = torch.load(teacher)
    torch.save({**content, "epoch": 7}, teacher)
    trainer = make_trainer(dataset, NAME, resume=True)
    trainer.load_checkpoint(student)
    with pytest.raises(OneShotError, match="of epoch 7, the student's of epoch 1"):
        trainer.on_train_start()


def test_validation_needs_no_teacher(prepare, make_trainer, stubs):
    dataset = prepare(labelled=("case_00",))
    student, teacher = saved_run(dataset, make_trainer)
    os.remove(teacher)
    trainer = make_trainer(dataset, NAME)
    trainer.load_checkpoint(student)
    trainer.perform_actual_validation()


class KilledError(BaseException):
    """Stands for the end of the process: whatever would clean up after it is left out."""


@pytest.mark.parametrize("survived", range(3))
def test_a_training_killed_between_its_two_files_is_resumed(survived, prepare, make_trainer, stubs, monkeypatch):
    """The files change in three steps: the next teacher, the student, the teacher."""
    dataset = prepare()
    student, _ = saved_run(dataset, make_trainer)
    trainer = make_trainer(dataset, NAME)
    trainer.initialize()
    trainer.current_epoch = 1
    with torch.no_grad():
        for parameter in trainer.distiller.teacher.parameters():
            # So that the teachers of both epochs can be told apart.
            parameter.add_(1)
    original, remove, moved = os.replace, os.remove, []

    def replace(source, target):
        if len(moved) == survived:
            raise KilledError
        moved.append(target)
        original(source, target)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(os, "replace", replace)
        patch.setattr(os, "remove", lambda path: None)
        trainer.save_checkpoint(student)
    assert os.remove is remove and len(moved) == survived
    resumed = make_trainer(dataset, NAME, resume=True)
    resumed.load_checkpoint(student)
    resumed.on_train_start()
    assert resumed.current_epoch == (1 if survived < 2 else 2)
    same = torch.equal(*(copies(t.distiller.teacher)[0] for t in (trainer, resumed)))
    assert same == (survived == 2)
    resumed.save_checkpoint(student)
    assert files(resumed.output_folder) == ["checkpoint_latest.pth", "checkpoint_latest_teacher.pth"]


def test_a_training_that_has_ended_needs_no_teacher(prepare, make_trainer, short, stubs):
    _, registered = stubs
    dataset = prepare()
    first = make_trainer(dataset, NAME)
    first.run_training()
    final = os.path.join(first.output_folder, "checkpoint_final.pth")
    asked = len(registered)
    again = make_trainer(dataset, NAME, resume=True)
    again.load_checkpoint(final)
    again.run_training()
    assert torch.equal(copies(first.network)[0], copies(again.network)[0])
    # The student, whose average is lost, guides nothing.
    assert len(registered) == asked + 1
    assert files(again.output_folder) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def test_failed_save_keeps_both_files(prepare, make_trainer, stubs, monkeypatch):
    dataset = prepare()
    student, teacher = saved_run(dataset, make_trainer)
    before = [Path(path).read_bytes() for path in (student, teacher)]
    trainer = make_trainer(dataset, NAME)
    trainer.initialize()
    trainer.current_epoch = 3
    original, calls = torch.save, []

    def fail_at_the_second(content, path):
        calls.append(path)
        if len(calls) == 2:
            raise RuntimeError("file write failed")
        original(content, path)

    monkeypatch.setattr(torch, "save", fail_at_the_second)
    with pytest.raises(OneShotError, match="file write failed"):
        trainer.save_checkpoint(student)
    assert [Path(path).read_bytes() for path in (student, teacher)] == before
    assert len(files(trainer.output_folder)) == 2


def test_architecture_without_decoder_is_refused(prepare, make_trainer, monkeypatch):
    import nnunet_oneshot.trainers.distill as module

    monkeypatch.setattr(module, "build_teacher", lambda *_: torch.nn.Conv3d(1, 1, 1))
    with pytest.raises(OneShotError, match="OneShotSynthesisTrainer"):
        make_trainer(prepare(), NAME).initialize()


def test_mixed_precision_scales_both_backward_passes_and_steps_both(trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    parts = (trainer.network, trainer.distiller.teacher, trainer.distiller.projections)
    before = copies(*parts)
    trainer.train_step(batch)
    assert all(not torch.equal(a, b) for a, b in zip(before, copies(*parts), strict=True))
    norms = [torch.stack([p.grad.norm() for p in m.parameters() if p.grad is not None]).norm() for m in parts]
    assert all(norm <= 12.001 for norm in norms)


def test_student_that_overflows_is_not_stepped(trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    batch["data"] = batch["data"] * float("inf")
    before = copies(trainer.network)[0]
    trainer.train_step(batch)
    assert torch.equal(before, copies(trainer.network)[0])
    assert trainer.grad_scaler.get_scale() == 512.0
    assert torch.isfinite(copies(trainer.distiller.teacher)[0]).all()


def test_compiled_network_is_unwrapped_for_its_features(trainer):
    batch = next(trainer.get_dataloaders()[0])
    trainer.network = torch.compile(trainer.network, backend="eager")
    trainer._features = trainer.distiller._features = torch.compile(trainer._features, backend="eager")
    before = copies(trainer.network)[0]
    trainer.train_step(batch)
    trainer.validation_step(batch)
    assert not torch.equal(before, copies(trainer.network)[0])
