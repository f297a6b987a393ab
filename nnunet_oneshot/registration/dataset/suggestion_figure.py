"""The picture of a ranking: central slices of its first and its last cases."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Protocol

import numpy as np

from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.data.verify import read_image


class Ranked(Protocol):
    """A case in a ranking."""

    @property
    def case(self) -> str:
        """Its name."""

    @property
    def caption(self) -> str:
        """What stands above its picture."""


def contact_sheet(
    path: str | PathLike, raw: RawDataset, groups: tuple[Sequence[Ranked], Sequence[Ranked]], *, title: str
) -> None:
    """Writes a PNG with the first cases above the last, each shown by two central slices (2D: the image).

    Args:
        path: Where to write.
        raw: The images.
        groups: First and last cases, in equal numbers.
        title: Of the whole picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [[_cuts(raw, ranked.case) for ranked in group] for group in groups]
    cuts = len(panels[0][0])
    figure = Figure(figsize=(2.4 * len(groups[0]), 2.3 * cuts * len(groups) + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(cuts * len(groups), len(groups[0]), squeeze=False)
    for row, (group, drawn) in enumerate(zip(groups, panels, strict=True)):
        for column, (ranked, slices) in enumerate(zip(group, drawn, strict=True)):
            for index, (cut, aspect) in enumerate(slices):
                axis = axes[row * cuts + index, column]
                axis.imshow(cut, cmap="gray", aspect=aspect, vmin=np.percentile(cut, 1), vmax=np.percentile(cut, 99))
                axis.set_axis_off()
            axes[row * cuts, column].set_title(ranked.caption, fontsize=8, parse_math=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, format="png", dpi=110)


def _cuts(raw: RawDataset, case: str) -> list[tuple[np.ndarray, float]]:
    """Central slices across the first two axes of the first channel, with the height of a pixel over its width."""
    image = read_image(case, raw.images(case), raw.reader_class, raw.channel_names)
    volume, spacing = image.data[0], [float(edge) for edge in image.properties["spacing"]]
    axes = [0] if volume.shape[0] == 1 else [0, 1]
    cuts = []
    for axis in axes:
        cut = np.take(volume, volume.shape[axis] // 2, axis)
        height, width = (edge for other, edge in enumerate(spacing) if other != axis)
        # In most readers' axis order, slices across axes other than the first are upside down.
        cuts.append((cut if axis == 0 else cut[::-1], height / width))
    return cuts
