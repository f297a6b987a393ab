"""Rows of structures that look alike."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_oneshot.data.fingerprint import _is_fingerprint
from nnunet_oneshot.data.lookalikes import longest_row


def spine(number, *, seed=0):
    """A column of equal blocks on a background that repeats with them, 1 x 12 x 12 x 12 number."""
    generator = np.random.default_rng(seed)
    one = generator.normal(size=(12, 12, 12))
    image = np.tile(one, (1, 1, number))[None] + 0.1 * generator.normal(size=(1, 12, 12, 12 * number))
    segmentation = np.zeros(image.shape[1:], np.int16)
    for index in range(number):
        segmentation[3:9, 3:9, 12 * index + 3 : 12 * index + 9] = index + 1
    return image, segmentation


def test_blocks_with_the_same_surroundings_are_a_row():
    image, segmentation = spine(5)
    row = longest_row(image, segmentation, (1.0, 2.0, 0.5))
    assert row.labels == (1, 2, 3, 4, 5)
    assert row.extent == pytest.approx((6.0, 12.0, (4 * 12 + 6) * 0.5))


def test_two_are_no_row_since_their_sides_differ():
    assert longest_row(*spine(2), (1, 1, 1)) is None


def test_blocks_in_surroundings_of_their_own_are_no_row():
    image, segmentation = spine(5)
    assert longest_row(np.random.default_rng(1).normal(size=image.shape), segmentation, (1, 1, 1)) is None


def test_structures_of_other_shapes_or_sizes_are_no_row():
    image, segmentation = spine(3)
    segmentation[:, :, 12:24][segmentation[:, :, 12:24] > 0] = 0
    segmentation[5:7, 5:7, 12:24] = 2
    assert longest_row(image, segmentation, (1, 1, 1)) is None


def test_ignored_and_missing_labels_and_constant_images_are_borne():
    image, segmentation = spine(3)
    segmentation[segmentation == 2] = -1
    assert longest_row(image, segmentation, (1, 1, 1)) is None
    assert longest_row(np.zeros_like(image), spine(3)[1], (1, 1, 1)) is None
    assert longest_row(image, np.zeros_like(segmentation), (1, 1, 1)) is None


@pytest.mark.parametrize(
    ("row", "fits"),
    [
        ({"labels": [1, 2, 3], "extent": [1.0, 2, 3]}, True),
        ({"labels": 3, "extent": [1.0, 2, 3]}, False),
        ({"extent": [1.0, 2, 3]}, False),
        ({"labels": ["1"], "extent": [1.0, 2, 3]}, False),
        ({"labels": [1, 2, 3], "extent": [1.0, 2]}, False),
        ({"labels": [1, 2, 3], "extent": ["a", 2, 3]}, False),
        ([1], False),
        (None, False),
    ],
)
def test_a_fingerprint_whose_row_has_another_shape_is_none(row, fits):
    content = {
        "oneshot": {"atlases": ["a"], "cases": ["a"], "row": row},
        "spacings": [[1, 1, 1]],
        "shapes_after_crop": [[5, 5, 5]],
        "foreground_intensity_properties_per_channel": {},
        "median_relative_size_after_cropping": 1.0,
    }
    assert _is_fingerprint(content) == fits
