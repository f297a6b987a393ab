"""`nnunet_oneshot import`: scans of many formats become a raw data set that plans."""

import csv
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from tiny_dicom import write_series

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.scans import find_scans, read_scan

SPACING, ORIGIN = (0.8, 0.9, 2.5), (-30.0, 20.0, 100.0)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    folder = tmp_path / "raw"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    return folder


def _volume(seed=0, size=(12, 10, 6)):
    values = np.random.default_rng(seed).integers(-200, 300, size[::-1]).astype(np.int16)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    return image


def _label(image, values=(1, 2)):
    array = np.zeros(image.GetSize()[::-1], np.uint8)
    for number, value in enumerate(values):
        array[1:4, 2:6, 1 + 3 * number : 4 + 3 * number] = value
    label = sitk.GetImageFromArray(array)
    label.CopyInformation(image)
    return label


def _write(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def _geometry(image):
    return np.round([*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()], 4).tolist()


def test_dicom_series_become_a_data_set(tmp_path, raw, capsys):
    scans = tmp_path / "CT scans"
    for number, patient in enumerate(("p1", "p 2", "p3")):
        write_series(_volume(number), scans / patient)
    label = _write(_label(_volume()), tmp_path / "drawn.nrrd")
    arguments = ["import", str(scans), "-d", "5", "--label", "p1", str(label), "--labels", "liver", "spleen"]
    assert main(arguments) == 0
    dataset = RawDataset(raw / "Dataset005_CTScans")
    assert dataset.cases == ["p1", "p3", "p_2"]
    assert dataset.labelled == ["p1"]
    assert dataset.channel_names == ["CT"]
    assert dataset.dataset_json["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    for number, case in enumerate(("p1", "p_2", "p3")):
        written = sitk.ReadImage(dataset.images(case)[0])
        assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(_volume(number)))
        assert _geometry(written) == _geometry(_volume(number))
    with open(dataset.folder / "oneshot_sources.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[2] == {"case": "p_2", "images": "Tr", "source": str(scans / "p 2")}
    assert "nnunet_oneshot plan_and_preprocess -d 5 -c 3d_fullres" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".mgz"])
def test_every_format_keeps_values_and_geometry(tmp_path, raw, suffix):
    scans, image = tmp_path / "scans", _volume(3)
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    nifti = _write(image, tmp_path / "a.nii.gz")
    target = scans / f"a{suffix}"
    if suffix == ".mgz":
        scans.mkdir()
        loaded = nibabel.load(nifti)
        nibabel.save(nibabel.MGHImage(np.asarray(loaded.dataobj).astype(np.int32), loaded.affine), target)
    else:
        _write(image, target)
    label = _write(_label(image), tmp_path / "label.nii.gz")
    assert main(["import", str(scans), "-d", "Dataset007_X", "--label", "a", str(label), "--channels", "MR"]) == 0
    written = sitk.ReadImage(str(raw / "Dataset007_X" / "imagesTr" / "a_0000.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image))
    assert np.allclose(_geometry(written), _geometry(image), atol=1e-3)


def test_channels_test_scans_and_a_label_among_the_scans(tmp_path, raw):
    scans = tmp_path / "scans"
    for case in ("a", "b"):
        _write(_volume(), scans / "pairs" / f"{case}_0000.nii.gz")
        _write(_volume(), scans / "pairs" / f"{case}_0001.nii.gz")
    label = _write(_label(_volume()), scans / "pairs" / "a_label.nrrd")
    _write(_volume(), tmp_path / "test" / "c_0000.mha")
    _write(_volume(), tmp_path / "test" / "d_0000.mha")
    arguments = ["import", str(scans), "-d", "9", "--label", "pairs_a", str(label), "--channels", "T1", "T2"]
    assert main([*arguments, "--test", str(tmp_path / "test")]) == 1
    for case in ("c", "d"):
        _write(_volume(), tmp_path / "test" / f"{case}_0001.mha")
    assert main([*arguments, "--test", str(tmp_path / "test")]) == 0
    dataset = RawDataset(raw / "Dataset009_Scans")
    assert dataset.cases == ["pairs_a", "pairs_b"]
    assert [len(dataset.images(case)) for case in dataset.cases] == [2, 2]
    tests = sorted(path.name for path in (dataset.folder / "imagesTs").iterdir())
    assert tests == [f"{case}_{channel:04d}.nii.gz" for case in ("c", "d") for channel in range(2)]


def test_values_are_renumbered_names_come_from_slicer_and_a_cropped_label_is_filled_up(tmp_path, raw, capsys):
    image = _volume()
    _write(image, tmp_path / "scans" / "a.nii.gz")
    label = _label(image, values=(3, 7))
    cropped = label[1:9, 1:8, 1:5]
    for number, (value, name) in enumerate([(3, "left kidney"), (7, "aorta")]):
        cropped.SetMetaData(f"Segment{number}_LabelValue", str(value))
        cropped.SetMetaData(f"Segment{number}_Name", name)
    path = _write(cropped, tmp_path / "label.seg.nrrd")
    assert main(["import", str(tmp_path / "scans"), "-d", "3", "--label", "a", str(path), "--channels", "CT"]) == 0
    folder = raw / "Dataset003_Scans"
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "a.nii.gz")))
    assert np.array_equal(written, sitk.GetArrayFromImage(_label(image, values=(1, 2))))
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "left kidney": 1, "aorta": 2}
    assert "3 is now 1, 7 is now 2" in capsys.readouterr().out


def test_a_label_in_another_order_of_axes_lies_where_it_was_drawn(tmp_path, raw):
    image = _volume()
    _write(image, tmp_path / "scans" / "a.nii.gz")
    turned = sitk.PermuteAxes(sitk.Flip(_label(image), (True, False, True)), (2, 0, 1))
    path = _write(turned, tmp_path / "label.nii.gz")
    assert main(["import", str(tmp_path / "scans"), "-d", "3", "--label", "a", str(path), "--channels", "CT"]) == 0
    written = sitk.ReadImage(str(raw / "Dataset003_Scans" / "labelsTr" / "a.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(_label(image)))


def test_a_dicom_segmentation_is_read(tmp_path, raw):
    image = _volume()
    write_series(image, tmp_path / "scans" / "p1")
    drawn = tmp_path / "drawn"
    _write(_label(image), drawn / "p1.nii.gz")
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "cyst": 2}}
    (drawn / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    assert main(["to-dicom", "-i", str(drawn), "--scans", str(tmp_path / "scans"), "-o", str(tmp_path / "seg")]) == 0
    path = tmp_path / "seg" / "p1.dcm"
    assert main(["import", str(tmp_path / "scans"), "-d", "3", "--label", "p1", str(path)]) == 0
    written = sitk.ReadImage(str(raw / "Dataset003_Scans" / "labelsTr" / "p1.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(_label(image)))
    content = json.loads((raw / "Dataset003_Scans" / "dataset.json").read_text())
    assert content["labels"] == description["labels"]


def _missing_slice(folder):
    write_series(_volume(), folder, places=[0, 2.5, 5, 10, 12.5, 15])


def _twice_in_one_place(folder):
    write_series(_volume(), folder, places=[0, 0, 2.5, 2.5, 5, 5])


def _tilted(folder):
    write_series(_volume(), folder, shift=0.3)


def _colours(folder):
    _write(sitk.Compose([sitk.Cast(_volume(), sitk.sitkUInt8)] * 3), folder / "c.nii.gz")


def _time_series(folder):
    _write(sitk.JoinSeries([_volume(), _volume(1)]), folder / "c.nii.gz")


def _truncated(folder):
    path = _write(_volume(), folder / "c.nii.gz")
    path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_missing_slice, "2.50 to 5.00 mm apart"),
        (_twice_in_one_place, "several slices at one place"),
        (_tilted, "tilted gantry"),
        (_colours, "3 values a voxel"),
        (_time_series, "a series of 2 volumes"),
        (_truncated, "cannot be read"),
    ],
)
def test_a_scan_that_is_no_regular_volume_is_left_out_and_told(tmp_path, raw, capsys, spoil, said):
    _write(_volume(), tmp_path / "scans" / "a.nii.gz")
    spoil(tmp_path / "scans" / "bad")
    label = _write(_label(_volume()), tmp_path / "label.nii.gz")
    assert main(["import", str(tmp_path / "scans"), "-d", "3", "--label", "a", str(label), "--channels", "CT"]) == 0
    out = capsys.readouterr().out
    assert f"Left out: {tmp_path / 'scans' / 'bad'}" in out
    assert said in out
    assert RawDataset(raw / "Dataset003_Scans").cases == ["a"]


def test_single_slices_and_objects_without_an_image_are_no_scans(tmp_path):
    folder = write_series(_volume(), tmp_path / "scans" / "p1", series="3", modality="MR")
    write_series(_volume()[:, :, :1], folder, series="1", modality="MR")
    (folder / "notes.txt").write_text("nothing")
    scans = {scan.name: scan for scan in find_scans(tmp_path / "scans")}
    assert read_scan(scans["p1_s3"].channels[0]).GetSize() == (12, 10, 6)
    assert scans["p1_s3"].modality == "MR"


def test_nothing_is_written_and_the_sentence_says_what_is_wrong(tmp_path, raw, capsys):
    scans = tmp_path / "scans"
    _write(_volume(), scans / "a.nii.gz")
    label = _write(_label(_volume()), tmp_path / "label.nii.gz")
    other = _write(_label(_volume(size=(20, 10, 6))), tmp_path / "other.nii.gz")
    empty = _write(_label(_volume(), values=()), tmp_path / "empty.nii.gz")
    ct = ["--channels", "CT"]
    for arguments, said in [
        ([str(tmp_path / "none"), "--label", "a", str(label)], "is not a folder"),
        ([str(scans), "--label", "a", str(label)], "--channels"),
        ([str(scans), "--label", "b", str(label), *ct], "there is no such scan"),
        ([str(scans), "--label", "a", str(tmp_path / "x.nii.gz"), *ct], "there is no such file"),
        ([str(scans), "--label", "a", str(empty), *ct], "is empty"),
        ([str(scans), "--label", "a", str(label), "--labels", "liver", *ct], "gives 1 names"),
        ([str(scans), "--label", "a", str(label), "--labels", "x", "x", *ct], "a name of its own"),
        ([str(scans), "--label", "a", str(label), "--channels", "CT", "PET"], "gives 2 names"),
    ]:
        assert main(["import", *arguments, "-d", "4"]) == 1, said
        assert said in capsys.readouterr().err
        assert list(raw.iterdir()) == []
    shifted = _label(_volume())
    shifted.SetOrigin((ORIGIN[0] + 0.4, *ORIGIN[1:]))
    off = _write(shifted, tmp_path / "off.nii.gz")
    assert main(["import", str(scans), "-d", "4", "--label", "a", str(off), *ct]) == 1
    assert "does not lie on the voxels" in capsys.readouterr().err
    assert main(["import", str(scans), "-d", "4", "--label", "a", str(other), *ct]) == 1
    assert "reaches beyond" in capsys.readouterr().err
    (raw / "Dataset004_Other").mkdir()
    assert main(["import", str(scans), "-d", "4", "--label", "a", str(label), *ct]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"training": [], "modality": {"0": "CT"}}, "nnUNetv2_convert_MSD_dataset"),
        ({"file_ending": ".nii.gz"}, "in nnU-Net's format already"),
    ],
)
def test_data_sets_of_other_formats_are_told_how_to_go_on(tmp_path, raw, capsys, content, said):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(content))
    assert main(["import", str(tmp_path / "set"), "-d", "4", "--label", "a", "x"]) == 1
    assert said in capsys.readouterr().err
