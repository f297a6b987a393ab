"""`nnunet_oneshot statistics`: volumes, borders and means by closed form."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.cli import main

DESCRIPTION = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "absent": 3},
    "regions_class_order": [1, 2, 3],
    "file_ending": ".nii.gz",
}


def _write(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 1.0, 4.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def folders(tmp_path):
    segmentation = np.zeros((5, 6, 7), np.uint8)
    segmentation[0:2, 1:3, 1:3] = 1
    segmentation[2, 2, 2:4] = 2
    _write(segmentation, tmp_path / "predicted" / "a.nii.gz")
    (tmp_path / "predicted" / "dataset.json").write_text(json.dumps(DESCRIPTION))
    for channel in range(2):
        _write((segmentation * 10 + channel).astype(np.float32), tmp_path / "images" / f"a_{channel:04d}.nii.gz")
    return tmp_path / "predicted", tmp_path / "images"


def _rows(path):
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_volumes_regions_borders_and_means(folders):
    predicted, images = folders
    assert main(["statistics", "-i", str(predicted), "--images", str(images), "-np", "1"]) == 0
    whole, core, absent = _rows(predicted / "statistics.csv")
    assert whole == {
        "case": "a",
        "label": "whole",
        "voxels": "10",
        "volume_ml": "0.02",
        "touches_border": "yes",
        "mean_CT": "12",
        "mean_PET": "13",
    }
    assert (core["label"], core["voxels"], core["touches_border"], core["mean_CT"]) == ("core", "2", "no", "20")
    assert (absent["voxels"], absent["volume_ml"], absent["mean_CT"]) == ("0", "0", "")


def test_without_images_there_are_no_means_and_labels_of_a_data_set_are_taken(folders, tmp_path):
    predicted, _ = folders
    labels = predicted.rename(tmp_path / "labelsTr")
    (labels / "dataset.json").rename(tmp_path / "dataset.json")
    assert main(["statistics", "-i", str(labels), "-o", str(tmp_path / "table.csv"), "-np", "1"]) == 0
    assert list(_rows(tmp_path / "table.csv")[0]) == ["case", "label", "voxels", "volume_ml", "touches_border"]


def test_what_does_not_fit_is_a_sentence_and_writes_nothing(folders, tmp_path, capsys):
    predicted, images = folders
    (images / "a_0001.nii.gz").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "dataset.json").write_text(json.dumps(DESCRIPTION))
    for arguments, said in [
        (["-i", str(tmp_path / "none")], "is not a folder"),
        (["-i", str(tmp_path / "empty")], "holds no segmentation"),
        (["-i", str(images)], "hold no dataset.json"),
        (["-i", str(predicted), "--images", str(images)], "holds no image of a with the channels"),
    ]:
        assert main(["statistics", *arguments, "-np", "1"]) == 1
        assert said in capsys.readouterr().err
    _write(np.zeros((4, 4, 4), np.float32), images / "a_0000.nii.gz")
    _write(np.zeros((4, 4, 4), np.float32), images / "a_0001.nii.gz")
    assert main(["statistics", "-i", str(predicted), "--images", str(images), "-np", "1"]) == 1
    assert "has the shape (5, 6, 7)" in capsys.readouterr().err
    assert not (predicted / "statistics.csv").exists()
