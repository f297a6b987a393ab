"""The generated phantoms are a valid raw nnU-Net dataset with one label, reproducible and varied."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.demo.phantoms import LABELS, SPACING, make_phantom, write_phantom_dataset
from nnunet_oneshot.errors import OneShotError


def test_every_structure_is_present():
    for seed in range(6):
        image, label, origin = make_phantom(np.random.default_rng(seed))
        assert image.shape == label.shape and image.dtype == np.int16 and label.dtype == np.uint8
        assert origin.shape == (3,)
        for value in LABELS.values():
            assert (label == value).sum() > 80


def test_left_and_right_lobes_lie_on_their_sides():
    _, label, _ = make_phantom(np.random.default_rng(0))
    left = np.argwhere(label == LABELS["left_lobe"])[:, 0]
    right = np.argwhere(label == LABELS["right_lobe"])[:, 0]
    assert left.max() < right.min()


def test_cases_differ_in_shape_and_contrast():
    images, labels, _ = zip(*[make_phantom(np.random.default_rng(seed)) for seed in range(5)], strict=True)
    assert len({image.shape for image in images}) > 1
    volumes = np.array([(label == LABELS["core"]).sum() for label in labels])
    assert volumes.std() / volumes.mean() > 0.05


def test_dataset_has_one_training_label_and_all_test_labels(tmp_path):
    folder = tmp_path / "Dataset999_Phantoms"
    write_phantom_dataset(folder, training_cases=3, test_cases=2, seed=1)
    assert len(list((folder / "imagesTr").iterdir())) == 3
    assert [p.name for p in (folder / "labelsTr").iterdir()] == ["phantom_000.nii.gz"]
    assert len(list((folder / "imagesTs").iterdir())) == len(list((folder / "labelsTs").iterdir())) == 2
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["numTraining"] == 3 and dataset["labels"] == LABELS
    image = sitk.ReadImage(str(folder / "imagesTr" / "phantom_000_0000.nii.gz"))
    label = sitk.ReadImage(str(folder / "labelsTr" / "phantom_000.nii.gz"))
    assert image.GetSize() == label.GetSize() and image.GetOrigin() == label.GetOrigin()
    assert image.GetSpacing() == pytest.approx([SPACING] * 3)


def test_same_seed_gives_the_same_images(tmp_path):
    for name in ("a", "b"):
        write_phantom_dataset(tmp_path / name, training_cases=1, test_cases=0, seed=7)
    first, second = (sitk.ReadImage(str(tmp_path / n / "imagesTr" / "phantom_000_0000.nii.gz")) for n in "ab")
    assert np.array_equal(sitk.GetArrayFromImage(first), sitk.GetArrayFromImage(second))


def test_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(OneShotError, match="not empty"):
        write_phantom_dataset(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
