"""What the planners put into plans."""

import json

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnunet_oneshot.planners as planners
from nnunet_oneshot.cli import main
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.fingerprint import lent_fingerprint
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.planners import OneShotCPUPlanner, OneShotPlanner, OneShotResEncMPlanner

NAMES = {
    "OneShotPlanner": "nnUNetOneShotPlans",
    "OneShotResEncMPlanner": "nnUNetOneShotResEncUNetMPlans",
    "OneShotResEncLPlanner": "nnUNetOneShotResEncUNetLPlans",
    "OneShotResEncXLPlanner": "nnUNetOneShotResEncUNetXLPlans",
    "OneShotCPUPlanner": "nnUNetOneShotCPUPlans",
}


@pytest.fixture
def dataset(tiny_dataset):
    """A data set whose fingerprint claims large volumes, so that memory limits patches."""
    dataset = tiny_dataset(3)
    assert main(["plan_and_preprocess", "-d", str(dataset.id), "--no_pp", "--no_pbar"]) == 0
    return dataset


def pretend_size(dataset, shape, spacing):
    path = dataset.preprocessed / "oneshot_fingerprint.json"
    content = json.loads(path.read_text())
    content.update(shapes_after_crop=[list(shape)] * 3, spacings=[list(spacing)] * 3)
    path.write_text(json.dumps(content))


def pretend_row(dataset, extent):
    path = dataset.preprocessed / "oneshot_fingerprint.json"
    content = json.loads(path.read_text())
    content["oneshot"]["row"] = {"labels": [1, 2, 3], "extent": list(extent)}
    path.write_text(json.dumps(content))


def voxels(configuration):
    return int(np.prod(configuration["patch_size"])) * configuration["batch_size"]


def test_every_planner_is_listed():
    assert sorted(NAMES) == sorted(planners.__all__)


@pytest.mark.parametrize("planner", sorted(NAMES))
def test_plans_have_their_own_name_and_data_and_load_in_nnunet(dataset, planner):
    assert main(["plan_and_preprocess", "-d", str(dataset.id), "-pl", planner, "--no_pp", "--no_pbar"]) == 0
    plans = json.loads((dataset.preprocessed / f"{NAMES[planner]}.json").read_text())
    assert plans["plans_name"] == NAMES[planner]
    for name in ("2d", "3d_fullres"):
        manager = PlansManager(plans).get_configuration(name)
        assert manager.data_identifier == f"{NAMES[planner]}_{name}"
        assert manager.configuration["preprocessor_name"] == "DefaultPreprocessor"
    OneShotConfig.from_plans(plans)


@pytest.mark.parametrize(
    ("ours", "nnunets"), [(OneShotPlanner, ExperimentPlanner), (OneShotResEncMPlanner, nnUNetPlannerResEncM)]
)
def test_student_and_teacher_share_the_memory_target(dataset, monkeypatch, ours, nnunets):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    pretend_size(dataset, (176, 176, 176), (1.0, 1.0, 1.0))
    with lent_fingerprint(dataset.preprocessed):
        single = nnunets(dataset.name, plans_name="Single").plan_experiment()["configurations"]["3d_fullres"]
    double = ours(dataset.name, plans_name="Double").plan_experiment()["configurations"]["3d_fullres"]
    assert voxels(double) <= 0.75 * voxels(single)


@pytest.mark.parametrize(("number", "features"), [(8, 8), (9, 16)])
def test_cpu_preset_has_more_features_for_many_labels(dataset, number, features):
    path = dataset.raw / "dataset.json"
    labels = {"background": 0} | {f"label {value}": value for value in range(1, number)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": labels}))
    plans = OneShotCPUPlanner(dataset.name).plan_experiment()
    stages = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]
    assert stages[0] == features and max(stages) <= 8 * features
    assert plans["oneshot"]["initial_lr"] > OneShotConfig().initial_lr


def test_memory_target_of_the_command(dataset):
    pretend_size(dataset, (176, 176, 176), (1.0, 1.0, 1.0))
    found = {}
    for target in (4.0, 16.0):
        plans = OneShotPlanner(dataset.name, target, plans_name=f"P{target:.0f}").plan_experiment()
        found[target] = voxels(plans["configurations"]["3d_fullres"])
    assert found[4.0] < found[16.0]


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((36, 50, 35), (1.0, 1.0, 1.0)),
        ((300, 512, 512), (1.5, 0.8, 0.8)),
        ((20, 400, 400), (6.0, 0.7, 0.7)),
    ],
)
def test_cpu_preset_limits_patches_batches_and_features(dataset, shape, spacing):
    pretend_size(dataset, shape, spacing)
    plans = OneShotCPUPlanner(dataset.name).plan_experiment()
    for name, configuration in plans["configurations"].items():
        if "patch_size" not in configuration:
            continue
        assert np.prod(configuration["patch_size"]) <= 100_000
        assert voxels(configuration) <= 200_000
        assert configuration["batch_size"] >= 2
        features = configuration["architecture"]["arch_kwargs"]["features_per_stage"]
        assert (features[0], max(features) <= 64) == (8, True)
        if name == "3d_fullres":
            assert configuration["batch_size"] == 2
            planned = np.array(configuration["median_image_size_in_voxels"], float)
            assert planned * configuration["spacing"] == pytest.approx(np.array(shape) * spacing, rel=0.05)
            # A wider view takes the finer axes first, and only where images become much smaller.
            assert np.prod(planned) == np.prod(shape) or np.prod(planned) <= 0.55 * np.prod(shape)
            coarser = np.array(configuration["spacing"]) / np.array(spacing)
            assert coarser[0] == pytest.approx(1) or max(spacing) < 2 * min(spacing)


@pytest.mark.parametrize("planner", [OneShotCPUPlanner, OneShotPlanner])
def test_patch_covers_a_row_of_structures_that_look_alike(dataset, planner):
    shape, spacing = ((38, 112, 112), (2.0, 2.0, 2.0)) if planner is OneShotCPUPlanner else ((300,) * 3, (1.0,) * 3)
    pretend_size(dataset, shape, spacing)
    plain = planner(dataset.name).plan_experiment()["configurations"]
    extent = (58.0, 62.0, 188.0) if planner is OneShotCPUPlanner else (120.0, 120.0, 130.0)
    pretend_row(dataset, extent)
    made = planner(dataset.name)
    planned = made.plan_experiment()["configurations"]
    seen = np.array(planned["3d_fullres"]["patch_size"]) * planned["3d_fullres"]["spacing"]
    wanted = np.minimum(1.1 * np.array(extent), np.array(shape) * spacing)
    assert (seen >= wanted - 1e-6).all()
    assert not (np.array(plain["3d_fullres"]["patch_size"]) * spacing >= wanted).all()
    assert planned["3d_fullres"]["spacing"][0] < 2 * spacing[0]
    assert planned["2d"]["spacing"] == pytest.approx(plain["2d"]["spacing"])
    assert planned["2d"]["patch_size"] == plain["2d"]["patch_size"]
    assert len(made.notes) == 1 and "labels 1, 2, 3 of the atlas look alike" in made.notes[0]
    second = PlansManager(json.loads(made.plans_file.read_text())).get_configuration("3d_cascade_fullres")
    assert second.previous_stage_name == "3d_fullres"
    assert second.data_identifier == f"{NAMES[planner.__name__]}_3d_cascade_fullres"
    assert list(second.spacing) == list(plain["3d_fullres"]["spacing"])


def test_spacing_that_the_user_names_is_kept_and_a_row_that_fits_changes_nothing(dataset):
    pretend_size(dataset, (38, 112, 112), (2.0, 2.0, 2.0))
    plain = OneShotCPUPlanner(dataset.name).plan_experiment()["configurations"]["3d_fullres"]
    pretend_row(dataset, (60.0, 60.0, 60.0))
    made = OneShotCPUPlanner(dataset.name)
    assert made.plan_experiment()["configurations"]["3d_fullres"]["spacing"] == plain["spacing"] and not made.notes
    pretend_row(dataset, (58.0, 62.0, 188.0))
    named = OneShotCPUPlanner(dataset.name, overwrite_target_spacing=[2.0, 2.0, 2.0])
    assert named.plan_experiment()["configurations"]["3d_fullres"]["spacing"] == [2.0, 2.0, 2.0] and not named.notes


@pytest.mark.parametrize("spacing", [None, [1.0, 1.0, 1.0]])
def test_cpu_preset_plans_a_cascade_of_large_images(dataset, spacing):
    pretend_size(dataset, (90, 120, 120), (1.0, 1.0, 1.0))
    planner = OneShotCPUPlanner(dataset.name, overwrite_target_spacing=spacing)
    planner.plan_experiment()
    plans = PlansManager(json.loads(planner.plans_file.read_text()))
    second = plans.get_configuration("3d_cascade_fullres")
    assert second.previous_stage_name == ("3d_fullres" if spacing is None else "3d_lowres")
    first = plans.get_configuration(second.previous_stage_name)
    assert list(second.spacing) == [1.0, 1.0, 1.0] and min(first.spacing) > 1
    assert np.prod(first.patch_size) >= 0.25 * np.prod(first.median_image_size_in_voxels)
    assert "architecture" in second.configuration and second.batch_dice


def test_cpu_preset_takes_the_whole_hippocampus(dataset):
    pretend_size(dataset, (36, 50, 35), (1.0, 1.0, 1.0))
    plans = OneShotCPUPlanner(dataset.name).plan_experiment()
    assert list(plans["configurations"]["3d_fullres"]["patch_size"]) == [40, 56, 40]


def test_planner_works_with_no_augmentation_processes(dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    assert "3d_fullres" in OneShotPlanner(dataset.name).plan_experiment()["configurations"]


def test_planner_reads_our_fingerprint_and_leaves_none_under_nnunets_name(dataset):
    stock = dataset.preprocessed / "dataset_fingerprint.json"
    ours = dataset.preprocessed / "oneshot_fingerprint.json"
    before = OneShotPlanner(dataset.name).dataset_fingerprint
    assert before == json.loads(ours.read_text()) and not stock.exists()
    stock.write_text('{"made_by": "nnU-Net"}')
    assert OneShotPlanner(dataset.name).dataset_fingerprint == before
    assert stock.read_text() == '{"made_by": "nnU-Net"}'


def test_copy_of_an_earlier_version_is_removed(dataset):
    stock = dataset.preprocessed / "dataset_fingerprint.json"
    stock.write_bytes((dataset.preprocessed / "oneshot_fingerprint.json").read_bytes())
    OneShotPlanner(dataset.name)
    assert not stock.exists()


def test_planner_without_fingerprint_names_the_command_that_makes_it(dataset):
    (dataset.preprocessed / "oneshot_fingerprint.json").unlink()
    with pytest.raises(OneShotError, match="oneshot_fingerprint.json does not exist.*plan_and_preprocess"):
        OneShotPlanner(dataset.name)


def test_custom_configurations_survive_planning_again_and_inherit(dataset):
    planner = OneShotPlanner(dataset.name)
    planner.plan_experiment()
    plans = json.loads(planner.plans_file.read_text())
    own = {
        "mine": {"inherits_from": "3d_fullres", "patch_size": [16, 16, 16]},
        "hers": {"inherits_from": "mine", "batch_size": 5},
    }
    plans["configurations"].update(own)
    planner.plans_file.write_text(json.dumps(plans))
    pretend_size(dataset, (40, 40, 40), (2.0, 2.0, 2.0))
    OneShotPlanner(dataset.name).plan_experiment()
    again = json.loads(planner.plans_file.read_text())
    assert {name: again["configurations"][name] for name in own} == own
    hers = PlansManager(again).get_configuration("hers")
    assert (list(hers.patch_size), hers.batch_size, list(hers.spacing)) == ([16, 16, 16], 5, [2.0, 2.0, 2.0])
    assert hers.data_identifier == f"{NAMES['OneShotPlanner']}_3d_fullres"
