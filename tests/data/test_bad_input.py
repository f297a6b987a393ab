"""Bad input to plan_and_preprocess: a sentence on stderr, exit status 1, and nothing half-written."""

import gzip
import json

import numpy as np
import pytest
from tiny_data import draw_blobs, read_image, write_image

from nnunet_oneshot.cli import main

SHAPE = (16, 18, 14)


def plan(dataset, *arguments):
    return main(["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "--no_pbar", *arguments])


@pytest.fixture
def refused(capsys):
    """A function that runs the command, expects a refusal, and gives what it wrote to stderr."""

    def run(dataset, *arguments, mentions=()):
        assert plan(dataset, *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "Traceback" not in error
        for text in mentions:
            assert text in error
        if dataset.preprocessed.is_dir():
            left = {path.name for path in dataset.preprocessed.iterdir()}
            assert left <= {"splits_final.json", "oneshot_atlas.json"}
        return error

    return run


def test_no_label(tiny_dataset, refused):
    refused(tiny_dataset(4, labelled=()), mentions=["no label", "labelsTr"])


def test_one_case(tiny_dataset, refused):
    refused(tiny_dataset(1), mentions=["1 training case"])


def test_no_images(tiny_dataset, refused):
    dataset = tiny_dataset(2)
    dataset.image("case_00").parent.rename(dataset.raw / "images")
    refused(dataset, mentions=["imagesTr"])


def test_empty_label_of_the_atlas(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    write_image(dataset.label("case_00"), np.zeros(SHAPE, np.uint8))
    refused(dataset, mentions=["case_00", "is empty"])


def test_unexpected_value_in_the_label_of_the_atlas(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    label = read_image(dataset.label("case_00"))
    label[0, 0, 0] = 9
    write_image(dataset.label("case_00"), label)
    refused(dataset, mentions=["case_00", "[9]", "[0, 1, 2]"])


def test_label_of_the_atlas_of_another_shape(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    write_image(dataset.label("case_00"), draw_blobs((16, 18, 15), np.random.default_rng(0))[1])
    refused(dataset, mentions=["case_00", "(16, 18, 15)", "(16, 18, 14)"])


def test_label_of_the_atlas_of_another_spacing(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    write_image(dataset.label("case_00"), read_image(dataset.label("case_00")), (2.0, 1.0, 1.0))
    refused(dataset, mentions=["case_00", "spacing", "2.0"])


def test_label_of_the_atlas_in_another_orientation(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    flipped = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    write_image(dataset.label("case_00"), read_image(dataset.label("case_00")), direction=flipped)
    refused(dataset, mentions=["case_00", "direction"])


def test_label_of_the_atlas_at_another_origin_is_a_warning(tiny_dataset, capsys):
    dataset = tiny_dataset(3)
    write_image(dataset.label("case_00"), read_image(dataset.label("case_00")), origin=(5.0, 0.0, 0.0))
    assert plan(dataset, "--no_pp") == 0
    assert "origin" in capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 2])
def test_truncated_image(tiny_dataset, refused, number):
    dataset = tiny_dataset(3)
    path = dataset.image(f"case_{number:02d}")
    path.write_bytes(path.read_bytes()[:-400])
    refused(dataset, mentions=[f"case_{number:02d}", str(path), "cannot be read"])


def test_image_shorter_than_its_header_says(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    path = dataset.image("case_02")
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-400]))
    refused(dataset, mentions=["case_02", "cannot be read"])


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("content", [b"", b"no image"])
def test_file_that_is_no_image(tiny_dataset, refused, number, content):
    dataset = tiny_dataset(3)
    path = dataset.image(f"case_{number:02d}")
    path.write_bytes(content)
    refused(dataset, mentions=[f"case_{number:02d}", str(path), "cannot be read"])


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_truncated_image_of_other_formats(tiny_dataset, refused, ending):
    dataset = tiny_dataset(3, ending=ending)
    path = dataset.image("case_01")
    path.write_bytes(path.read_bytes()[:-900])
    refused(dataset, mentions=["case_01", str(path)])


def test_truncated_png(tiny_dataset, refused):
    dataset = tiny_dataset(3, shape=(40, 48), ending=".png")
    path = dataset.image("case_01")
    path.write_bytes(path.read_bytes()[:-300])
    refused(dataset, mentions=["case_01", str(path)])


def test_truncated_label_of_the_atlas(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    path = dataset.label("case_00")
    path.write_bytes(path.read_bytes()[:-60])
    refused(dataset, mentions=["case_00", str(path)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_image_that_is_not_finite(tiny_dataset, refused, value):
    dataset = tiny_dataset(3)
    image = read_image(dataset.image("case_01")).astype(np.float32)
    image[2, 2, 2] = value
    write_image(dataset.image("case_01"), image)
    refused(dataset, mentions=["case_01", "1 voxels are NaN or infinite"])


def test_image_of_another_format_that_is_not_finite(tiny_dataset, refused):
    dataset = tiny_dataset(3, ending=".nrrd")
    image = read_image(dataset.image("case_01")).astype(np.float32)
    image[2, 2, 2] = np.nan
    write_image(dataset.image("case_01"), image)
    refused(dataset, mentions=["case_01", "1 voxels are NaN or infinite"])


def test_constant_image(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    write_image(dataset.image("case_01"), np.zeros(SHAPE, np.uint8))
    refused(dataset, mentions=["case_01", "same value"])


def test_missing_channel(tiny_dataset, refused):
    dataset = tiny_dataset(3, channels=("T1", "T2"))
    dataset.image("case_01", 1).unlink()
    refused(dataset, mentions=["case_01", "1 channel", "['T1', 'T2']"])


def test_surplus_channel(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    write_image(dataset.image("case_02", 1), draw_blobs(SHAPE, np.random.default_rng(0))[0])
    refused(dataset, mentions=["case_02", "2 image files"])


def test_channels_of_different_shape(tiny_dataset, refused):
    dataset = tiny_dataset(3, channels=("T1", "T2"))
    write_image(dataset.image("case_01", 1), draw_blobs((16, 18, 15), np.random.default_rng(0))[0])
    refused(dataset, mentions=["case_01", "(16, 18, 15)"])


def test_channels_of_different_spacing(tiny_dataset, refused):
    dataset = tiny_dataset(3, channels=("T1", "T2"))
    write_image(dataset.image("case_01", 1), draw_blobs(SHAPE, np.random.default_rng(0))[0], (1.0, 1.0, 3.0))
    refused(dataset, mentions=["case_01", "spacing"])


def test_image_name_without_channel_number(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    dataset.image("case_01").rename(dataset.raw / "imagesTr" / "case_01.nii.gz")
    refused(dataset, mentions=["case_01.nii.gz", "_0000"])


def test_listed_image_that_does_not_exist(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    listed = {case: {"images": [f"imagesTr/{case}_0000.nii.gz"]} for case in dataset.cases}
    listed["case_00"]["label"] = "labelsTr/case_00.nii.gz"
    listed["case_02"]["images"] = ["imagesTr/gone.nii.gz"]
    dataset.edit_json(dataset=listed)
    refused(dataset, mentions=["case_02", "gone.nii.gz"])


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"numTraining": 7}, ["numTraining", "7", "3 training images"]),
        ({"labels": None}, ["labels"]),
        ({"channel_names": None}, ["channel_names"]),
        ({"labels": {"background": 0, "left": 1, "right": 3}}, ["[0, 1, 3]", "consecutive"]),
        ({"labels": {"left": 1, "right": 2}}, ["ackground"]),
        ({"labels": {"background": 0, "left": 1, "right": 10**30}}, ["right", "from 0 to 32767"]),
        ({"labels": {"background": 1, "left": 0, "right": 2}}, ['expected "background": 0']),
        ({"labels": {"background": 0, "ignore": 1, "left": 2}}, ["nnU-Net refuses", '"ignore"']),
        ({"labels": {"background": 0, "both": [1, 2], "right": 2}}, ["regions_class_order"]),
        ({"labels": {"background": 0, "left": 1, "ignore": [2]}}, ['"ignore"', "[2]", "one number"]),
        ({"file_ending": ".xyz"}, []),
    ],
)
def test_faulty_dataset_json(tiny_dataset, refused, changes, mentions):
    dataset = tiny_dataset(3)
    dataset.edit_json(**changes)
    refused(dataset, mentions=mentions)


def test_damaged_dataset_json(tiny_dataset, refused):
    dataset = tiny_dataset(3)
    (dataset.raw / "dataset.json").write_text("{")
    refused(dataset, mentions=["dataset.json", "not valid JSON"])


def test_atlas_without_label(tiny_dataset, refused):
    refused(tiny_dataset(3), "--atlas", "case_01", mentions=["case_01", "has no label", "(case_00)"])


def test_atlas_that_does_not_exist(tiny_dataset, refused):
    refused(tiny_dataset(3), "--atlas", "nobody", mentions=["nobody", "not a case", "(case_00)"])


def test_atlas_against_the_plans_block(tiny_dataset, capsys):
    dataset = tiny_dataset(6, labelled="all")
    assert plan(dataset, "--no_pp") == 0
    path = dataset.preprocessed / "nnUNetOneShotCPUPlans.json"
    plans = json.loads(path.read_text())
    plans["oneshot"]["atlases"] = ["case_01"]
    path.write_text(json.dumps(plans))
    assert plan(dataset, "--no_pp", "--atlas", "case_02") == 1
    assert 'set "atlases" to null' in capsys.readouterr().err


def test_faulty_block_in_existing_plans_is_refused_and_kept(tiny_dataset, capsys):
    dataset = tiny_dataset(3)
    assert plan(dataset, "--no_pp") == 0
    path = dataset.preprocessed / "nnUNetOneShotCPUPlans.json"
    plans = json.loads(path.read_text())
    plans["oneshot"]["sedd"] = 3
    path.write_text(json.dumps(plans))
    assert plan(dataset) == 1
    assert "sedd" in capsys.readouterr().err
    assert json.loads(path.read_text()) == plans


@pytest.mark.parametrize(
    ("damage", "mentions"),
    [
        (lambda plans: [], ["must hold a JSON object"]),
        (lambda plans: {**plans, "configurations": []}, ["does not hold nnU-Net's plans"]),
        (lambda plans: {**plans, "transpose_forward": [0, 1, 1]}, ['"transpose_forward"', "[0, 1, 1]", "some order"]),
        (lambda plans: with_configuration(plans, inherits_from="b"), ['"inherits_from"', '"b"', '"mine"']),
        (lambda plans: with_configuration(plans, inherits_from="mine"), ['"inherits_from"']),
        (lambda plans: with_configuration(plans), ['"data_identifier"', "is missing", '"mine"']),
        (lambda plans: with_configuration(plans, inherits_from="3d_fullres", batch_size=0), ['"batch_size" is 0']),
        (lambda plans: with_configuration(plans, inherits_from="3d_fullres", spacing=[1, None, 1]), ["[1, null, 1]"]),
    ],
)
def test_plans_of_another_shape_are_refused_and_kept(tiny_dataset, capsys, damage, mentions):
    dataset = tiny_dataset(3)
    assert plan(dataset, "--no_pp") == 0
    path = dataset.preprocessed / "nnUNetOneShotCPUPlans.json"
    content = json.dumps(damage(json.loads(path.read_text())))
    path.write_text(content)
    assert plan(dataset) == 1
    error = capsys.readouterr().err
    assert all(text in error for text in [str(path), *mentions])
    assert path.read_text() == content


def with_configuration(plans, **entries):
    return {**plans, "configurations": {**plans["configurations"], "mine": entries}}


def test_unusable_other_label_is_reported_when_asked_for(tiny_dataset, refused):
    dataset = tiny_dataset(6, labelled="all")
    dataset.label("case_05").write_bytes(b"no label")
    refused(dataset, "--verify", "--atlas", "case_00", mentions=["case_05", "cannot be read"])


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["-c", "3d_halfres"], ["Unknown configuration 3d_halfres", "3d_fullres"]),
        (["-c", "2d", "3d_fullres", "-np", "1", "1", "1"], ["-np has 3"]),
        (["-np", "0"], ["at least 1"]),
        (["-gpu_memory_target", "-3"], ["-gpu_memory_target"]),
        (["-overwrite_target_spacing", "1", "2"], ["three numbers"]),
        (["-overwrite_plans_name", "a/b"], ["-overwrite_plans_name", "holds '/'"]),
        (["-pl", "NoPlanner"], ["NoPlanner", "OneShotCPUPlanner"]),
    ],
)
def test_faulty_options(tiny_dataset, refused, arguments, mentions):
    refused(tiny_dataset(3), *arguments, mentions=mentions)


def test_configuration_that_the_plans_lack(tiny_dataset, capsys):
    assert plan(tiny_dataset(3), "-c", "3d_lowres") == 1
    assert "none of the configurations 3d_lowres" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
@pytest.mark.parametrize("value", [None, ""])
def test_unset_variables(tiny_dataset, capsys, monkeypatch, variable, value):
    dataset = tiny_dataset(3)
    monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    assert plan(dataset) == 1
    assert f"export {variable}=" in capsys.readouterr().err


def test_unknown_data_set(tiny_dataset, capsys):
    tiny_dataset(3)
    assert main(["plan_and_preprocess", "-d", "77"]) == 1
    assert "Dataset901_Tiny" in capsys.readouterr().err


def test_folder_that_cannot_be_written(tiny_dataset, capsys, monkeypatch, tmp_path):
    dataset = tiny_dataset(3)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "file" / "preprocessed"))
    assert plan(dataset) == 1
    assert "Cannot write" in capsys.readouterr().err


def test_interruption_leaves_nothing_half_written(tiny_dataset, monkeypatch):
    from nnunet_oneshot.data.preprocessing import OneShotPreprocessor

    dataset = tiny_dataset(3)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(OneShotPreprocessor, "run_case_save", interrupt)
    assert plan(dataset) == 130
    assert not any(path.is_dir() and path.name != "gt_segmentations" for path in dataset.preprocessed.iterdir())
