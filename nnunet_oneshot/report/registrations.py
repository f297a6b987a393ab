"""The registrations of a fold for the page: scores, what is wrong with them, and their cuts, made once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import save_text_atomic
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.ratings import RATINGS, Rating, folder_name
from nnunet_oneshot.registration.pair.functional import transform_points
from nnunet_oneshot.registration.pair.quality import draw_weights, is_ambiguous, telling_similarity
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import deform_points, displacement_of
from nnunet_oneshot.report.cuts import Plane, coarse_points, divided, image_at, joined, labels_at, planes_through, stack
from nnunet_oneshot.report.drawing import grey, thumbnail, window_of
from nnunet_oneshot.report.labels import Label

# Layout of the files of cuts; one of another layout is made again.
_LAYOUT = 1
_SUFFIX = ".cuts"
_THUMBNAIL, _THUMBNAIL_BYTES = 132, 6000


@dataclass(frozen=True)
class Pair:
    """A registration on the page.

    Attributes:
        atlas: Name of the labelled case.
        case: Name of the case that it is warped to.
        part: ``"training"`` or ``"validation"``.
        score: `telling_similarity`.
        record: Content of the pair's JSON file.
        flags: What is wrong with it: ``ambiguous``, ``worse``, ``outlier``, ``unmoved``, ``folded``.
        rating: ``good``, ``doubtful``, ``bad`` or empty, from the dataset's file of ratings.
    """

    atlas: str
    case: str
    part: str
    score: float
    record: Mapping[str, Any]
    flags: tuple[str, ...]
    rating: str

    @property
    def quality(self) -> Mapping[str, Any]:
        """The figures of the record."""
        return self.record["quality"]


def pairs_of(
    cache: RegistrationCache, atlases: Sequence[str], fold: Fold, ratings: Sequence[Rating], prepared: PreparedDataset
) -> tuple[list[Pair], list[tuple[str, str]]]:
    """The registrations of a fold, the worst first, and the pairs (atlas, case) that are not registered yet.

    Args:
        cache: The registrations.
        atlases: Of the fold.
        fold: Its cases.
        ratings: Those of the dataset.
        prepared: The dataset.
    """
    cases = sorted({*fold.train, *fold.validation})
    records = {(a, c): cache.record(a, c) for a in atlases for c in cases if a != c}
    known = {pair: record for pair, record in records.items() if record is not None}
    nothing = np.zeros((3, 1, 1, 1), np.float32)
    stubs = [Registration(a, c, np.eye(4), nothing, (), (), record["quality"]) for (a, c), record in known.items()]
    weights = dict(zip(known, draw_weights(stubs).tolist(), strict=True)) if stubs else {}
    folder = folder_name(prepared.kept, cache)
    given = {(r.atlas, r.case): r for r in ratings if r.registrations == folder}
    pairs = []
    for (atlas, case), record in known.items():
        rating = given.get((atlas, case))
        current = rating is not None and rating.key in ("", record["key"])
        pairs.append(
            Pair(
                atlas,
                case,
                "validation" if case in fold.validation else "training",
                float(telling_similarity(record["quality"])),
                record,
                _flags(record, drawn=weights[atlas, case] > 0),
                rating.rating if rating is not None and current and rating.rating in RATINGS else "",
            )
        )
    missing = [pair for pair, record in records.items() if record is None]
    return sorted(pairs, key=lambda pair: (pair.score, pair.case, pair.atlas)), missing


def _flags(record: Mapping[str, Any], *, drawn: bool) -> tuple[str, ...]:
    quality = record["quality"]
    affine = record.get("parameters", {}).get("affine", True)
    found = {
        "ambiguous": is_ambiguous(quality),
        "worse": quality["similarity_after"] < quality.get("similarity_before", -np.inf),
        "outlier": not drawn,
        "unmoved": affine and quality.get("affine_start") == "identity",
        "folded": quality.get("folding", 0) > 0.001,
    }
    return tuple(name for name, holds in found.items() if holds)


@dataclass(frozen=True)
class CutMaker:
    """Makes the pictures of pairs and keeps them beside the registrations.

    Attributes:
        prepared: The dataset.
        cache: The registrations.
        labels: Labels to outline.
    """

    prepared: PreparedDataset
    cache: RegistrationCache
    labels: Sequence[Label]

    def pictures(self, pair: Pair) -> dict[str, Any]:
        """``thumbnail`` (address of an image) and ``stack`` (see `nnunet_oneshot.report.cuts.stack`) of a pair.

        Raises:
            OneShotError: The registration or a preprocessed file is missing or damaged.
        """
        path = self.cache.path(pair.atlas, pair.case, _SUFFIX)
        values = [label.value for label in self.labels]
        made_of = [_LAYOUT, pair.record["key"], values]
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["made_of"] == made_of:
                return kept["pictures"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        pictures = self._draw(pair, values)
        # In a folder that cannot be written to, they are made each time.
        with suppress(OneShotError):
            save_text_atomic(json.dumps({"made_of": made_of, "pictures": pictures}), path)
        return pictures

    def _draw(self, pair: Pair, values: list[int]) -> dict[str, Any]:
        registration = self.cache.load(pair.atlas, pair.case)
        atlas, seg = self._atlas(pair.atlas)
        image = self.prepared.image(pair.case)[0]
        affine = torch.from_numpy(registration.affine).float()
        displacement = displacement_of(torch.from_numpy(registration.velocity), registration.atlas_shape)

        def before(points: torch.Tensor) -> torch.Tensor:
            return transform_points(affine, points[None])[0]

        def after(points: torch.Tensor) -> torch.Tensor:
            return deform_points(before(points), displacement, registration.atlas_shape)

        coarse = coarse_points(image.shape)
        shown = labels_at(seg, after(coarse)) > 0
        if not shown.any():
            shown = labels_at(seg, before(coarse)) > 0
        spacing, axes = self.prepared.spacing(pair.case), self.prepared.axes(pair.case)
        planes = planes_through(coarse[:, torch.from_numpy(shown)], image.shape, spacing, axes)
        points = joined(planes)
        places = {"after": after(points), "before": before(points)}
        own = _greys(image, points, planes)
        contours = [(name, divided(labels_at(seg, place), planes)) for name, place in places.items()]
        images = [("case", own), *((name, _greys(atlas, place, planes)) for name, place in places.items())]
        middle = min(1, len(planes) - 1)
        segs = contours[0][1]
        small = thumbnail(own[middle], segs[middle], values, edge=_THUMBNAIL, most_bytes=_THUMBNAIL_BYTES)
        return {"thumbnail": small, "stack": stack(planes, images, contours, values)}

    def _atlas(self, name: str) -> tuple[np.ndarray, torch.Tensor]:
        """First channel (X, Y, Z) and label map (1, X, Y, Z) of an atlas; kept for the next pair."""
        if name not in self._read:
            segmentation = torch.from_numpy(np.ascontiguousarray(self.prepared.segmentation(name)))
            self._read[name] = (self.prepared.image(name)[0], segmentation)
        return self._read[name]

    @cached_property
    def _read(self) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
        return {}


def _greys(volume: np.ndarray, points: torch.Tensor, planes: Sequence[Plane]) -> list[np.ndarray]:
    """An image (X, Y, Z) on planes, (H, W) uint8 each."""
    window = window_of(volume)
    return [grey(cut, window) for cut in divided(image_at(volume, points), planes)]
