"""The generated abdomens are a valid raw nnU-Net dataset in which organs move independently of each other."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import center_of_mass

from nnunet_oneshot.benchmarks.abdomens import LABELS, SHAPE, SPACING, make_abdomen, write_abdomen_dataset
from nnunet_oneshot.errors import OneShotError


def test_every_organ_is_present_and_brighter_than_fat():
    for seed in range(2):
        image, label = make_abdomen(np.random.default_rng(seed))
        assert image.shape == label.shape == SHAPE and image.dtype == np.int16 and label.dtype == np.uint8
        assert all(image[label == value].mean() > -60 for value in LABELS.values() if value)


def test_organs_move_apart():
    middles = []
    for seed in range(4):
        _, label = make_abdomen(np.random.default_rng(seed))
        places = [center_of_mass(label == LABELS[name]) for name in ("left_kidney", "right_kidney", "spleen")]
        middles.append(np.array(places) * SPACING)
    middles = np.array(middles)
    between = middles - middles.mean(axis=1, keepdims=True)
    assert between.std(axis=0).mean() > 5


def test_the_dataset_is_reproducible_and_overwrites_nothing(tmp_path):
    first, second = tmp_path / "a" / "Dataset998_Abdomens", tmp_path / "b" / "Dataset998_Abdomens"
    for folder in (first, second):
        write_abdomen_dataset(folder, cases=2, seed=3)
    description = json.loads((first / "dataset.json").read_text())
    assert description["numTraining"] == 2 and description["labels"] == LABELS
    for name in ("imagesTr/abdomen_001_0000.nii.gz", "labelsTr/abdomen_001.nii.gz"):
        images = [sitk.ReadImage(str(folder / name)) for folder in (first, second)]
        assert images[0].GetSize() == SHAPE and images[0].GetSpacing() == SPACING
        assert np.array_equal(*map(sitk.GetArrayFromImage, images))
    with pytest.raises(OneShotError, match="not empty"):
        write_abdomen_dataset(first)
