"""`nnunet_oneshot to-dicom`: segments lie over their series, under their names."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_dicom import write_series

from nnunet_oneshot.cli import main

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")


@pytest.fixture
def case(tmp_path):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 100, (6, 10, 12)).astype(np.int16))
    image.SetSpacing((0.8, 0.9, 2.5))
    image.SetOrigin((3.0, -4.0, 5.0))
    write_series(image, tmp_path / "scans" / "p1")
    array = np.zeros((6, 10, 12), np.uint8)
    array[1:4, 2:5, 3:9], array[4, 2:5, 3:9] = 1, 3
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2, "cyst": 3}}
    (predicted / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz"}))
    segmentation = sitk.GetImageFromArray(array)
    segmentation.CopyInformation(image)
    sitk.WriteImage(segmentation, str(predicted / "p1.nii.gz"))
    return predicted, tmp_path / "scans", array


def test_segments_lie_where_they_were_predicted_and_refer_to_their_series(case, tmp_path):
    predicted, scans, array = case
    assert main(["to-dicom", "-i", str(predicted), "--scans", str(scans), "-o", str(tmp_path / "out")]) == 0
    written = highdicom.seg.segread(tmp_path / "out" / "p1.dcm")
    labels = [written.get_segment_description(number).segment_label for number in written.segment_numbers]
    assert labels == ["liver", "cyst"]
    source = pydicom.dcmread(next((scans / "p1").iterdir()))
    assert (written.PatientID, written.FrameOfReferenceUID) == (source.PatientID, source.FrameOfReferenceUID)
    volume = written.get_volume(combine_segments=True).to_patient_orientation("HPL")
    found = np.argwhere(volume.array == 1)
    places = np.round(volume.map_indices_to_reference(found), 3)
    expected = [[3 + 0.8 * x, -4 + 0.9 * y, 5 + 2.5 * z] for z, y, x in np.argwhere(array == 1)]
    assert np.allclose(np.sort(places, axis=0), np.sort(expected, axis=0))


def test_cases_without_a_series_and_other_grids_are_sentences(case, tmp_path, capsys):
    predicted, scans, _ = case
    arguments = ["to-dicom", "-i", str(predicted), "-o", str(tmp_path / "out"), "--scans"]
    write_series(sitk.GetImageFromArray(np.ones((3, 4, 4), np.int16)), tmp_path / "others" / "p2")
    assert main([*arguments, str(tmp_path / "others")]) == 1
    assert "without a DICOM series" in capsys.readouterr().err
    write_series(sitk.GetImageFromArray(np.ones((3, 4, 4), np.int16)), tmp_path / "others" / "p1")
    assert main([*arguments, str(tmp_path / "others")]) == 1
    assert "p1.nii.gz" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*"))
