"""Cases, mirroring, validation, checkpoints and errors that all trainers share."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_oneshot.errors import OneShotError

NNUNET_KEYS = {
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
}
WARPING = ["OneShotPropagationTrainer_1epoch", "OneShotSynthesisTrainer_1epoch", "OneShotDistillTrainer_1epoch"]


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def block(**settings):
    return lambda plans: plans["oneshot"].update(settings)


@pytest.mark.parametrize("name", ["OneShotAtlasTrainer_1epoch", *WARPING])
def test_training_writes_what_nnunet_reads(name, prepare, make_trainer, short, stubs):
    trainer = make_trainer(prepare(), name)
    trainer.run_training()
    folder = trainer.output_folder
    saved = torch.load(os.path.join(folder, "checkpoint_final.pth"), weights_only=False)
    assert set(saved) == NNUNET_KEYS
    assert saved["trainer_name"] == name
    assert not os.path.exists(os.path.join(folder, "checkpoint_latest.pth"))
    assert not os.path.exists(os.path.join(folder, "checkpoint_latest_teacher.pth"))
    assert not [file for file in os.listdir(folder) if file.startswith(".partial")]
    assert "Pseudo dice [" in log_of(trainer) and "np.float" not in log_of(trainer)


@pytest.mark.parametrize("name", WARPING)
def test_stock_network_takes_the_weights(name, prepare, make_trainer, short, stubs):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = make_trainer(prepare(), name)
    trainer.run_training()
    saved = torch.load(os.path.join(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    network = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    assert network.load_state_dict(saved["network_weights"]) == torch.nn.modules.module._IncompatibleKeys([], [])


def test_warping_trainers_share_schedule_and_optimiser(prepare, make_trainer):
    dataset = prepare()
    trainers = [make_trainer(dataset, name.replace("_1epoch", "")) for name in WARPING]
    for trainer in trainers:
        trainer.initialize()
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
    schedules = [
        (t.num_epochs, t.num_iterations_per_epoch, t.initial_lr, t.weight_decay, t.batch_size, str(t.optimizer))
        for t in trainers
    ]
    assert len(set(schedules)) == 1


@pytest.mark.parametrize("name", WARPING)
def test_learning_rate_comes_from_the_plans(prepare, make_trainer, monkeypatch, name):
    dataset = prepare()
    monkeypatch.setenv("nnUNet_oneshot_overrides", '{"initial_lr": 0.002}')
    trainer = make_trainer(dataset, name)
    trainer.initialize()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.002]


def test_atlas_trainer_keeps_the_optimiser_of_nnunet(prepare, make_trainer):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    dataset = prepare()
    trainer = make_trainer(dataset, "OneShotAtlasTrainer_1epoch")
    trainer.initialize()
    expected, _ = nnUNetTrainer.configure_optimizers(trainer)
    assert str(trainer.optimizer) == str(expected)
    assert isinstance(trainer.optimizer, torch.optim.SGD)


SUPERVISED = ["OneShotSupervisedAtlasTrainer", "OneShotSupervisedTrainer"]


@pytest.mark.parametrize("name", SUPERVISED)
def test_ceilings_train_like_the_trainers_that_warp(name, prepare, make_trainer, stubs):
    dataset = prepare()
    ceiling, synthesis = (make_trainer(dataset, kind) for kind in (name, "OneShotSynthesisTrainer"))
    for trainer in (ceiling, synthesis):
        trainer.initialize()
        trainer.get_dataloaders()
    compared = [
        (t.num_epochs, t.batch_size, str(t.optimizer), str(t.loss), t.inference_allowed_mirroring_axes)
        for t in (ceiling, synthesis)
    ]
    assert compared[0] == compared[1]


@pytest.mark.parametrize("name", SUPERVISED)
def test_ceilings_read_the_labels_that_they_say(name, prepare, make_trainer):
    trainer = make_trainer(prepare(labelled=("case_00", "case_01", "case_02", "case_03")), name)
    trainer.initialize()
    train, val = trainer.do_split()
    cases = [loader.data_loader._loader._data.identifiers for loader in trainer.get_dataloaders()]
    labelled = sorted(case for case in train if case < "case_04")
    assert cases == [labelled, labelled] and not set(labelled) & set(val)
    says_so = "THIS IS NO ONE-SHOT TRAINING" in log_of(trainer)
    assert says_so == (name == "OneShotSupervisedTrainer")
    # Without the sentence that other labels are not opened.
    assert says_so != ("are not opened" in log_of(trainer))


def test_all_labels_or_the_atlas_alone(prepare, make_trainer):
    dataset = prepare()
    cases = []
    for name in SUPERVISED:
        trainer = make_trainer(dataset, name)
        trainer.initialize()
        cases.append(trainer.get_dataloaders()[0].data_loader._loader._data.identifiers)
        assert len(trainer.roles.atlases) == 1
    assert cases == [list(trainer.roles.atlases), sorted(trainer.do_split()[0])]


def test_network_starts_from_the_seed(prepare, make_trainer):
    dataset = prepare()
    weights = []
    for seed in (1, 1, 2):
        trainer = make_trainer(dataset, "OneShotSynthesisTrainer", edit=block(seed=seed))
        trainer.initialize()
        weights.append(torch.cat([p.flatten() for p in trainer.network.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_loaders_get_the_roles_of_the_fold(prepare, make_trainer, stubs):
    built, registered = stubs
    trainer = make_trainer(prepare(), "OneShotPropagationTrainer")
    trainer.initialize()
    trainer.get_dataloaders()
    train, val = trainer.do_split()
    roles = trainer.roles
    assert set(roles.atlases) | set(roles.unlabelled) == set(train)
    assert len(roles.atlases) == 1
    assert set(roles.progress) == set(val)
    assert set(registered[0]["cases"]) == {*roles.unlabelled, *roles.progress}
    assert [b.arguments["real_share"] for b in built] == [0.0, 1.0]
    assert [b.arguments["augment"] for b in built] == [False, True]
    assert [b.arguments["cases"] for b in built] == [roles.progress, roles.unlabelled]
    assert f"Atlas: {roles.atlases[0]} (" in log_of(trainer)


@pytest.mark.parametrize(("patches", "others", "expected"), [("0", "8", 1), ("2", "1", 1), ("2", "8", 2)])
def test_as_many_processes_register_as_nnunet_allows(patches, others, expected, prepare, make_trainer, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", patches)
    monkeypatch.setenv("nnUNet_def_n_proc", others)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert make_trainer(prepare(), "OneShotSynthesisTrainer").registrar.num_processes == expected


def test_share_of_unlabelled_cases_and_of_progress_cases(prepare, make_trainer):
    dataset = prepare()
    trainer = make_trainer(
        dataset, "OneShotSynthesisTrainer", fold="all", edit=block(unlabelled_fraction=0.4, progress_cases=1)
    )
    assert len(trainer.roles.unlabelled) == 2
    assert trainer.roles.progress == trainer.roles.unlabelled[:1]
    assert "no case is held out" in log_of(trainer)
    again = make_trainer(dataset, "OneShotSynthesisTrainer", fold="all", edit=block(unlabelled_fraction=0.4))
    assert again.roles.unlabelled == trainer.roles.unlabelled


@pytest.mark.parametrize("has_block", [True, False])
def test_stock_plans_are_named_as_such(has_block, prepare, make_trainer):
    edit = None if has_block else lambda plans: plans.pop("oneshot")
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer", edit=edit)
    assert trainer.roles.unlabelled
    assert ("their intensity statistics come from the labels of all cases" in log_of(trainer)) == (not has_block)


def test_resumed_run_draws_other_patches(prepare, make_trainer, stubs):
    built, _ = stubs
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer")
    trainer.initialize()
    trainer.get_dataloaders()
    trainer.current_epoch = 3
    trainer.get_dataloaders()
    assert built[0].arguments["seed"] != built[2].arguments["seed"]


def test_left_and_right_are_not_mirrored(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(shape=(20, 22, 28)), "OneShotSynthesisTrainer")
    trainer.initialize()
    axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3]
    assert len(axes) == 2
    assert trainer.inference_allowed_mirroring_axes == axes
    assert "lays labels on other labels" in log_of(trainer)


def test_axes_of_the_plans_are_obeyed(prepare, make_trainer, stubs):
    dataset = prepare()
    for setting, expected in (([1], (1,)), ([], None)):
        trainer = make_trainer(dataset, "OneShotSynthesisTrainer", edit=block(mirror_axes=setting))
        trainer.initialize()
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert trainer.inference_allowed_mirroring_axes == expected


def test_patch_axes_of_2d_are_the_last_of_the_volume(prepare, make_trainer, stubs):
    dataset = prepare("2d", shape=(20, 22, 28))
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer", configuration="2d")
    trainer.initialize()
    assert len(trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[2]) == 2
    atlas = trainer._load_atlas_segs()[0]
    left, right = (np.argwhere(atlas[0] == value).mean(0) for value in (1, 2))
    side = int(np.argmax(np.abs(left - right)))
    assert side in (1, 2)
    assert trainer.inference_allowed_mirroring_axes == tuple(a for a in (0, 1) if a != side - 1)


def test_validation_without_labels_says_so(prepare, make_trainer):
    dataset = prepare(labelled=("case_00",))
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer")
    trainer.initialize()
    trainer.perform_actual_validation()
    assert "there is nothing to score for fold 0, since none of its validation cases has a label" in log_of(trainer)
    assert os.listdir(os.path.join(trainer.output_folder, "validation")) == ["summary.json"]


def test_validation_of_fold_all_says_so(prepare, make_trainer):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer", fold="all")
    trainer.initialize()
    trainer.perform_actual_validation()
    assert "nothing to score for fold all, since it has no validation case" in log_of(trainer)


def test_validation_scores_labelled_cases_only(prepare, make_trainer, monkeypatch):
    dataset = prepare()
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer")
    trainer.initialize()
    _, val = trainer.do_split()
    dataset.preprocessed.joinpath("gt_segmentations", f"{val[0]}.nii.gz").unlink()
    seen = []
    parent = type(trainer).__mro__[-2]
    monkeypatch.setattr(parent, "perform_actual_validation", lambda self, npz: seen.append((self.do_split()[1], npz)))
    trainer.perform_actual_validation(True)
    assert seen == [(val[1:], True)]
    assert trainer.do_split()[1] == val
    assert f"{len(val) - 1} of {len(val)} cases have a label" in log_of(trainer)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_checkpoint_is_named(content, prepare, make_trainer, tmp_path):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer")
    path = tmp_path / "checkpoint_latest.pth"
    if content is None:
        torch.save({"network_weights": torch.zeros(3)}, path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_bytes(content)
    with pytest.raises(OneShotError, match=f"{path}.*is damaged or belongs to another network"):
        trainer.load_checkpoint(str(path))


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(prepare, make_trainer, tmp_path):
    trainer = make_trainer(prepare(), "OneShotAtlasTrainer_5epochs")
    torch.save({"network_weights": Harmful(tmp_path / "ran")}, tmp_path / "checkpoint_latest.pth")
    with pytest.raises(OneShotError, match="holds more than numbers and weights"):
        trainer.load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert not (tmp_path / "ran").exists()


def edit_configuration(plans):
    plans["configurations"]["3d_fullres"]["data_identifier"] = "../../elsewhere"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plans: plans.update(dataset_name="../../elsewhere"), "The dataset_name '../../elsewhere' of plans"),
        (lambda plans: plans.update(plans_name="../../elsewhere"), "The name of the plans '../../elsewhere' of"),
        (edit_configuration, "The data_identifier '../../elsewhere' of configuration 3d_fullres"),
        (lambda plans: plans.update(transpose_forward=[0, 0, 1]), '"transpose_forward" is .0, 0, 1. in the plans file'),
    ],
)
def test_names_in_plans_are_no_paths(edit, message, prepare, make_trainer, tmp_path):
    dataset = prepare()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OneShotError, match=message):
        make_trainer(dataset, "OneShotAtlasTrainer", edit=edit)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: next(folder.glob("*_05.pkl")).unlink(), "lacks case_05"),
        (lambda folder: (folder / "stranger.pkl").touch(), "holds as a surplus stranger"),
    ],
)
def test_other_cases_than_were_preprocessed_are_noticed(harm, message, prepare, make_trainer, stubs):
    dataset = prepare()
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer")
    harm(Path(trainer.preprocessed_dataset_folder))
    with pytest.raises(OneShotError, match=f"{message}; 6 cases were preprocessed together"):
        trainer.initialize()


def test_checkpoint_of_another_network_is_refused(prepare, make_trainer, short, stubs):
    dataset = prepare()
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer_1epoch")
    trainer.run_training()

    def widen(plans):
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["features_per_stage"] = [2 * n for n in kwargs["features_per_stage"]]

    other = make_trainer(dataset, "OneShotSynthesisTrainer_1epoch", edit=widen)
    with pytest.raises(OneShotError, match="belongs to another network"):
        other.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))


def test_failed_save_keeps_the_previous_checkpoint(prepare, make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer")
    trainer.initialize()
    path = tmp_path / "checkpoint_latest.pth"
    path.write_bytes(b"previous")

    def full_disk(content, target):
        Path(target).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OneShotError, match="could not be written.*file write failed"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path).count("checkpoint_latest.pth") == 1
    assert not [file for file in os.listdir(tmp_path) if file.startswith(".partial")]


def test_disabled_checkpointing_writes_nothing(prepare, make_trainer, tmp_path):
    trainer = make_trainer(prepare(), "OneShotDistillTrainer")
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(tmp_path / "checkpoint_latest.pth"))
    assert not list(tmp_path.glob("*.pth"))


def test_unknown_configuration_lists_the_known(prepare, make_trainer):
    with pytest.raises(OneShotError, match=r"no configuration '3d_huge': choose one of .*'3d_fullres'"):
        make_trainer(prepare(), "OneShotSynthesisTrainer", configuration="3d_huge")


@pytest.mark.parametrize("first", ["3d_lowres", "3d_cascade_fullres"])
def test_cascade_without_a_first_stage_is_refused(first, prepare, make_trainer):
    def cascade(plans):
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": first}

    with pytest.raises(OneShotError, match=f"names '{first}' as its previous stage: expected another .*'3d_fullres'"):
        make_trainer(prepare(), "OneShotSynthesisTrainer", configuration="3d_cascade_fullres", edit=cascade)


def test_configuration_that_is_not_preprocessed(prepare, make_trainer):
    dataset = prepare()
    shutil.rmtree(dataset.preprocessed / "nnUNetOneShotCPUPlans_3d_fullres")
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer")
    with pytest.raises(OneShotError, match="does not exist, so configuration 3d_fullres has not been preprocessed"):
        trainer.initialize()


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_unset_variable_is_named(variable, prepare, make_trainer, monkeypatch):
    dataset = prepare()
    monkeypatch.delenv(variable)
    with pytest.raises(OneShotError, match=variable):
        make_trainer(dataset, "OneShotSynthesisTrainer")


def test_results_that_cannot_be_written_are_named(prepare, make_trainer, monkeypatch, tmp_path):
    dataset = prepare()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file"))
    with pytest.raises(OneShotError, match="Cannot write .*file"):
        make_trainer(dataset, "OneShotSynthesisTrainer")


def test_wrong_setting_stops_before_anything_is_made(prepare, make_trainer):
    dataset = prepare()
    with pytest.raises(OneShotError, match="mirror_axis"):
        make_trainer(dataset, "OneShotSynthesisTrainer", edit=block(mirror_axis=[0]))
    assert not dataset.results.exists()


def test_all_training_cases_named_as_atlases_are_shown_as_they_are(prepare, make_trainer, stubs):
    dataset = prepare()
    everything = sorted(dataset.cases)
    for name in ("OneShotSynthesisTrainer", "OneShotAtlasTrainer"):
        trainer = make_trainer(dataset, name, fold="all", edit=block(atlases=everything))
        trainer.initialize()
        batch = next(trainer.get_dataloaders()[0])
        assert batch["data"].shape[0] == trainer.batch_size
        assert set(batch["keys"]) <= set(everything)


def test_atlas_trainer_sees_the_atlas_alone(prepare, make_trainer):
    trainer = make_trainer(prepare(), "OneShotAtlasTrainer")
    trainer.initialize()
    for loader in trainer.get_dataloaders():
        assert set(next(loader)["keys"]) == set(trainer.roles.atlases)


def test_plans_and_dataset_json_are_stored_for_prediction(prepare, make_trainer, short, stubs):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer_1epoch")
    trainer.run_training()
    stored = json.loads(Path(trainer.output_folder_base, "plans.json").read_text())
    assert stored["oneshot"]["seed"] == 12345


@pytest.mark.parametrize(("configuration", "last"), [("3d_fullres", True), ("2d", False)])
def test_memory_format_on_a_processor(configuration, last, prepare, make_trainer):
    trainer = make_trainer(prepare(configuration), "OneShotDistillTrainer", configuration=configuration)
    trainer.initialize()
    for network in (trainer.network, trainer.distiller.teacher):
        weight = network.encoder.stages[1][0].convs[0].conv.weight
        assert weight.is_contiguous() != last


def test_network_of_two_stages_trains_without_deep_supervision(prepare, make_trainer, short, stubs):
    def shorten(plans):
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
            kwargs[name] = kwargs[name][:2]
        kwargs["n_conv_per_stage_decoder"] = kwargs["n_conv_per_stage_decoder"][:1]
        kwargs["n_stages"] = 2

    trainer = make_trainer(prepare(), "OneShotDistillTrainer_1epoch", edit=shorten)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))


@pytest.mark.parametrize("name", ["OneShotSynthesisTrainer", "OneShotDistillTrainer"])
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_training_in_bfloat16_keeps_weights_and_losses_in_float32(
    prepare, make_trainer, stubs, monkeypatch, name, precision
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    trainer = make_trainer(prepare(), name, edit=lambda p: p["oneshot"].update(precision=precision))
    trainer.initialize()
    seen = []
    trainer.network.encoder.register_forward_hook(lambda module, inputs, skips: seen.append(skips[0].dtype))
    training, progress = trainer.get_dataloaders()
    loss = trainer.train_step(next(training))["loss"]
    with torch.no_grad():
        progress_loss = trainer.validation_step(next(progress))["loss"]
    assert seen == [torch.bfloat16 if precision == "auto" else torch.float32] * 2
    assert loss.dtype == progress_loss.dtype == np.float32
    assert np.isfinite([loss, progress_loss]).all()
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


def test_results_get_our_fingerprint_and_the_dataset_none_of_nnunets_name(prepare, make_trainer, short, stubs):
    dataset = prepare()
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer")
    trainer.on_train_start()
    copied = Path(trainer.output_folder_base, "dataset_fingerprint.json")
    assert copied.read_bytes() == (dataset.preprocessed / "oneshot_fingerprint.json").read_bytes()
    assert not (dataset.preprocessed / "dataset_fingerprint.json").exists()


def test_a_training_goes_on_with_the_settings_it_was_started_with(prepare, make_trainer, short, stubs, monkeypatch):
    dataset = prepare()
    first = make_trainer(dataset, "OneShotSynthesisTrainer_5epochs")
    first.on_train_start()
    stored = json.loads((Path(first.output_folder) / "oneshot_settings.json").read_text())
    assert stored["atlases"] == list(first.roles.atlases) and stored["settings"]["seed"] == 12345
    first.current_epoch = 2
    first.save_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))

    def resumed(**changes):
        trainer = make_trainer(dataset, "OneShotSynthesisTrainer_5epochs", resume=True, edit=block(**changes))
        trainer.load_checkpoint(str(Path(first.output_folder) / "checkpoint_latest.pth"))
        return trainer

    resumed().on_train_start()
    other = resumed(seed=7)
    assert "Warning: this training was started with other settings: seed was 12345, is 7" in log_of(other)
    with pytest.raises(OneShotError, match="seed was 12345, is 7"):
        other.on_train_start()
    another = next(case for case in first.do_split()[0] if case not in first.roles.atlases)
    with pytest.raises(OneShotError, match="the atlas was"):
        resumed(atlases=[another]).on_train_start()


def test_a_second_training_in_the_same_folder_is_refused(prepare, make_trainer, short, stubs):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer_1epoch")
    lock = Path(trainer.output_folder) / "training.lock"
    hold = f"import time; from nnunet_oneshot.locks import take; print(take({str(lock)!r}), flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline().strip() == b"True"
        with pytest.raises(OneShotError, match="Another training is at work"):
            trainer.on_train_start()
        with pytest.raises(OneShotError, match="Another training or validation is at work"):
            trainer.perform_actual_validation()
    finally:
        process.kill()
        process.wait()
    trainer.run_training()
    assert not lock.exists()


def test_a_training_imports_the_modules_of_the_user(prepare, make_trainer, monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_modules", "no_such_entries")
    with pytest.raises(OneShotError, match="names the module 'no_such_entries'"):
        make_trainer(prepare(), "OneShotAtlasTrainer_1epoch")


def test_an_interruption_says_how_to_go_on(prepare, make_trainer, short, stubs, monkeypatch, capsys):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer_5epochs")
    step, steps = trainer.train_step, []

    def interrupted(batch):
        steps.append(batch)
        if len(steps) in (2, 5):
            raise KeyboardInterrupt
        return step(batch)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    for ending in ("in epoch 0. The same command begins anew.", "in epoch 1. The same command goes on from the last"):
        with pytest.raises(SystemExit, match="130"):
            trainer.run_training()
        assert ending in capsys.readouterr().out
    assert "Interrupted in epoch 1." in log_of(trainer)


def test_a_normal_start_shows_nothing_that_looks_like_failure(prepare, make_trainer, short, stubs, capsys):
    trainer = make_trainer(prepare(), "OneShotDistillTrainer_1epoch")
    trainer.run_training()
    output = capsys.readouterr()
    for noise in ("hiddenlayer", "Unable to", "Warning", "{"):
        assert noise not in output.out + output.err
    assert "Training 3d_fullres of nnUNetOneShotCPUPlans: patch " in output.out
    assert "the pseudo Dice is not the Dice on real images" in output.out
    # Nothing is lost: what nnU-Net prints of the plans is in the log.
    assert "These are the global plan.json settings" in log_of(trainer)


def test_settings_other_than_the_defaults_are_told(prepare, make_trainer, stubs):
    trainer = make_trainer(prepare(), "OneShotSynthesisTrainer_1epoch", edit=block(seed=7))
    assert trainer.roles
    assert "seed was 12345, is 7" in log_of(trainer)


@pytest.mark.parametrize("name", ["OneShotAtlasTrainer", "OneShotSynthesisTrainer", "OneShotDistillTrainer"])
def test_what_an_atlas_does_not_show_is_no_error_of_the_network(name, prepare, make_trainer, stubs):
    """A network that finds the hidden structure everywhere, where the label says background."""
    dataset = prepare()
    path = dataset.preprocessed / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "oneshot": {"partial": {"case_00": ["left"]}}}))
    trainer = make_trainer(dataset, name)
    trainer.initialize()
    with torch.no_grad():
        for head in trainer.network.decoder.seg_layers:
            head.bias[2] = 50
    patch = torch.rand(2, 1, *trainer.configuration_manager.patch_size)
    scales = trainer._get_deep_supervision_scales() or [[1, 1, 1]]
    sizes = [[round(s * f) for s, f in zip(patch.shape[2:], factors, strict=True)] for factors in scales]
    found = {}
    for atlas in ("case_00", "case_01"):
        target = [torch.zeros(2, 1, *size, dtype=torch.int16) for size in sizes]
        batch = {
            "data": patch,
            "real": patch,
            "from_real": torch.zeros(2, dtype=torch.bool),
            "target": target if trainer.enable_deep_supervision else target[0],
            "keys": [atlas] * 2 if name == "OneShotAtlasTrainer" else ["case_05"] * 2,
            **({} if name == "OneShotAtlasTrainer" else {"atlases": [atlas] * 2}),
        }
        found[atlas] = trainer.validation_step(batch), trainer.train_step(batch)
    hidden, shown = found["case_00"], found["case_01"]
    assert hidden[0]["fp_hard"][1] == 0 < shown[0]["fp_hard"][1]
    assert all(step["loss"] < 1 for step in hidden) and all(step["loss"] > 30 for step in shown)
    assert not trainer.network._forward_hooks


def test_a_structure_that_no_atlas_shows_is_refused(prepare, make_trainer, stubs):
    dataset = prepare(labelled=("case_00",))
    path = dataset.preprocessed / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "oneshot": {"partial": {"case_00": ["left"]}}}))
    trainer = make_trainer(dataset, "OneShotSynthesisTrainer")
    trainer.initialize()
    with pytest.raises(OneShotError, match="None of the atlases of fold 0 .case_00. shows right"):
        trainer.get_dataloaders()


def test_partly_labelled_validation_cases_are_not_scored(prepare, make_trainer):
    dataset = prepare()
    path = dataset.preprocessed / "dataset.json"
    splits = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    partly = splits[0]["val"][0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "oneshot": {"partial": {partly: ["left"]}}}))
    fold = make_trainer(dataset, "OneShotSynthesisTrainer")._fold()
    assert partly in fold.validation and fold.scored == [case for case in fold.validation if case != partly]
