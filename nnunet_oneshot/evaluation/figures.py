"""Pictures of evaluations: segmentations as contours, one box plot a label, the gap closed to the ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nnunet_oneshot.io import atomic_path

# Names come from files: a dollar sign in one begins no formula. As a decorator, for all that a function draws.
plain_text = matplotlib.rc_context({"text.parse_math": False})


@dataclass(frozen=True)
class Example:
    """One row of `example_figure`.

    Attributes:
        title: Shown at the left.
        image: (Z, Y, X), as nnU-Net's readers give it.
        spacing: (3,) mm, in the same axis order.
        segmentations: Panel title to label map (Z, Y, X); the first one decides which slice is shown.
    """

    title: str
    image: np.ndarray
    spacing: Sequence[float]
    segmentations: Mapping[str, np.ndarray]


@plain_text
def example_figure(path: str | Path, examples: Sequence[Example], *, label_names: Mapping[int, str]) -> None:
    """Writes a PNG with a row for each example: the image, then the image under the contours of each segmentation.

    Args:
        path: Written under another name and then moved into place.
        examples: All with the same number of segmentations.
        label_names: Label values that are outlined, with their names.
    """
    columns = 1 + max(len(e.segmentations) for e in examples)
    figure, axes = plt.subplots(
        len(examples), columns, figsize=(2.7 * columns, 2.8 * len(examples) + 0.5), squeeze=False
    )
    for row, example in zip(axes, examples, strict=True):
        index = _slice_with_most_labels(next(iter(example.segmentations.values())))
        aspect = example.spacing[1] / example.spacing[2]
        picture = example.image[index]
        low, high = np.percentile(picture, (1, 99.5))
        for axis in row:
            axis.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(example.title, fontsize=8)
        row[0].set_title("image", fontsize=8)
        for axis, (title, segmentation) in zip(row[1:], example.segmentations.items(), strict=False):
            axis.set_title(title, fontsize=8)
            draw_contours(axis, segmentation[index], label_names)
    handles = [
        Line2D([], [], color=label_colour(i), label=_listed(name)) for i, name in enumerate(label_names.values())
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    save_figure(figure, path)


def draw_contours(axis: Axes, segmentation: np.ndarray, labels: Mapping[int, str] | Sequence[int]) -> None:
    """Outlines every label of a 2D label map; the order of ``labels`` gives the colours."""
    for number, label in enumerate(labels):
        mask = segmentation == label
        if mask.any():
            framed = np.pad(mask, 1)
            height, width = framed.shape
            places = (np.arange(width) - 1, np.arange(height) - 1)
            axis.contour(*places, framed, levels=[0.5], colors=[label_colour(number)], linewidths=1.2)
    # The frame that closes outlines at the border would widen the picture.
    axis.set_xlim(-0.5, segmentation.shape[1] - 0.5)
    axis.set_ylim(segmentation.shape[0] - 0.5, -0.5)


def label_colour(number: int) -> tuple[float, float, float, float]:
    """The colour of the label with this place in the list of labels."""
    return plt.get_cmap("tab10" if number < 10 else "tab20")(number % 20)


@plain_text
def box_plot_per_label(
    path: str | Path, scores: Mapping[str, Mapping[str, Sequence[float]]], *, quantity: str = "Dice"
) -> None:
    """Writes a PNG with one panel a label, in which every method has a box and its cases as points.

    Args:
        path: PNG file.
        scores: Label name to method to values; NaN is left out.
        quantity: Name of the vertical axis.
    """
    columns = min(4, len(scores))
    rows = -(-len(scores) // columns)
    methods = list(dict.fromkeys(m for per_method in scores.values() for m in per_method))
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(3.0, 0.55 * len(methods) + 1) * columns, 3.4 * rows), squeeze=False
    )
    generator = np.random.default_rng(0)
    for axis, (label, per_method) in zip(axes.flat, scores.items(), strict=False):
        for place, method in enumerate(methods):
            values = np.asarray(per_method.get(method, ()), dtype=float)
            values = values[np.isfinite(values)]
            if values.size == 0:
                continue
            axis.boxplot(values, positions=[place], widths=0.6, showfliers=False, medianprops={"color": "black"})
            spread = generator.uniform(-0.15, 0.15, size=values.size)
            axis.plot(place + spread, values, ".", color=label_colour(place), markersize=4, alpha=0.7)
        axis.set_xticks(range(len(methods)), methods, rotation=45, ha="right", fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_ylabel(quantity)
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.flat)[len(scores) :]:
        axis.set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)


@plain_text
def bar_figure(
    path: str | Path,
    values: Mapping[str, float],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    quantity: str,
) -> None:
    """Writes a PNG with one horizontal bar a method and, where given, its interval."""
    figure, axis = plt.subplots(figsize=(6.5, 0.45 * len(values) + 1.2))
    names = list(values)
    axis.barh(range(len(names)), [values[n] for n in names], color=[label_colour(i) for i in range(len(names))])
    for place, name in enumerate(names):
        if intervals and name in intervals:
            low, high = intervals[name]
            axis.plot([low, high], [place, place], color="black", linewidth=1.5)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(quantity)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


@plain_text
def line_figure(
    path: str | Path,
    series: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    horizontal: str,
    vertical: str,
) -> None:
    """Writes a PNG with one line a series through the means at each place; single values are shown as points."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for number, (name, points) in enumerate(series.items()):
        places = sorted(points)
        colour = label_colour(number)
        axis.plot(places, [np.mean(points[p]) for p in places], "-", color=colour, label=_listed(name))
        for place in places:
            axis.plot([place] * len(points[place]), points[place], ".", color=colour)
    axis.set_xlabel(horizontal)
    axis.set_ylabel(vertical)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    save_figure(figure, path)


def _listed(name: str) -> str:
    """A name as a legend lists it: matplotlib leaves out those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def save_figure(figure: plt.Figure, path: str | Path) -> None:
    """Writes a figure as PNG, whole or not at all, and closes it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def _slice_with_most_labels(segmentation: np.ndarray) -> int:
    """The slice along the first axis that shows the most labels; the largest area decides between equals."""
    labels = [label for label in np.unique(segmentation) if label != 0]
    areas = np.stack([(segmentation == label).sum(axis=(1, 2)) for label in labels]) if labels else None
    if areas is None:
        return segmentation.shape[0] // 2
    shown = (areas > 0).sum(axis=0)
    return int(np.lexsort((areas.sum(axis=0), shown))[-1])
