"""Label propagation through the command: original grids, regions, several atlases, new images, errors."""

import gzip
import json
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from skimage.io import imread as read_picture
from skimage.io import imsave
from tiny_data import draw_blobs, read_image, write_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.evaluation.metrics import dice
from nnunet_oneshot.evaluation.propagation import poor_by_comparison, probabilities_to_logits

PLANS = "nnUNetOneShotCPUPlans"


def propagate(dataset, out, *arguments, configuration="3d_fullres"):
    options = ["propagate", "-d", str(dataset.id), "-c", configuration, "-p", PLANS, "-o", str(out)]
    return main([*options, *map(str, arguments)])


def mean_dice(prediction, reference):
    return np.mean([dice(prediction == label, reference == label) for label in (1, 2)])


def new_images(folder, count=2, shape=(16, 18, 14), spacing=(1.0, 1.0, 1.0), channels=1, **geometry):
    folder.mkdir()
    random, labels = np.random.default_rng(7), {}
    for number in range(count):
        image, labels[f"new_{number}"] = draw_blobs(shape, random)
        for channel in range(channels):
            write_image(folder / f"new_{number}_{channel:04d}.nii.gz", image, spacing, **geometry)
    return labels


@pytest.mark.parametrize("method", ["registration", "corrected", "affine"])
def test_validation_cases_are_segmented_and_scored(prepared_dataset, tmp_path, method):
    dataset = prepared_dataset()
    assert propagate(dataset, tmp_path / "out", "--method", method) == 0
    splits = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert written == sorted([f"{c}.nii.gz" for c in splits[0]["val"]] + ["propagation.json", "summary.json"])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    case = summary["metric_per_case"][0]
    prediction, reference = (read_image(case[key]) for key in ("prediction_file", "reference_file"))
    assert case["metrics"]["1"]["Dice"] == pytest.approx(dice(prediction == 1, reference == 1))
    assert summary["foreground_mean"]["Dice"] > 0.7


def test_correction_moves_labels_to_the_edges_of_the_image(prepared_dataset, tmp_path, monkeypatch):
    dataset = prepared_dataset()
    found = {}
    for name, method, strength in (("a", "affine", 0), ("b", "corrected", 0), ("c", "corrected", 1)):
        # Where only centres are laid on each other there is room for correction.
        registration = {"affine": False, "refine_iterations": [0]}
        settings = {"registration": registration, "distillation": {"posterior_strength": strength}}
        monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(settings))
        assert propagate(dataset, tmp_path / name, "--method", method) == 0
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())["foreground_mean"]["Dice"]
    assert found["a"] == found["b"]
    assert found["c"] > found["a"] + 0.005


def test_new_images_return_in_their_own_grid(prepared_dataset, tmp_path):
    dataset = prepared_dataset()
    geometry = {"origin": (10.0, -4.0, 7.0), "direction": (-1, 0, 0, 0, 1, 0, 0, 0, 1)}
    labels = new_images(tmp_path / "in", count=1, shape=(20, 18, 12), spacing=(0.8, 1.0, 1.2), **geometry)
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in") == 0
    image = sitk.ReadImage(str(tmp_path / "in" / "new_0_0000.nii.gz"))
    segmentation = sitk.ReadImage(str(tmp_path / "out" / "new_0.nii.gz"))
    assert segmentation.GetSize() == image.GetSize()
    assert segmentation.GetOrigin() == pytest.approx(image.GetOrigin())
    assert segmentation.GetDirection() == pytest.approx(image.GetDirection())
    assert segmentation.GetSpacing() == pytest.approx(image.GetSpacing())
    # Drawn as the training images are, but its header says that the first axis points the other way: what lies left in
    # the array lies right in the scanner's space.
    expected = np.where(labels["new_0"] > 0, 3 - labels["new_0"], 0)
    assert mean_dice(read_image(tmp_path / "out" / "new_0.nii.gz"), expected) > 0.6


def test_image_of_the_atlas_gets_its_labels_back(prepared_dataset, tmp_path):
    dataset = prepared_dataset(labelled=("case_01",), n_cases=3)
    (tmp_path / "in").mkdir()
    shutil.copyfile(dataset.image("case_01"), tmp_path / "in" / "same_0000.nii.gz")
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in") == 0
    assert mean_dice(read_image(tmp_path / "out" / "same.nii.gz"), read_image(dataset.label("case_01"))) > 0.95


def test_unlabelled_validation_cases_are_segmented_without_scores(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset(labelled=("case_00",), n_cases=3)
    assert propagate(dataset, tmp_path / "out") == 0
    assert "nothing to score" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_two_dimensional_configuration_of_volumes(prepared_dataset, tmp_path):
    dataset = prepared_dataset(configuration="2d")
    assert propagate(dataset, tmp_path / "out", configuration="2d") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] > 0.6


def test_two_dimensional_images(prepared_dataset, tmp_path):
    dataset = prepared_dataset(configuration="2d", shape=(32, 30), ending=".png", n_cases=5)
    assert propagate(dataset, tmp_path / "out", configuration="2d") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] > 0.6


def test_regions_are_exported_as_label_values(prepared_dataset, tmp_path):
    labels = {"background": 0, "both": [1, 2], "right": 2}
    dataset = prepared_dataset(labels=labels, regions_class_order=[1, 2])
    assert propagate(dataset, tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mean"]["(1, 2)"]["Dice"] > 0.7


def test_region_logits_are_positive_where_a_region_is_more_likely_than_not():
    manager = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    probabilities = np.array([[0.4, 0.6], [0.35, 0.1], [0.25, 0.3]])[:, :, None, None]
    logits = probabilities_to_logits(probabilities, [0, 1, 2], manager)
    assert logits.shape == (2, 2, 1, 1)
    assert (logits[:, :, 0, 0] > 0).tolist() == [[True, False], [False, False]]
    assert manager.convert_logits_to_segmentation(logits)[:, 0, 0].tolist() == [1, 0]


def test_label_logits_keep_the_likeliest_label():
    manager = LabelManager({"background": 0, "a": 1, "b": 2}, None)
    probabilities = np.array([[0.4, 0.0], [0.35, 0.0], [0.25, 0.0]])[:, :, None, None]
    logits = probabilities_to_logits(probabilities, [0, 1, 2], manager)
    assert manager.convert_logits_to_segmentation(logits)[:, 0, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "no_such_folder"], "holds no images"),
        (["-p", "noPlans"], "has no plans 'noPlans'"),
        (["-c", "3d_none"], "no configuration '3d_none'"),
        (["-d", "902"], "was not found"),
        (["-f", "all"], "no validation cases"),
    ],
)
def test_what_does_not_exist_is_named(prepared_dataset, tmp_path, monkeypatch, capsys, arguments, message):
    dataset = prepared_dataset(n_cases=3)
    monkeypatch.chdir(tmp_path)
    assert propagate(dataset, tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err


def test_wrong_number_of_channels_is_named(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset(n_cases=3)
    new_images(tmp_path / "in", count=1, channels=2)
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in") == 1
    assert "new_0" in capsys.readouterr().err


def _unfinite(path):
    image = read_image(path).astype(np.float32)
    image[2, 2, 2] = np.nan
    write_image(path, image)


def _shortened(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-400]))


FAULTS = {
    "not finite": (_unfinite, ["new_1", "NaN or infinite"]),
    "shorter than its header says": (_shortened, ["new_1", "cannot be read"]),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-300]), ["new_1", "cannot be read"]),
    "empty": (lambda path: path.write_bytes(b""), ["new_1", "cannot be read"]),
    "constant": (lambda path: write_image(path, np.ones((16, 18, 14), np.uint8)), ["new_1", "same value"]),
    "one voxel": (lambda path: write_image(path, np.eye(14, dtype=np.uint8)[:, None]), ["new_1", "one voxel"]),
    "without a channel": (lambda path: path.rename(path.with_name("new_1.nii.gz")), ["new_1.nii.gz", "_0000"]),
    "channel 1 only": (lambda path: path.rename(path.with_name("new_1_0001.nii.gz")), ["new_1", "0001", "0000"]),
    "in metres": (lambda path: write_image(path, read_image(path), [0.001] * 3), ["new_1", "0.001", "in mm"]),
    "in micrometres": (lambda path: write_image(path, read_image(path), [1000] * 3), ["new_1", "1000", "in mm"]),
    "capitals": (lambda path: path.rename(path.with_name("new_1_0000.NII.GZ")), ["new_1_0000.NII.GZ", ".nii.gz"]),
    "a folder's name": (lambda path: path.rename(path.with_name("-x_0000.nii.gz")), ["-x", "Rename it"]),
}


def test_new_images_are_checked_before_the_first_label_is_written(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset(n_cases=3)
    for number, (name, (spoil, mentions)) in enumerate(FAULTS.items()):
        folder = tmp_path / f"in_{number}"
        new_images(folder)
        spoil(folder / "new_1_0000.nii.gz")
        assert propagate(dataset, tmp_path / "out", "-i", folder) == 1, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and all(text in error for text in mentions), (name, error)
        assert not (tmp_path / "out").exists(), name


def test_hidden_files_among_new_images_are_passed_over(prepared_dataset, tmp_path):
    dataset = prepared_dataset(n_cases=3)
    new_images(tmp_path / "in", count=1)
    (tmp_path / "in" / "._new_0_0000.nii.gz").write_bytes(b"x")
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["new_0.nii.gz", "propagation.json"]


def test_colours_in_one_file_are_channels(prepared_dataset, tmp_path):
    dataset = prepared_dataset(configuration="2d", shape=(32, 30), ending=".png", n_cases=3, channels=("R", "G", "B"))
    (tmp_path / "in").mkdir()
    colours = np.stack([read_picture(dataset.image("case_00", channel)) for channel in range(3)], -1)
    imsave(tmp_path / "in" / "new_0000.png", colours, check_contrast=False)
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in", configuration="2d") == 0
    assert mean_dice(read_picture(tmp_path / "out" / "new.png"), read_picture(dataset.label("case_00"))) > 0.6


def test_quality_is_reported_and_doubtful_registrations_are_named(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset(n_cases=3)
    new_images(tmp_path / "in")
    write_image(tmp_path / "in" / "noise_0000.nii.gz", np.random.default_rng(0).normal(size=(16, 18, 14)))
    small = read_image(tmp_path / "in" / "new_0_0000.nii.gz")
    write_image(tmp_path / "in" / "small_0000.nii.gz", small, (0.3, 0.3, 0.3))
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in") == 0
    printed = capsys.readouterr().out
    assert "Warning: Case small" in printed and "Warning: Case new_0" not in printed
    assert "Warning: noise: the registration of case_" in printed and "Warning: new_0: the reg" not in printed
    assert "new_0: labels written; squared local correlation 0." in printed
    report = json.loads((tmp_path / "out" / "propagation.json").read_text())
    assert sorted(report["quality"]) == ["new_0", "new_1", "noise", "small"]
    (atlas,) = report["atlases"]
    good = report["quality"]["new_0"][atlas]
    assert good["similarity_before"] < good["similarity_after"] <= 1
    assert good["similarity_at_labels"] > report["quality"]["noise"][atlas]["similarity_at_labels"]


def test_poor_registrations_are_told_by_comparison():
    qualities = [{"similarity_after": value} for value in (0.5, 0.52, 0.48, 0.1)]
    assert poor_by_comparison(["a"] * 4, qualities) == [False, False, False, True]
    assert not any(poor_by_comparison(["a", "a", "a", "b"], qualities))
    assert poor_by_comparison([], []) == []


def _relabel(dataset, change):
    for path in sorted((dataset.preprocessed / "gt_segmentations").iterdir()):
        write_image(path, change(read_image(path).astype(np.float32)))


def test_references_that_are_nearly_whole_numbers_are_scored_as_such(prepared_dataset, tmp_path):
    dataset = prepared_dataset()
    assert propagate(dataset, tmp_path / "a") == 0
    _relabel(dataset, lambda label: label * np.float32(0.9999))
    assert propagate(dataset, tmp_path / "b") == 0
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert first["foreground_mean"] == second["foreground_mean"]
    assert second["metric_per_case"][0]["reference_file"].startswith(str(dataset.preprocessed))


def test_references_with_undeclared_values_are_named_before_anything_is_written(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset()
    _relabel(dataset, lambda label: label * 7)
    assert propagate(dataset, tmp_path / "out") == 1
    assert "holds values [7, 14] that dataset.json does not declare" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_segmentations_lie_where_the_image_lies_for_nibabel_too(prepared_dataset, tmp_path):
    dataset = prepared_dataset(n_cases=3)
    new_images(tmp_path / "in", count=1)
    path = tmp_path / "in" / "new_0_0000.nii.gz"
    image = nibabel.load(path)
    # Two places, of which SimpleITK takes one and nibabel the other.
    image.header.set_sform(np.diag([1.0, 1, 1, 1]), code=3)
    image.header.set_qform(np.array([[-1.0, 0, 0, 4], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), code=1)
    nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header).to_filename(path)
    assert propagate(dataset, tmp_path / "out", "-i", tmp_path / "in") == 0
    written = tmp_path / "out" / "new_0.nii.gz"
    assert np.allclose(nibabel.load(written).affine, nibabel.load(path).affine)
    places = [sitk.ReadImage(str(one)) for one in (path, written)]
    assert places[0].GetOrigin() == pytest.approx(places[1].GetOrigin())
    assert places[0].GetDirection() == pytest.approx(places[1].GetDirection())


def test_missing_ants_is_explained(prepared_dataset, tmp_path, monkeypatch, capsys):
    dataset = prepared_dataset(n_cases=3)
    monkeypatch.setitem(__import__("sys").modules, "ants", None)
    assert propagate(dataset, tmp_path / "out", "--method", "syn") == 1
    assert "nnunet_oneshot[ants]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "package"), [("syn", "ants"), ("greedy", "picsl_greedy"), ("convexadam", "convexAdam")]
)
def test_a_peer_segments_a_case(method, package, prepared_dataset, tmp_path):
    pytest.importorskip(package)
    dataset = prepared_dataset(n_cases=5, shape=(24, 26, 22))
    assert propagate(dataset, tmp_path / "out", "--method", method) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["foreground_mean"]["Dice"] > 0.5
