"""Metrics agree with scipy and SimpleITK, and empty labels count as the module states."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.metrics import dice, score_label, score_segmentation

SHAPE = (12, 10, 9)


def box(*slices, shape=SHAPE):
    mask = np.zeros(shape, dtype=bool)
    mask[slices] = True
    return mask


def independent_surface_scores(prediction, reference, spacing, tolerance):
    """HD95 and NSD from all pairwise distances between border voxels."""
    padded = [np.pad(mask, 1) for mask in (prediction, reference)]
    borders = [np.argwhere(mask & ~binary_erosion(mask)) for mask in padded]
    distances = cdist(*[b * np.asarray(spacing) for b in borders])
    forth, back = distances.min(axis=1), distances.min(axis=0)
    hd95 = max(np.percentile(forth, 95), np.percentile(back, 95))
    nsd = ((forth <= tolerance).sum() + (back <= tolerance).sum()) / (len(forth) + len(back))
    return hd95, nsd


def random_blob(seed):
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij"), axis=-1)
    return ((grid - generator.uniform(3, 7, 3)) ** 2 / generator.uniform(4, 20, 3)).sum(-1) < 1


CASES = {
    "single voxels": (box(3, 4, 5), box(6, 4, 5)),
    "single voxel against a box": (box(3, 4, 5), box(slice(2, 8), slice(2, 8), slice(2, 8))),
    "touching the border": (box(slice(0, 4), slice(0, 10), slice(0, 3)), box(slice(0, 6), slice(0, 10), slice(0, 2))),
    "whole volume": (box(slice(None)), box(slice(0, 11))),
    "equal": (box(slice(2, 5), slice(2, 5), slice(2, 5)),) * 2,
    "disjoint": (box(slice(0, 2), slice(0, 2), slice(0, 2)), box(slice(9, 12), slice(7, 10), slice(6, 9))),
    "blobs": (random_blob(0), random_blob(1)),
    "blobs again": (random_blob(2), random_blob(3)),
}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 0.7)])
@pytest.mark.parametrize("name", CASES)
def test_surface_scores_agree_with_pairwise_distances(name, spacing):
    prediction, reference = CASES[name]
    scores = score_label(prediction, reference, spacing=spacing, tolerance=2.0)
    hd95, nsd = independent_surface_scores(prediction, reference, spacing, 2.0)
    assert scores.hd95 == pytest.approx(hd95, abs=1e-4)
    assert scores.nsd == pytest.approx(nsd, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_dice_agrees_with_simpleitk(name):
    images = [sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in CASES[name]]
    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(*images)
    assert dice(*CASES[name]) == pytest.approx(measure.GetDiceCoefficient(1))


def test_both_empty_is_left_out():
    scores = score_label(np.zeros(SHAPE), np.zeros(SHAPE), spacing=(1, 1, 1))
    assert math.isnan(scores.dice) and math.isnan(scores.hd95) and math.isnan(scores.nsd)


@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_counts_with_the_worst_value(missed):
    full, empty = box(slice(2, 5), slice(2, 5), slice(2, 5)), np.zeros(SHAPE, dtype=bool)
    pair = (empty, full) if missed else (full, empty)
    scores = score_label(*pair, spacing=(2.0, 1.0, 1.0))
    assert scores.dice == 0 and scores.nsd == 0
    assert scores.hd95 == pytest.approx(math.sqrt(24**2 + 10**2 + 9**2))


def test_image_with_one_slice_is_scored_in_2d():
    prediction, reference = random_blob(0)[4], random_blob(1)[4]
    flat = score_label(prediction, reference, spacing=(0.8, 0.8))
    stored = score_label(prediction[None], reference[None], spacing=(5.0, 0.8, 0.8))
    assert flat == stored


def test_regions_and_ignored_voxels():
    reference = np.zeros(SHAPE, dtype=np.uint8)
    reference[2:5], reference[5:7], reference[9:] = 1, 2, 3
    prediction = reference.copy()
    prediction[9:] = 1
    labels = {"whole": (1, 2), "inner": 2}
    kept = score_segmentation(prediction, reference, labels=labels, spacing=(1, 1, 1), ignore_label=3)
    assert kept["whole"].dice == kept["inner"].dice == 1
    counted = score_segmentation(prediction, reference, labels=labels, spacing=(1, 1, 1))
    assert counted["whole"].dice == pytest.approx(2 * 5 / (5 + 8))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="must agree"):
        score_label(np.zeros((3, 3)), np.zeros((3, 4)), spacing=(1, 1))


def test_references_that_are_nearly_whole_numbers_count_as_such():
    reference = np.where(box(slice(2, 8)), np.float32(0.9999), np.float32(0))
    scores = score_segmentation(box(slice(2, 8)).astype(np.uint8), reference, labels={"a": 1}, spacing=(1, 1, 1))
    assert scores["a"].dice == 1


def test_references_that_are_no_whole_numbers_are_named_instead_of_scored():
    reference = np.where(box(slice(2, 8)), np.float32(0.7), np.float32(0))
    with pytest.raises(OneShotError, match="0.7, which are no whole numbers"):
        score_segmentation(box(slice(2, 8)).astype(np.uint8), reference, labels={"a": 1}, spacing=(1, 1, 1))
