"""A trained fold's validation for the page: scores of each label, and the best, median and worst case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.data.orientation import axes_of
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.propagation import read_reference
from nnunet_oneshot.evaluation.statistics import Interval, mean_score, score_table
from nnunet_oneshot.io import Each, Shape, load_json_checked, require_env
from nnunet_oneshot.report.cuts import coarse_points, divided, image_at, joined, labels_at, planes_through, stack
from nnunet_oneshot.report.drawing import grey, window_of
from nnunet_oneshot.report.labels import score_names

_METHOD = "student"
_SUMMARY: Shape = {"metric_per_case": [{"prediction_file": str, "metrics": Each(dict)}]}
# Cividis at five places: as readable for the colour-blind as in grey.
_CIVIDIS = np.array([(0, 34, 78), (65, 77, 107), (124, 123, 120), (187, 175, 106), (254, 232, 56)], float)


@dataclass(frozen=True)
class Scored:
    """The scores of a fold's validation cases.

    Attributes:
        folder: The predictions.
        cases: Mean Dice of each case, the worst first.
        labels: Name -> mean over cases with its interval; None where nothing was scored.
        mean: Over labels and cases, likewise.
        worst: Name -> lowest Dice of a case.
    """

    folder: Path
    cases: Mapping[str, float]
    labels: Mapping[str, Interval | None]
    mean: Interval | None
    worst: Mapping[str, float | None]

    @property
    def chosen(self) -> list[tuple[str, str]]:
        """Rank and name of the worst, the median and the best case, each once."""
        names = list(self.cases)
        if not names:
            return []
        picks = [("worst", names[0]), ("median", names[len(names) // 2]), ("best", names[-1])]
        return [(rank, name) for k, (rank, name) in enumerate(picks) if name not in [n for _, n in picks[:k]]]


def read_scores(prepared: PreparedDataset, folder: Path) -> Scored | None:
    """Scores of nnU-Net's ``validation`` folder; None where it has none.

    Raises:
        OneShotError: Its ``summary.json`` is damaged.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = load_json_checked(path, "the scores of the validation", _SUMMARY)
    entries = summary["metric_per_case"]
    if not entries:
        return None
    names = score_names(prepared)
    rows = []
    for entry in entries:
        case = Path(str(entry["prediction_file"]).replace("\\", "/")).name.removesuffix(prepared.file_ending)
        for name, key in names.items():
            value = entry["metrics"].get(key, {}).get("Dice")
            shared = {"method": _METHOD, "atlas": None, "fold": 0, "seed": None}
            rows.append({**shared, "case": case, "label": name, "dice": value})
    table = score_table(rows, _METHOD)
    if not table.cases:
        return None
    means = {case: float(value) for (_, case), value in zip(table.cases, table.values[0], strict=True)}
    labels = {name: score_table(rows, _METHOD, label=name) for name in names}
    return Scored(
        folder,
        dict(sorted(means.items(), key=lambda item: (item[1], item[0]))),
        {name: mean_score(scores) if scores.values.size else None for name, scores in labels.items()},
        mean_score(table),
        {name: float(np.nanmin(t.values)) if np.isfinite(t.values).any() else None for name, t in labels.items()},
    )


def prediction_stack(prepared: PreparedDataset, folder: Path, case: str, labels: Sequence[int]) -> dict[str, Any]:
    """Cuts through the raw image of a case with the outlines of its prediction and its reference.

    Args:
        prepared: The dataset.
        folder: nnU-Net's ``validation`` folder; probabilities in it (``--npz``) give a picture of the entropy.
        case: A labelled validation case.
        labels: Labels to outline.

    Returns:
        See `nnunet_oneshot.report.cuts.stack`.

    Raises:
        OneShotError: The raw image, the prediction or the reference cannot be read.
    """
    raw = RawDataset(require_env("nnUNet_raw")[0] / prepared.name)
    if case not in raw.cases:
        raise OneShotError(f"{raw.folder} holds no image of {case}.")
    reader = prepared.plans_manager.image_reader_writer_class()
    reference, properties, _ = read_reference(prepared, case)
    file = folder / f"{case}{prepared.file_ending}"
    # Readers raise whatever the underlying library raises.
    try:
        image = reader.read_images(raw.images(case))[0][0]
        prediction = reader.read_seg(str(file))[0][0]
    except Exception as error:
        raise OneShotError(f"The image or the prediction of {case} cannot be read ({error}).") from error
    maps = {"prediction": prediction, "reference": reference[0]}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(seg, np.int16))[None] for name, seg in maps.items()}
    coarse = coarse_points(image.shape)
    shown = np.any([labels_at(seg, coarse) > 0 for seg in tensors.values()], axis=0)
    spacing = [float(edge) for edge in properties["spacing"]]
    planes = planes_through(coarse[:, torch.from_numpy(shown)], image.shape, spacing, axes_of(properties))
    points = joined(planes)
    window = window_of(image)
    images = [("image", [grey(cut, window) for cut in divided(image_at(image, points), planes)])]
    entropy = _entropy(folder / f"{case}.npz", image.shape, has_regions=prepared.label_manager.has_regions)
    if entropy is not None:
        images.append(("uncertainty", [_coloured(cut) for cut in divided(image_at(entropy, points), planes)]))
    contours = [(name, divided(labels_at(seg, points), planes)) for name, seg in tensors.items()]
    return stack(planes, images, contours, labels)


def _entropy(path: Path, shape: Sequence[int], *, has_regions: bool) -> np.ndarray | None:
    """Entropy of the probabilities that nnU-Net saved, (X, Y, Z), 0 (certain) to 1; None without such a file.

    Of regions, which may overlap, it is the mean of their own.
    """
    try:
        with np.load(path) as arrays:
            probabilities = np.asarray(arrays["probabilities"], np.float32)
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if probabilities.ndim != 4 or tuple(probabilities.shape[1:]) != tuple(shape):
        return None
    p = np.clip(probabilities, 1e-6, 1)
    if has_regions:
        q = np.clip(1 - p, 1e-6, 1)
        return (-(p * np.log(p) + q * np.log(q)) / np.log(2)).mean(axis=0)
    return -(p * np.log(p)).sum(axis=0) / np.log(len(p))


def _coloured(cut: np.ndarray) -> np.ndarray:
    """Values from 0 to 1 (H, W) in the colours of cividis, (H, W, 3) uint8."""
    places = np.linspace(0, 1, len(_CIVIDIS))
    return np.stack([np.interp(cut, places, _CIVIDIS[:, k]) for k in range(3)], axis=-1).astype(np.uint8)
