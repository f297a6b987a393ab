"""One scale for the intensities of every image."""

import numpy as np
import pytest
from tiny_volumes import blobs

from nnunet_oneshot.intensities import standardised

IMAGE = blobs((20, 22, 18))


def test_mean_and_deviation_are_those_of_a_z_score():
    found = standardised(np.concatenate([IMAGE, 3 * IMAGE + 1]))
    assert found.dtype == np.float32
    assert found.mean(axis=(1, 2, 3)) == pytest.approx([0, 0], abs=1e-5)
    assert found.std(axis=(1, 2, 3)) == pytest.approx([1, 1], abs=1e-5)
    assert found[0] == pytest.approx((IMAGE[0] - IMAGE.mean()) / IMAGE.std(), abs=1e-4)


@pytest.mark.parametrize("factor", [1e-11, 1e-9, 1.0, 1e9, 1e25, -1.0])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_affine_changes_leave_it_as_it_is(factor, offset):
    changed = ((IMAGE.astype(np.float64) + offset) * factor).astype(np.float32)
    assert standardised(changed) * np.sign(factor) == pytest.approx(standardised(IMAGE), abs=1e-3)


@pytest.mark.parametrize("value", [1e4, -1e6, 3e38, -3.4e38])
def test_a_hot_voxel_changes_next_to_nothing(value):
    hot = IMAGE.copy()
    hot[0, 9, 9, 9] = value
    difference = np.abs(standardised(hot) - standardised(IMAGE))
    difference[0, 9, 9, 9] = 0
    assert difference.max() < 0.02


@pytest.mark.parametrize("value", [-3024.0, -1e6, -3.4e38])
def test_padding_becomes_the_darkest_of_the_subject(value):
    ct = 500 * IMAGE - 900
    padded = np.full((1, 30, 32, 28), value, np.float32)
    padded[:, 5:25, 5:27, 5:23] = ct
    found = standardised(padded)
    inner = found[:, 5:25, 5:27, 5:23]
    assert np.corrcoef(inner.ravel(), ct.ravel())[0, 1] == pytest.approx(1, abs=1e-3)
    assert found.min() == pytest.approx(inner.min(), abs=0.3)
    assert inner.std() > 0.5


def test_a_dark_background_within_the_range_stays():
    image = np.zeros((1, 30, 32, 28), np.float32)
    image[:, 5:25, 5:27, 5:23] = 40 + 20 * IMAGE
    assert standardised(image) == pytest.approx((image - image.mean()) / image.std(), abs=1e-4)


def test_an_image_of_one_value_is_zero():
    assert not standardised(np.full((1, 4, 5, 6), 7.0)).any()
    assert not standardised(np.zeros((1, 4, 5, 6))).any()
