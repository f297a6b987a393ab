"""The command plan_and_preprocess on data sets that are as they should be."""

import json
import pickle

import blosc2
import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_data import draw_blobs, read_image, write_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.plans import FOR_OUR_TRAINERS, NOTE

PLANS = "nnUNetOneShotCPUPlans"


def plan(dataset, *arguments, planner="OneShotCPUPlanner", configuration="3d_fullres"):
    return main(
        ["plan_and_preprocess", "-d", str(dataset.id), "-pl", planner, "-c", configuration, "--no_pbar", *arguments]
    )


def load(dataset, name=f"{PLANS}.json"):
    return json.loads((dataset.preprocessed / name).read_text())


def array(dataset, case, configuration="3d_fullres", plans=PLANS):
    path = dataset.preprocessed / f"{plans}_{configuration}" / f"{case}.b2nd"
    return blosc2.open(urlpath=str(path), mode="r")[:]


def properties(dataset, case, configuration="3d_fullres"):
    return pickle.loads((dataset.preprocessed / f"{PLANS}_{configuration}" / f"{case}.pkl").read_bytes())


@pytest.mark.parametrize(("cases", "labelled"), [(2, ("case_01",)), (5, ("case_00",)), (5, ("case_00", "case_03"))])
def test_any_number_of_labelled_cases(tiny_dataset, cases, labelled):
    dataset = tiny_dataset(cases, labelled=labelled)
    assert plan(dataset) == 0
    folder = dataset.preprocessed / f"{PLANS}_3d_fullres"
    assert sorted(path.stem for path in folder.glob("*.pkl")) == dataset.cases
    assert sorted(path.name for path in (dataset.preprocessed / "gt_segmentations").iterdir()) == [
        f"{case}.nii.gz" for case in labelled
    ]
    assert not list(dataset.preprocessed.glob(".*"))
    assert load(dataset, "oneshot_atlas.json")["atlases"] == list(labelled)


def test_unlabelled_case_has_no_class_locations_and_no_foreground(tiny_dataset):
    dataset = tiny_dataset(3)
    assert plan(dataset) == 0
    assert all(len(places) == 0 for places in properties(dataset, "case_01")["class_locations"].values())
    assert set(np.unique(array(dataset, "case_01_seg"))) <= {-1, 0}
    assert all(len(places) for places in properties(dataset, "case_00")["class_locations"].values())
    assert {1, 2} <= set(np.unique(array(dataset, "case_00_seg")))


def test_plans_name_only_classes_of_nnunet_and_hold_the_block(tiny_dataset):
    dataset = tiny_dataset(3)
    assert plan(dataset) == 0
    plans = load(dataset)
    assert plans["oneshot"]["registration"]["max_voxels"] == 600_000
    assert plans["experiment_planner_used"] == "OneShotCPUPlanner"
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    assert configuration.preprocessor_class.__module__.startswith("nnunetv2.")
    assert PlansManager(plans).image_reader_writer_class.__module__.startswith("nnunetv2.")
    assert plans.pop(NOTE) == FOR_OUR_TRAINERS
    assert "nnunet_oneshot" not in json.dumps(plans)


def test_other_labels_influence_neither_fingerprint_nor_plans_nor_images(tiny_dataset):
    dataset = tiny_dataset(6, labelled="all", channels=("CT", "MRI"))
    random = np.random.default_rng(1)
    for case in dataset.cases:
        # Images with zeros outside their centre are cropped and normalised inside a mask, where labels could leak.
        for channel in range(2):
            image = read_image(dataset.image(case, channel))
            image[:5], image[-5:], image[:, :4] = 0, 0, 0
            write_image(dataset.image(case, channel), image)
    assert plan(dataset, "--atlas", "case_02") == 0
    names = (f"{PLANS}.json", "oneshot_fingerprint.json")
    before = [load(dataset, name) for name in names], [array(dataset, case) for case in dataset.cases]
    assert before[0][0]["configurations"]["3d_fullres"]["use_mask_for_norm"] == [False, True]

    for case in dataset.cases:
        if case == "case_05":
            dataset.label(case).write_bytes(b"no label at all")
        elif case == "case_04":
            write_image(dataset.label(case), np.ones((3, 3, 3), np.uint8))
        elif case != "case_02":
            write_image(dataset.label(case), random.integers(0, 3, (16, 18, 14)).astype(np.uint8))
    with pytest.warns(UserWarning, match="treated as unlabelled"):
        assert plan(dataset, "--clean") == 0
    assert [load(dataset, name) for name in names] == before[0]
    for case, image in zip(dataset.cases, before[1], strict=True):
        np.testing.assert_array_equal(array(dataset, case), image)


def test_no_label_but_the_atlas_is_opened_before_preprocessing(tiny_dataset):
    dataset = tiny_dataset(6, labelled="all")
    for case in dataset.cases[1:]:
        dataset.label(case).unlink()
        dataset.label(case).symlink_to(dataset.raw / "dataset.json")
    assert plan(dataset, "--atlas", "case_00", "--no_pp") == 0


def test_labels_of_cases_that_are_no_atlas_are_kept_for_nnunets_own_trainer(tiny_dataset):
    dataset = tiny_dataset(6, labelled="all")
    assert plan(dataset) == 0
    assert all({1, 2} <= set(np.unique(array(dataset, f"{case}_seg"))) for case in dataset.cases)


def test_atlas_is_named_by_the_user_and_the_folds_that_hold_it_out_are_told(tiny_dataset, capsys):
    dataset = tiny_dataset(6, labelled="all")
    assert plan(dataset, "--atlas", "case_03", "--no_pp") == 0
    assert load(dataset, "oneshot_atlas.json")["chosen_by"] == "user"
    assert load(dataset, "oneshot_fingerprint.json")["oneshot"]["atlases"] == ["case_03"]
    held_out = [str(i) for i, fold in enumerate(load(dataset, "splits_final.json")) if "case_03" in fold["val"]]
    assert f"validation part of fold {held_out[0]}, which" in capsys.readouterr().out


def test_edited_atlas_file_is_followed_and_not_overwritten(tiny_dataset):
    dataset = tiny_dataset(6, labelled="all")
    assert plan(dataset, "--no_pp") == 0
    path = dataset.preprocessed / "oneshot_atlas.json"
    stored = json.loads(path.read_text())
    train = load(dataset, "splits_final.json")[0]["train"]
    stored["atlases"] = [next(case for case in train if case not in stored["atlases"])]
    path.write_text(json.dumps(stored))
    assert plan(dataset, "--no_pp") == 0
    assert json.loads(path.read_text()) == stored
    assert load(dataset, "oneshot_fingerprint.json")["oneshot"]["atlases"] == stored["atlases"]


def test_planning_again_keeps_an_edited_block_and_custom_configurations(tiny_dataset, capsys):
    dataset = tiny_dataset(3)
    assert plan(dataset, "--no_pp") == 0
    plans = load(dataset)
    plans["oneshot"]["seed"] = 7
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    (dataset.preprocessed / f"{PLANS}.json").write_text(json.dumps(plans))
    assert plan(dataset, "--no_pp", configuration="mine") == 0
    assert load(dataset) == plans
    assert "block of the existing plans was kept" in capsys.readouterr().out


def test_custom_configuration_that_inherits_is_told_with_what_it_inherits(tiny_dataset, capsys):
    dataset = tiny_dataset(3, spacing=(1.0, 1.0, 2.0))
    assert plan(dataset, "--no_pp") == 0
    plans = load(dataset)
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]}
    (dataset.preprocessed / f"{PLANS}.json").write_text(json.dumps(plans))
    capsys.readouterr()
    assert plan(dataset, "--no_pp", configuration="mine") == 0
    assert load(dataset) == plans
    spacing = [round(value, 3) for value in plans["configurations"]["3d_fullres"]["spacing"]]
    assert f"mine: patch [8, 8, 8], batch 2, spacing {spacing} mm" in capsys.readouterr().out


def test_images_are_read_again_only_when_something_changed(tiny_dataset, monkeypatch, capsys):
    from nnunet_oneshot.data import fingerprint

    dataset = tiny_dataset(3)
    read = []
    survey = fingerprint._survey_case
    monkeypatch.setattr(fingerprint, "_survey_case", lambda case, *rest: read.append(case) or survey(case, *rest))
    for arguments, expected in (((), 3), ((), 0), (("--clean",), 3)):
        read.clear()
        assert plan(dataset, "--no_pp", *arguments) == 0
        assert len(read) == expected
    write_image(dataset.image("case_01"), draw_blobs((16, 18, 14), np.random.default_rng(9))[0])
    read.clear()
    assert plan(dataset, "--no_pp") == 0
    assert len(read) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: [],
        lambda content: {**content, "oneshot": {}},
        lambda content: {**content, "spacings": [[1.0, 1.0]] * 3},
        lambda content: {**content, "median_relative_size_after_cropping": "1"},
        lambda content: {**content, "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}},
    ],
)
def test_a_damaged_fingerprint_is_made_anew(tiny_dataset, damage):
    dataset = tiny_dataset(3)
    assert plan(dataset, "--no_pp") == 0
    whole = load(dataset, "oneshot_fingerprint.json")
    (dataset.preprocessed / "oneshot_fingerprint.json").write_text(json.dumps(damage(whole)))
    assert plan(dataset, "--no_pp") == 0
    assert load(dataset, "oneshot_fingerprint.json") == whole


def test_fingerprint_of_nnunet_is_left_alone(tiny_dataset):
    dataset = tiny_dataset(3)
    dataset.preprocessed.mkdir()
    (dataset.preprocessed / "dataset_fingerprint.json").write_text('{"made_by": "nnU-Net"}')
    assert plan(dataset, "--no_pp") == 0
    assert load(dataset, "dataset_fingerprint.json") == {"made_by": "nnU-Net"}


def test_label_that_was_removed_from_the_raw_data_is_forgotten(tiny_dataset):
    dataset = tiny_dataset(6, labelled="all")
    assert plan(dataset, "--atlas", "case_00") == 0
    for case in dataset.cases[1:]:
        dataset.label(case).unlink()
    assert plan(dataset) == 0
    assert [path.name for path in (dataset.preprocessed / "gt_segmentations").iterdir()] == ["case_00.nii.gz"]
    assert all(len(places) == 0 for places in properties(dataset, "case_01")["class_locations"].values())


def test_splits_of_the_raw_data_set_are_taken_over(tiny_dataset):
    dataset = tiny_dataset(4)
    splits = [{"train": ["case_00", "case_03"], "val": ["case_01"]}]
    (dataset.raw / "splits_final.json").write_text(json.dumps(splits))
    assert plan(dataset, "--no_pp") == 0
    assert load(dataset, "splits_final.json") == splits


def test_cases_listed_in_dataset_json_need_no_label_entry(tiny_dataset):
    dataset = tiny_dataset(4)
    listed = {case: {"images": [f"imagesTr/{case}_0000.nii.gz"]} for case in dataset.cases}
    listed["case_00"]["label"] = "labelsTr/case_00.nii.gz"
    listed["case_01"]["label"] = "labelsTr/does_not_exist.nii.gz"
    dataset.edit_json(dataset=listed)
    assert plan(dataset) == 0
    assert load(dataset, "oneshot_atlas.json")["atlases"] == ["case_00"]
    assert array(dataset, "case_03").shape[0] == 1


@pytest.mark.parametrize("count", [1, None])
def test_number_of_training_cases_may_count_labels_only_or_be_missing(tiny_dataset, capsys, count):
    dataset = tiny_dataset(4)
    dataset.edit_json(numTraining=count)
    assert plan(dataset, "--no_pp") == 0
    assert "4 training images are used" in capsys.readouterr().out


def test_true_2d_images(tiny_dataset):
    dataset = tiny_dataset(4, shape=(40, 48), ending=".png")
    assert plan(dataset, configuration="2d") == 0
    assert list(load(dataset)["configurations"]) == ["2d"]
    assert array(dataset, "case_02", "2d").shape == (1, 1, 40, 48)


def test_regions_and_ignore_label(tiny_dataset):
    labels = {"background": 0, "both": [1, 2], "right": [2], "ignore": 3}
    dataset = tiny_dataset(3, labels=labels, regions_class_order=[1, 2])
    assert plan(dataset) == 0
    labelled = properties(dataset, "case_00")["class_locations"]
    assert properties(dataset, "case_01")["class_locations"].keys() == labelled.keys()


def test_structure_missing_from_the_atlas_is_a_warning_with_its_name(tiny_dataset, capsys):
    dataset = tiny_dataset(3, labels={"background": 0, "left": 1, "right": 2, "spleen": 3})
    assert plan(dataset, "--no_pp") == 0
    assert "no voxel of 'spleen'" in capsys.readouterr().out


def test_several_worker_processes(tiny_dataset):
    dataset = tiny_dataset(3)
    assert plan(dataset, "-np", "2", "-npfp", "2") == 0
    assert len(list((dataset.preprocessed / f"{PLANS}_3d_fullres").glob("*.pkl"))) == 3


def test_failed_preprocessing_keeps_what_was_there(tiny_dataset, monkeypatch, capsys):
    from nnunet_oneshot.data.preprocessing import OneShotPreprocessor

    dataset = tiny_dataset(3)
    assert plan(dataset) == 0
    folder = dataset.preprocessed / f"{PLANS}_3d_fullres"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OneShotPreprocessor, "run_case_save", fail)
    assert plan(dataset) == 1
    assert "No space left" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(dataset.preprocessed.glob(".*"))


def test_plans_of_another_data_set_are_preprocessed_with(tiny_dataset):
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )

    source = tiny_dataset(n_cases=4, dataset_id=901)
    plan = ["plan_and_preprocess", "-d", "901", "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    assert main(plan) == 0
    target = tiny_dataset(n_cases=3, dataset_id=902, seed=1)
    target.preprocessed.mkdir(exist_ok=True)
    move_plans_between_datasets(source.id, target.id, "nnUNetOneShotCPUPlans", "Moved")
    command = ["preprocess", "-d", "902", "-plans_name", "Moved", "-c", "3d_fullres", "--no_pbar"]
    assert main(command) == 0
    plans = json.loads((target.preprocessed / "Moved.json").read_text())
    assert plans["dataset_name"] == target.name and "oneshot" in plans
    folder = target.preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"]
    assert len(list(folder.glob("*.pkl"))) == 3
    assert (target.preprocessed / "dataset.json").is_file()


def test_preprocessing_with_plans_that_do_not_exist_is_an_error(tiny_dataset, capsys):
    tiny_dataset(n_cases=3)
    assert main(["preprocess", "-d", "901", "-plans_name", "None", "-c", "3d_fullres"]) == 1
    assert "the plans file" in capsys.readouterr().err.lower()
