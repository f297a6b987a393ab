"""Data sets that anybody may have written: each fault ends in a sentence that names it, none in a traceback."""

import json
import os

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io
from tiny_data import draw_blobs, read_image, write_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.headers import carry_geometry, header_notes
from nnunet_oneshot.data.image_folder import ImageFolder
from nnunet_oneshot.data.parallel import default_processes
from nnunet_oneshot.data.raw import RawDataset, find_images
from nnunet_oneshot.data.verify import check_files, check_images, read_label, whole_labels
from nnunet_oneshot.data.verify import read_image as read_checked
from nnunet_oneshot.errors import OneShotError

SHAPE = (16, 18, 14)
LABELS = {"background": 0, "left": 1, "right": 2}


def survey(dataset):
    """What is checked before anything is planned: files, every image, and every label."""
    raw = RawDataset(dataset.raw)
    notes = check_files(raw)
    for case in raw.cases:
        image = read_checked(case, raw.images(case), raw.reader_class, raw.channel_names)
        notes += image.warnings
        if raw.label(case):
            notes += read_label(raw, case, image)[1]
    return notes


def refused(dataset, *mentions):
    with pytest.raises(OneShotError) as caught:
        survey(dataset)
    for text in mentions:
        assert text in str(caught.value)


# Description


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"channel_names": ["MRI"]}, ["channel_names", '["MRI"]', '{"0"']),
        ({"channel_names": "MRI"}, ["channel_names", '"MRI"']),
        ({"channel_names": {"MRI": 0}}, ["channel_names", '"0"']),
        ({"channel_names": {"1": "MRI"}}, ["channel_names", '"0"']),
        ({"channel_names": {"1": "T2", "0": "T1"}}, ["channel_names", "in this order"]),
        ({"channel_names": {"0": 3}}, ["channel_names", "text"]),
        ({"channel_names": {}}, ["channel_names", "{}"]),
        ({"labels": {**LABELS, "left": "1"}}, ['"left"', '"1"', "must be a number"]),
        ({"labels": {**LABELS, "left": True}}, ["must be a number"]),
        ({"labels": {**LABELS, "left": 1.5}}, ["must be a number"]),
        ({"labels": {**LABELS, "left": None}}, ["must be a number"]),
        ({"labels": {**LABELS, "left": [1, "2"]}}, ["must be a number"]),
        ({"labels": ["background", "left"]}, ["labels", "an object"]),
        ({"labels": "left"}, ["labels", "an object"]),
        ({"file_ending": 7}, ["file_ending", "7"]),
        ({"file_ending": "nii.gz"}, ["file_ending", "begins with a dot"]),
        ({"file_ending": "./../x"}, ["file_ending", "begins with a dot"]),
        ({"numTraining": "3"}, ["numTraining", '"3"', "number"]),
        ({"numTraining": [3]}, ["numTraining", "number"]),
        ({"dataset": [{"image": "a", "label": "b"}]}, ["dataset", "an object of cases"]),
        ({"dataset": {"case_00": "a"}}, ["case_00", "images"]),
        ({"dataset": {"case_00": {"images": [3]}}}, ["case_00", "images"]),
        ({"dataset": {"case_00": {"images": ["a"], "label": 3}}}, ["case_00", "label"]),
        ({"regions_class_order": "12"}, ["regions_class_order", "list of numbers"]),
        ({"overwrite_image_reader_writer": "NibabelIOWithReorientt"}, ["NibabelIOWithReorientt", "NibabelIO,"]),
        ({"overwrite_image_reader_writer": "np"}, ["'np'", "Readers"]),
        ({"overwrite_image_reader_writer": 3}, ["overwrite_image_reader_writer", "3"]),
    ],
)
def test_description_of_the_wrong_shape(tiny_dataset, changes, mentions):
    dataset = tiny_dataset(3)
    dataset.edit_json(**changes)
    refused(dataset, "dataset.json", *mentions)


@pytest.mark.parametrize("key", ["labels", "channel_names"])
def test_null_in_the_description(tiny_dataset, key):
    dataset = tiny_dataset(2)
    path = dataset.raw / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    refused(dataset, key, "null")


@pytest.mark.parametrize("content", [[], "text", 3, None])
def test_description_that_is_no_object(tiny_dataset, content):
    dataset = tiny_dataset(2)
    (dataset.raw / "dataset.json").write_text(json.dumps(content))
    refused(dataset, "must hold a JSON object")


@pytest.mark.parametrize("changes", [{"labels": {**LABELS, "left": "1"}}, {"channel_names": ["MRI"]}, {"dataset": []}])
def test_the_command_ends_in_the_sentence(tiny_dataset, capsys, changes):
    dataset = tiny_dataset(3)
    dataset.edit_json(**changes)
    assert main(["plan_and_preprocess", "-d", "901", "-pl", "OneShotCPUPlanner", "--no_pbar"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not dataset.preprocessed.exists()


# Names


@pytest.mark.parametrize(
    "name",
    ["../../../evil", "/elsewhere/x", "a/b", "..", ".hidden", "-rf", "x" * 300, "a\nb", "nul", "a\\b", "scan_seg"],
)
def test_listed_names_of_cases(tiny_dataset, name):
    dataset = tiny_dataset(3)
    entry = {"images": ["imagesTr/case_00_0000.nii.gz"], "label": "labelsTr/case_00.nii.gz"}
    dataset.edit_json(dataset={name: entry, "case_01": {"images": ["imagesTr/case_01_0000.nii.gz"]}})
    refused(dataset, "dataset.json", "Rename it")


@pytest.mark.parametrize("name", ["scan_seg", "x" * 200, "-rf"])
def test_names_of_files(tiny_dataset, name):
    dataset = tiny_dataset(3)
    dataset.image("case_01").rename(dataset.image(name))
    refused(dataset, name[:50], "Rename it")


@pytest.mark.parametrize("hidden", ["._case_00_0000.nii.gz", ".DS_Store", ".partial-abc-case_00_0000.nii.gz"])
def test_hidden_files_are_no_cases(tiny_dataset, tmp_path, hidden):
    dataset = tiny_dataset(3)
    for folder in ("imagesTr", "labelsTr"):
        (dataset.raw / folder / hidden).write_bytes(b"x")
    assert RawDataset(dataset.raw).cases == dataset.cases
    assert survey(dataset) == []
    assert list(find_images(dataset.raw / "imagesTr", ".nii.gz")) == dataset.cases
    assert len(ImageFolder(dataset.raw / "imagesTr").cases) == 3


def test_endings_in_capitals(tiny_dataset):
    dataset = tiny_dataset(3)
    dataset.image("case_01").rename(dataset.raw / "imagesTr" / "case_01_0000.NII.GZ")
    refused(dataset, "case_01_0000.NII.GZ", ".nii.gz", "rename")


@pytest.mark.parametrize("numbers", [(1,), (0, 2), (1, 2)])
def test_channel_numbers_with_gaps(tiny_dataset, numbers):
    dataset = tiny_dataset(3, channels=("T1", "T2"))
    for channel in (0, 1):
        dataset.image("case_01", channel).rename(dataset.raw / f"{channel}")
    for number, channel in zip(numbers, (0, 1), strict=False):
        (dataset.raw / f"{channel}").rename(dataset.image("case_01", number))
    refused(dataset, "case_01", f"{numbers[-1]:04d}", "expected 0000")


def test_labels_without_a_case_and_dangling_links_are_told(tiny_dataset):
    dataset = tiny_dataset(3)
    write_image(dataset.label("casee_01"), np.ones(SHAPE, np.uint8))
    os.symlink(dataset.raw / "nowhere.nii.gz", dataset.label("case_02"))
    notes = check_files(RawDataset(dataset.raw))
    assert any("casee_01.nii.gz" in note and "match no case" in note for note in notes)
    assert any("case_02.nii.gz" in note and "link to nothing" in note for note in notes)
    assert RawDataset(dataset.raw).labelled == ["case_00"]


def test_listed_label_that_does_not_exist_is_told(tiny_dataset):
    dataset = tiny_dataset(2)
    listed = {case: {"images": [str(dataset.image(case))], "label": str(dataset.label(case))} for case in dataset.cases}
    dataset.edit_json(dataset=listed)
    (note,) = check_files(RawDataset(dataset.raw))
    assert "case_01.nii.gz" in note and "unlabelled" in note


def test_image_that_is_a_dangling_link(tiny_dataset):
    dataset = tiny_dataset(3)
    dataset.image("case_01").unlink()
    os.symlink(dataset.raw / "nowhere.nii.gz", dataset.image("case_01"))
    refused(dataset, "case_01", "link to nothing")


def test_folder_in_the_place_of_an_image(tiny_dataset):
    dataset = tiny_dataset(3)
    dataset.image("case_01").unlink()
    dataset.image("case_01").mkdir()
    refused(dataset, "case_01", "no file")


# Images and labels


@pytest.mark.parametrize("shape", [(16, 1, 14), (16, 18, 1)])
def test_one_voxel_along_an_axis(tiny_dataset, shape):
    dataset = tiny_dataset(3)
    write_image(dataset.image("case_01"), np.random.default_rng(0).integers(1, 9, shape).astype(np.uint8))
    refused(dataset, "case_01", "one voxel along an axis")


@pytest.mark.parametrize("palette", [False, True])
def test_labels_in_colours(tiny_dataset, palette):
    dataset = tiny_dataset(3, shape=(40, 48), ending=".png")
    label = io.imread(dataset.label("case_00"))
    if palette:
        image = pytest.importorskip("PIL.Image").fromarray(label, mode="P")
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        image.save(dataset.label("case_00"))
    else:
        io.imsave(dataset.label("case_00"), np.stack([label] * 3, -1), check_contrast=False)
    refused(dataset, "case_00", "channels, such as colours", "grey")


@pytest.mark.parametrize(
    ("value", "mentions"),
    [(0.9999, "whole numbers, such as 0.9999"), (1.0005, "without scaling"), (0.99, "does not declare")],
)
def test_labels_to_be_trained_with_that_are_no_whole_numbers(tiny_dataset, value, mentions):
    dataset = tiny_dataset(2)
    label = read_image(dataset.label("case_00")).astype(np.float32)
    write_image(dataset.label("case_00"), np.where(label == 1, np.float32(value), label))
    refused(dataset, "case_00", mentions)


def test_many_undeclared_values_are_not_all_listed(tiny_dataset):
    dataset = tiny_dataset(2)
    write_image(dataset.label("case_00"), np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    with pytest.raises(OneShotError) as caught:
        survey(dataset)
    assert "more] that dataset.json does not declare" in str(caught.value) and len(str(caught.value)) < 600


def test_whole_numbers_stay_and_others_are_not_touched():
    assert whole_labels(np.array([0, 1, 2], np.uint8)).dtype == np.uint8
    assert whole_labels(np.array([0.9995, 1.4, -0.0001])).tolist() == [1, 1.4, 0]


# Headers


def save(path, affine=None, *, sform=0, qform=0, qform_affine=None, pixdim=None, shape=SHAPE[::-1]):
    """A NIfTI file whose header is set field by field; shape and affine in nibabel's order."""
    voxels = np.random.default_rng(3).integers(1, 200, shape).astype(np.uint8)
    image = nibabel.Nifti1Image(voxels, None)
    header = image.header
    if affine is not None:
        header.set_sform(affine, code=1)
        header.set_qform(affine if qform_affine is None else qform_affine, code=1)
    header["sform_code"], header["qform_code"] = sform, qform
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    image.to_filename(path)
    return str(path)


RAS = np.diag([1.0, 1.5, 2.0, 1.0])
LPS = np.diag([-1.0, -1.5, 2.0, 1.0])
SHEARED = np.array([[1, 0.3, 0, 0], [0, 1.5, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])


def reader(name):
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return recursive_find_reader_writer_by_name(name)


@pytest.mark.parametrize("name", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({"affine": RAS, "sform": 1, "qform": 1}, []),
        ({"affine": RAS, "sform": 1}, []),
        ({"affine": LPS, "qform": 1}, []),
        ({"affine": RAS, "sform": 1, "qform": 1, "qform_affine": LPS}, [["sform and qform", "the sform is taken"]]),
        ({"affine": RAS, "qform_affine": LPS}, [["neither directions nor position"]]),
        ({"affine": RAS, "sform": 1, "pixdim": (0, 1.5, 2)}, [["0 is read as 1 mm"]]),
        ({"affine": RAS, "qform": 1, "pixdim": (-1, 1.5, 2)}, [["negative edge"]]),
        ({"affine": RAS, "sform": 1, "pixdim": (3, 3, 3)}, [["pixdim", "[1.0, 1.5, 2.0]", "[3.0, 3.0, 3.0] mm are"]]),
    ],
)
def test_contradicting_headers_are_told(tmp_path, name, fields, notes):
    path = save(tmp_path / "a_0000.nii.gz", **fields)
    found = check_images({"a": [path]}, reader(name), ["MRI"])
    assert len(found) == len(notes)
    for note, mentions in zip(found, notes, strict=True):
        assert all(text in note for text in [path, *mentions])


@pytest.mark.parametrize("code", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [0, 4])
def test_the_form_that_the_reader_takes_is_named(tmp_path, code, shift):
    moved = LPS.copy()
    moved[0, 3] = shift
    path = save(tmp_path / "a_0000.nii.gz", RAS, sform=code, qform=1, qform_affine=moved)
    # Which one ITK takes depends on both codes, on both forms and on its version.
    itk = "qform" if sitk.ReadImage(path).GetDirection()[0] > 0 else "sform"
    for name, taken in (("SimpleITKIO", itk), ("NibabelIO", "sform")):
        (note,) = check_images({"a": [path]}, reader(name), ["MRI"])
        assert f"the {taken} is taken" in note


def test_sheared_axes_are_no_damage(tmp_path):
    path = save(tmp_path / "a_0000.nii.gz", SHEARED, sform=1, qform_affine=RAS)
    with pytest.raises(OneShotError, match="sheared.*NibabelIO") as caught:
        check_images({"a": [path]}, reader("SimpleITKIO"), ["MRI"])
    assert "truncated" not in str(caught.value)
    notes = check_images({"a": [path]}, reader("NibabelIO"), ["MRI"])
    assert any("sheared" in note for note in notes)


def test_axes_without_a_direction_are_refused(tmp_path):
    path = save(tmp_path / "a_0000.nii.gz", RAS, sform=1)
    image = nibabel.load(path)
    image.header["srow_x"] = 0
    nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header).to_filename(path)
    for name in ("SimpleITKIO", "NibabelIO"):
        with pytest.raises(OneShotError, match="no direction|orthonormal"):
            check_images({"a": [path]}, reader(name), ["MRI"])


def test_label_in_another_order_fits_where_the_reader_reorients(tiny_dataset):
    dataset = tiny_dataset(2)
    label = nibabel.load(dataset.label("case_00"))
    nibabel.save(label.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]])), dataset.label("case_00"))
    dataset.edit_json(overwrite_image_reader_writer="NibabelIOWithReorient")
    assert survey(dataset) == []


def geometry(path):
    image = sitk.ReadImage(str(path))
    return [*image.GetSize(), *image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()]


@pytest.mark.parametrize(
    "fields",
    [
        {"affine": RAS, "sform": 1},
        {"affine": LPS, "qform": 1},
        {"affine": RAS, "sform": 2, "qform": 1, "qform_affine": LPS},
        {"affine": RAS, "qform_affine": LPS},
        {"affine": RAS, "sform": 1, "pixdim": (3, 3, 3)},
        {"affine": RAS, "qform": 1, "pixdim": (-1, 1.5, 2)},
    ],
)
@pytest.mark.parametrize("name", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_what_is_written_lies_where_the_image_lies_for_every_library(tmp_path, name, fields):
    source, target = save(tmp_path / "in.nii.gz", **fields), str(tmp_path / "out.nii.gz")
    one = reader(name)()
    data, properties = one.read_images([source])
    one.write_seg(data[0], target, properties)
    carry_geometry(source, target)
    assert geometry(target) == pytest.approx(geometry(source), abs=1e-4)
    first, second = (nibabel.load(path) for path in (source, target))
    assert np.allclose(first.affine, second.affine, atol=1e-4)
    assert np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    codes = [int(second.header[f"{form}_code"]) for form in ("sform", "qform")]
    if fields.get("sform", 0) + fields.get("qform", 0) and "pixdim" not in fields:
        assert min(codes) > 0


def test_files_of_other_formats_keep_their_bytes(tmp_path):
    write_image(tmp_path / "a.nrrd", np.ones(SHAPE, np.uint8))
    before = (tmp_path / "a.nrrd").read_bytes()
    carry_geometry(None, tmp_path / "a.nrrd")
    assert (tmp_path / "a.nrrd").read_bytes() == before
    assert header_notes(str(tmp_path / "a.nrrd"), {}) == []


# New images


PLANS = {"original_median_spacing_after_transp": [1.0, 1.0, 1.0], "original_median_shape_after_transp": [16, 18, 14]}


@pytest.mark.parametrize(
    ("shape", "spacing", "told"),
    [
        (SHAPE, (1.0, 1.0, 1.0), False),
        (SHAPE, (2.0, 2.0, 2.0), False),
        ((14, 16, 18), (1.0, 1.0, 1.0), False),
        (SHAPE, (0.001, 0.001, 0.001), True),
        (SHAPE, (1.0, 1.0, 4.0), True),
        ((16, 18, 64), (1.0, 1.0, 1.0), True),
    ],
)
def test_extent_far_from_that_of_the_training_images(tmp_path, shape, spacing, told):
    write_image(tmp_path / "a_0000.nii.gz", draw_blobs(shape, np.random.default_rng(0))[0], spacing)
    files = find_images(tmp_path, ".nii.gz")
    notes = check_images(files, reader("SimpleITKIO"), ["MRI"], plans=PLANS)
    assert len(notes) == told
    assert not told or "voxel size" in notes[0] and "Case a" in notes[0]


def test_zeros_around_an_image_do_not_count(tmp_path):
    image = np.pad(draw_blobs(SHAPE, np.random.default_rng(0))[0], 30)
    write_image(tmp_path / "a_0000.nii.gz", image)
    assert check_images(find_images(tmp_path, ".nii.gz"), reader("SimpleITKIO"), ["MRI"], plans=PLANS) == []


@pytest.mark.parametrize("value", ["many", "", "1.5"])
def test_number_of_processes_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv("nnUNet_def_n_proc", value)
    with pytest.raises(OneShotError, match="nnUNet_def_n_proc"):
        default_processes()


@pytest.mark.parametrize("name", ["._a.nii.gz", "a.NII.GZ", "-a.nii.gz"])
def test_folders_of_images_have_the_same_rules_for_names(tmp_path, name):
    write_image(tmp_path / "b.nii.gz", draw_blobs(SHAPE, np.random.default_rng(0))[0])
    (tmp_path / name).write_bytes(b"x")
    if name.startswith("."):
        assert ImageFolder(tmp_path).cases == ["b"]
    else:
        with pytest.raises(OneShotError, match=name):
            ImageFolder(tmp_path)
