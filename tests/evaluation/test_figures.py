"""Figures are written whole, and outlines follow the labels."""

import numpy as np
import pytest

from nnunet_oneshot.evaluation import figures
from nnunet_oneshot.evaluation.figures import Example, box_plot_per_label, draw_contours, example_figure


def segmentation():
    volume = np.zeros((5, 8, 9), dtype=np.uint8)
    volume[1:4, 2:5, 3:7] = 1
    volume[3, 6:8, 0:2] = 2
    return volume


def test_slice_with_the_most_labels_is_shown():
    assert figures._slice_with_most_labels(segmentation()) == 3
    assert figures._slice_with_most_labels(np.zeros((5, 4, 4))) == 2


def test_outline_lies_half_a_voxel_around_the_label():
    figure, axis = figures.plt.subplots()
    draw_contours(axis, segmentation()[2], {1: "a"})
    (collection,) = axis.collections
    corners = np.concatenate([path.vertices for path in collection.get_paths()])
    assert corners.min(axis=0) == pytest.approx([2.5, 1.5])
    assert corners.max(axis=0) == pytest.approx([6.5, 4.5])
    assert axis.get_xlim() == (-0.5, 8.5) and axis.get_ylim() == (7.5, -0.5)
    figures.plt.close(figure)


def test_examples_with_absent_labels_are_drawn(tmp_path):
    empty = np.zeros((5, 8, 9), dtype=np.uint8)
    examples = [
        Example("first", np.random.default_rng(0).random((5, 8, 9)), (3, 1, 1), {"reference": segmentation()}),
        Example("second", np.zeros((5, 8, 9)), (3, 1, 1), {"reference": empty}),
    ]
    example_figure(tmp_path / "deep" / "examples.png", examples, label_names={1: "a", 2: "b"})
    assert figures.plt.imread(tmp_path / "deep" / "examples.png").ndim == 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["examples.png"]


def test_method_without_scores_leaves_its_place_empty(tmp_path):
    scores = {"a": {"one": [0.5, np.nan], "two": []}, "b": {"two": [0.0]}}
    box_plot_per_label(tmp_path / "box.png", scores)
    assert (tmp_path / "box.png").stat().st_size > 1000
