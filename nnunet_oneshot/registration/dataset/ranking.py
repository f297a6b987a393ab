"""Ranks cases by how well they represent the others, first of all cases and then beside those that are labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_oneshot.data.parallel import run_on_cases
from nnunet_oneshot.data.thumbnails import correlations
from nnunet_oneshot.registration.pair.affine import register_affine
from nnunet_oneshot.registration.pair.functional import identity_grid, sample_at, transform_points

# Rounds of aligning all cases to their mean; the second uses a sharper mean.
_ROUNDS = 2


@dataclass(frozen=True)
class RankedCase:
    """A case's place in the ranking.

    Attributes:
        rank: 1 is the best atlas.
        case: Its name.
        correlation: Mean correlation to all others after affine alignment.
        correlation_unaligned: The same before alignment, which the automatic choice of an atlas uses.
        most_similar: The case it resembles most.
    """

    rank: int
    case: str
    correlation: float
    correlation_unaligned: float
    most_similar: str

    @property
    def caption(self) -> str:
        """Two lines for a picture."""
        return f"{self.rank}. {self.case}\n{self.correlation:.3f}"


@dataclass(frozen=True)
class NextCase:
    """An unlabelled case's place among those to be labelled next.

    Attributes:
        rank: 1 is to be labelled first.
        case: Its name.
        gain: How much its label would add to the mean, over all cases, of the correlation to the most similar labelled
            one.
        similarity: Its correlation, after affine alignment, to the labelled case that is most like it.
        nearest: That labelled case.
        agreement: Mean Dice between a student's prediction and the label that registration carries; None without one.
    """

    rank: int
    case: str
    gain: float
    similarity: float
    nearest: str
    agreement: float | None

    @property
    def caption(self) -> str:
        """Two lines for a picture."""
        agreement = "" if self.agreement is None else f", agreement {self.agreement:.3f}"
        return f"{self.rank}. {self.case}\ngain {self.gain:.4f}{agreement}"


def rank_cases(
    volumes: Mapping[str, np.ndarray], *, num_processes: int = 1, show_progress: bool = False
) -> list[RankedCase]:
    """Ranks cases by their mean correlation to all others.

    Affine registration first aligns all cases to their common mean. Differences of pose and size must not count against
    a case, because the later registration removes them whichever case is the atlas.

    Args:
        volumes: Small volumes of equal shape, see `nnunet_oneshot.data.thumbnails.pool_volume`.
        num_processes: Worker processes.
        show_progress: Whether to show progress bars.

    Returns:
        All cases, best first; ties are sorted by name.
    """
    names, before = correlations(volumes)
    after = _aligned_correlations(volumes, num_processes=num_processes, show_progress=show_progress)
    means, means_before = (_means_without_diagonal(matrix) for matrix in (after, before))
    np.fill_diagonal(after, -np.inf)
    order = sorted(range(len(names)), key=lambda index: (-means[index], names[index]))
    return [
        RankedCase(rank, names[i], float(means[i]), float(means_before[i]), names[int(after[i].argmax())])
        for rank, i in enumerate(order, 1)
    ]


def rank_next(
    volumes: Mapping[str, np.ndarray],
    labelled: Sequence[str],
    agreement: Mapping[str, float] | None = None,
    *,
    num_processes: int = 1,
    show_progress: bool = False,
) -> list[NextCase]:
    """Ranks unlabelled cases by how much the label of each would add to those that are there; see `order_next`.

    Args:
        volumes: Small volumes of equal shape, see `nnunet_oneshot.data.thumbnails.pool_volume`.
        labelled: The labelled cases among them, at least one.
        agreement: Unlabelled case to the Dice between a student's prediction and the label that registration carries.
        num_processes: Worker processes.
        show_progress: Whether to show progress bars.

    Returns:
        All unlabelled cases, first the one to be labelled next.
    """
    matrix = _aligned_correlations(volumes, num_processes=num_processes, show_progress=show_progress)
    return order_next(sorted(volumes), matrix, labelled, agreement)


def order_next(
    names: Sequence[str],
    similarities: np.ndarray,
    labelled: Sequence[str],
    agreement: Mapping[str, float] | None = None,
) -> list[NextCase]:
    """The order in which unlabelled cases are to be labelled.

    By images alone, a case comes first if its label raises most the mean, over all cases, of the similarity to the most
    similar labelled one: it is unlike the labelled cases, and others are like it. One that is like nothing gains
    little. With the agreement of a student and of registration, the order is that of the sum of two places, by gain
    (largest first) and by agreement (lowest first).

    Args:
        names: Of all cases.
        similarities: (N, N) in their order, symmetric.
        labelled: The labelled cases, at least one.
        agreement: Unlabelled case to the Dice between a student's prediction and the label that registration carries.

    Returns:
        All unlabelled cases; ties are sorted by gain, then by name.
    """
    known = [index for index, name in enumerate(names) if name in set(labelled)]
    others = [index for index in range(len(names)) if index not in set(known)]
    covered = similarities[:, known].max(1)
    # Rounded, so that the order of ties does not depend on the summation order of a BLAS library.
    gains = np.round(np.maximum(similarities - covered[:, None], 0).mean(0), 6)
    places = _places({i: -gains[i] for i in others})
    if agreement is not None:
        doubts = _places({i: agreement[names[i]] for i in others})
        places = {i: places[i] + doubts[i] for i in others}
    return [
        NextCase(
            rank,
            names[i],
            gain=float(gains[i]),
            similarity=float(covered[i]),
            nearest=names[known[int(similarities[i, known].argmax())]],
            agreement=None if agreement is None else float(agreement[names[i]]),
        )
        for rank, i in enumerate(sorted(others, key=lambda i: (places[i], -gains[i], names[i])), 1)
    ]


def _places(values: Mapping[int, float]) -> dict[int, int]:
    """How many values are smaller than each."""
    return {key: sum(other < value for other in values.values()) for key, value in values.items()}


def _aligned_correlations(volumes: Mapping[str, np.ndarray], *, num_processes: int, show_progress: bool) -> np.ndarray:
    """Correlations (N, N) of all pairs, sorted by name, after affine alignment to their common mean."""
    names = sorted(volumes)
    standard = {name: _standardised(volumes[name]) for name in names}
    aligned = standard
    for number in range(_ROUNDS):
        mean = np.mean([aligned[name] for name in names], axis=0)
        results = run_on_cases(
            _align,
            [(standard[name], mean) for name in names],
            num_processes=num_processes,
            description=f"Aligning images ({number + 1}/{_ROUNDS})",
            show_progress=show_progress,
        )
        aligned = dict(zip(names, results, strict=True))
    return correlations(aligned)[1]


def _align(volume: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The volume (C, X, Y, Z) affinely resampled onto the template of the same shape."""
    flat = volume.shape[1] == 1
    moving, fixed = (array[:, 0] if flat else array for array in (volume, template))
    spacing = (1.0,) * (moving.ndim - 1)
    affine = register_affine(fixed, moving, fixed_spacing=spacing, moving_spacing=spacing).matrix
    points = transform_points(torch.from_numpy(affine).float(), identity_grid(fixed.shape[1:])[None])
    aligned = sample_at(torch.from_numpy(np.ascontiguousarray(moving, np.float32))[None], points)[0].numpy()
    return aligned.reshape(volume.shape)


def _standardised(volume: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, volume.ndim))
    mean, deviation = volume.mean(axes, keepdims=True), volume.std(axes, keepdims=True)
    return ((volume - mean) / np.maximum(deviation, 1e-8)).astype(np.float32)


def _means_without_diagonal(matrix: np.ndarray) -> np.ndarray:
    # Rounded, so that the order of ties does not depend on the summation order of a BLAS library.
    return np.round((matrix.sum(1) - np.diag(matrix)) / (len(matrix) - 1), 6)
