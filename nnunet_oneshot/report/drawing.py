"""Small pictures for a page: grey cuts, outlines of labels as paths, thumbnails, curves."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import product
from math import isfinite

import numpy as np

# Okabe and Ito, Color Universal Design, 2008: told apart by colour-blind people, too.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
# Labels beyond the colours differ by the line.
DASHES = ("", "12 6", "3 5", "14 5 3 5")
# Steps a pixel in the coordinates of outlines.
SCALE = 4
_FEW_POINTS = 6
_QUALITIES = (75, 60, 45, 30, 15)
_DIVISORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Style:
    """How a label or a line is drawn: a colour of `COLOURS` and, beyond seven, another kind of line."""

    colour: str
    dash: str


def style_of(number: int) -> Style:
    """The style of the label or line with this place in a list."""
    return Style(COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)])


def grey(cut: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """(H, W) uint8 with these values black and white."""
    low, high = window
    return (np.clip((cut - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)


def window_of(volume: np.ndarray) -> tuple[float, float]:
    """The values of an image that are shown black and white."""
    low, high = np.percentile(volume, (1, 99.5))
    return float(low), float(high)


def data_uri(picture: np.ndarray, *, most_bytes: int) -> str:
    """A picture (H, W) or (H, W, 3) uint8 as the address of an image: WebP, or JPEG where Pillow has no WebP.

    Args:
        picture: The picture.
        most_bytes: The quality, and then the size, is lowered until the file is this small.
    """
    from PIL import Image, features

    kind = "webp" if features.check("webp") else "jpeg"
    image = Image.fromarray(np.ascontiguousarray(picture)).convert("RGB")
    content = b""
    for divisor, quality in product(_DIVISORS, _QUALITIES):
        buffer = io.BytesIO()
        small = image if divisor == 1 else image.reduce(divisor)
        small.save(buffer, kind, quality=quality)
        content = buffer.getvalue()
        if len(content) <= most_bytes:
            break
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def outlines(seg: np.ndarray, labels: Sequence[int]) -> dict[int, str]:
    """The outline of each label that a cut shows, as the data of an SVG path.

    Args:
        seg: (H, W) label map.
        labels: Labels to outline.

    Returns:
        Label -> path; `SCALE` steps a pixel, the first pixel's middle at half of them.
    """
    found = {}
    for label in labels:
        lines = _closed_lines(seg == label)
        if lines:
            found[int(label)] = "".join(map(_path, lines))
    return found


def thumbnail(picture: np.ndarray, seg: np.ndarray, labels: Sequence[int], *, edge: int, most_bytes: int) -> str:
    """A small picture with outlines, as the address of an image.

    Args:
        picture: (H, W) uint8.
        seg: (H, W) label map.
        labels: Labels to outline; their places give the styles' colours.
        edge: Longest edge, pixels.
        most_bytes: See `data_uri`.
    """
    from PIL import Image, ImageDraw

    factor = 2 * edge / max(picture.shape)
    size = (max(2, round(picture.shape[1] * factor)), max(2, round(picture.shape[0] * factor)))
    canvas = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    for number, label in enumerate(labels):
        for line in _closed_lines(seg == label):
            draw.line([tuple((point[::-1] + 0.5) * factor) for point in line], fill=style_of(number).colour, width=3)
    small = canvas.resize((max(1, size[0] // 2), max(1, size[1] // 2)), Image.Resampling.LANCZOS)
    return data_uri(np.asarray(small), most_bytes=most_bytes)


def _closed_lines(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines of a mask, (N, 2) rows and columns each, first and last point alike."""
    from skimage.measure import find_contours

    if not mask.any():
        return []
    return [_smoothed(line - 1) for line in find_contours(np.pad(mask, 1).astype(np.float32), 0.5)]


def _smoothed(line: np.ndarray) -> np.ndarray:
    """A closed line with a third of the points, each the mean of three neighbours; a short one as it is."""
    if len(line) < 3 * _FEW_POINTS:
        return line
    ring = line[:-1]
    mean = (np.roll(ring, 1, axis=0) + ring + np.roll(ring, -1, axis=0))[::3] / 3
    return np.concatenate([mean, mean[:1]])


def _path(line: np.ndarray) -> str:
    points = np.rint((line[:-1, ::-1] + 0.5) * SCALE).astype(int)
    steps = " ".join(f"{x},{y}" for x, y in np.diff(points, axis=0).tolist())
    return f"M{points[0, 0]},{points[0, 1]}l{steps}z"


@dataclass(frozen=True)
class Chart:
    """Lines over epochs.

    Attributes:
        title: What they show.
        series: Name -> values, one an epoch; None where there is none.
        marks: Epoch -> what happened there, drawn as a vertical line.
        about: How to read it, a sentence.
    """

    title: str
    series: Mapping[str, Sequence[float | None]]
    marks: Mapping[int, str] = field(default_factory=dict)
    about: str = ""


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 260, 52, 14, 34


def chart_svg(chart: Chart) -> str:
    """A chart as SVG, its names escaped; lines differ in colour and, beyond seven, in dashes."""
    values = [v for line in chart.series.values() for v in line if v is not None and isfinite(v)]
    if not values:
        return ""
    last = max(1, max(len(line) for line in chart.series.values()) - 1)
    low, high = min(values), max(values)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    plot = (_WIDTH - _LEFT - 12, _HEIGHT - _TOP - _BOTTOM)

    def place(epoch: float, value: float) -> tuple[float, float]:
        return _LEFT + plot[0] * epoch / last, _TOP + plot[1] * (high - value) / (high - low)

    summary = "; ".join(f"{name} ends at {_end(line)}" for name, line in chart.series.items())
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title)}: '
        f'{escape(summary)}">'
    ]
    for value in np.linspace(low, high, 5).tolist():
        x, y = place(0, value)
        parts.append(f'<path class="grid" d="M{x:.1f},{y:.1f}H{_WIDTH - 12}"/>')
        parts.append(f'<text x="{x - 6:.0f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for epoch in sorted({round(last * part / 4) for part in range(5)}):
        x, _ = place(epoch, low)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{epoch}</text>')
    for epoch, name in chart.marks.items():
        x, _ = place(epoch, low)
        parts.append(f'<path class="mark" d="M{x:.1f},{_TOP}V{_TOP + plot[1]}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{_TOP + 10}">{escape(name)}</text>')
    for number, line in enumerate(chart.series.values()):
        parts.append(_line(line, style_of(number), place))
    return "".join([*parts, "</svg>"])


def _line(values: Sequence[float | None], style: Style, place) -> str:
    points, dots = [], []
    for epoch, value in enumerate(values):
        if value is not None and isfinite(value):
            x, y = place(epoch, value)
            points.append(f"{x:.1f},{y:.1f}")
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{style.colour}"/>')
    dash = f' stroke-dasharray="{style.dash}"' if style.dash else ""
    line = f'<polyline points="{" ".join(points)}" fill="none" stroke="{style.colour}" stroke-width="2.5"{dash}/>'
    return line + ("".join(dots) if len(dots) <= 20 else "")


def _end(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{known[-1]:.3g}" if known else "nothing"
