"""Figures are written whole, and outlines follow the labels."""

import numpy as np
import pytest
from matplotlib.text import Text

from nnunet_oneshot.evaluation import figures
from nnunet_oneshot.evaluation.figures import (
    Example,
    bar_figure,
    box_plot_per_label,
    draw_contours,
    example_figure,
    line_figure,
)


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


@pytest.mark.parametrize("name", ["a$x_1$", r"$\frac{", "_hidden", "<script>alert(1)</script>", "$", "^{", "a\nb"])
def test_names_from_files_are_drawn_as_they_are(tmp_path, monkeypatch, name):
    shown = []

    def save_figure(figure, path):
        figure.canvas.draw()
        shown.extend(text for text in figure.findobj(Text) if text.get_text().strip() == name)
        figures.plt.close(figure)

    monkeypatch.setattr(figures, "save_figure", save_figure)
    example = Example(name, np.random.default_rng(0).random((5, 8, 9)), (3, 1, 1), {name: segmentation()})
    example_figure(tmp_path / "a.png", [example], label_names={1: name})
    assert len(shown) == 3
    box_plot_per_label(tmp_path / "b.png", {name: {name: [0.5, 0.6]}})
    bar_figure(tmp_path / "c.png", {name: 0.5}, quantity=name)
    line_figure(tmp_path / "d.png", {name: {1.0: [0.5], 2.0: [0.7]}}, horizontal=name, vertical=name)
    # The labels of ticks exist on both sides.
    assert len(shown) >= 3 + 2 + 2 + 3
    assert not any(text.get_parse_math() for text in shown)
