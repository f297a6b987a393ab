"""Affine registration: several starts descend together on coarse grids, and the best goes on to a finer one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
import torch
from scipy.ndimage import center_of_mass
from torch import Tensor

from nnunet_oneshot.intensities import standardised
from nnunet_oneshot.registration.pair.functional import (
    correlation_window,
    downsample,
    identity_grid,
    local_moments,
    masked_mean,
    sample_at,
    squared_local_correlation,
)
from nnunet_oneshot.registration.pair.grid import RegistrationGrid
from nnunet_oneshot.registration.pair.multimodal import mutual_information

# The registration failed if a map stretches or shrinks any direction by more than this factor.
_LARGEST_STRETCH = 2.0
# Of the stages (all starts, those that stay apart, the best): voxels of the grid over the moving image, steps, and the
# weight of the squared Frobenius norm of M^T M - I, M the linear part in mm.
_STAGES = ((8_000, 40, 0.1), (20_000, 40, 0.1), (60_000, 20, 0.01))
# Starts that stay after the first stage.
_KEPT = 3
# Shifts of the aligned centres along the longest edge of the moving image, shares of it.
_SHIFTS = (-0.24, -0.12, 0.12, 0.24)
# Shifts along that edge at which the best map is probed for others that fit almost as well, and how many are followed.
_PROBES = 24
_FURTHEST_PROBE = 0.3
_FOLLOWED = 2
# Maps that move the moving image apart by less than this share of its longest edge, in the mean, are one.
SAME_MAP = 0.06
# A map whose objective is worse by less than this remains a rival of the best.
_NEAR = 0.3
# Step of Adam, voxels of the stage's grid at its first step; it falls linearly to a tenth.
_STEP = 1.0
# Weight of the global metric beside the squared local correlation.
_GLOBAL = 1.0
# Adam's divisor: without it, the rounding of a gradient that vanishes would become a step.
_SMALLEST_GRADIENT = 1e-4
_WINDOW = 5
# Axes of the fixed image are not downsampled below this many voxels; shorter ones cannot be registered.
_SHORTEST_AXIS = 4


@dataclass(frozen=True)
class AffineResult:
    """An affine map and how it was found.

    Attributes:
        matrix: (D + 1, D + 1) float64, fixed voxel coordinates -> moving voxel coordinates, array axis order.
        start: Name of the start that led to it: ``"initial"``, ``"centre"``, ``"moments"``, ``"shift"`` along the
            longest edge, or ``"identity"`` if no optimisation improved on the initial alignment.
        metric_before: Objective of the two volumes before any optimisation, see `register_affine`; smaller is better.
        metric_after: The same objective after registration.
        rivals: Maps that lead elsewhere and are hardly worse, best first.
    """

    matrix: np.ndarray
    start: str
    metric_before: float
    metric_after: float
    rivals: tuple[np.ndarray, ...] = ()


def centre_alignment(
    fixed_shape: Sequence[int],
    moving_shape: Sequence[int],
    fixed_spacing: Sequence[float],
    moving_spacing: Sequence[float],
) -> np.ndarray:
    """The map fixed voxel -> moving voxel that aligns the centres of both volumes in mm, (D + 1, D + 1)."""
    dim = len(fixed_shape)
    scale = np.asarray(fixed_spacing, float) / np.asarray(moving_spacing, float)
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = np.diag(scale)
    fixed_centre = (np.asarray(fixed_shape) - 1) / 2
    moving_centre = (np.asarray(moving_shape) - 1) / 2
    matrix[:dim, dim] = moving_centre - scale * fixed_centre
    return matrix


def register_affine(
    fixed: np.ndarray,
    moving: np.ndarray,
    *,
    fixed_spacing: Sequence[float],
    moving_spacing: Sequence[float],
    initial: np.ndarray | None = None,
    metric: str = "correlation",
    device: torch.device | str = "cpu",
) -> AffineResult:
    """Registers ``moving`` to ``fixed`` with an affine transform.

    The objective is minus the squared local correlation and a global metric, both on a grid over the moving image where
    the fixed one was observed and lowered by up to half where little of the smaller image overlaps the other, plus a
    penalty on stretching and shearing. All starts (the initial map if given, aligned centres, centres of mass, and
    centres shifted along the longest edge) descend at once by Adam on a coarse grid; the best that lead to different
    maps go on to a finer one, and the best of these to the finest. Maps that stretch or shrink any direction more than
    twofold are discarded. If no optimised map improves on the initial map and on aligned centres, the better of those
    two is the result.

    Args:
        fixed: (C, *shape) image with D = 2 or 3 spatial axes; channels are standardised.
        moving: (C, *shape), any grid.
        fixed_spacing: D voxel edges of ``fixed``, mm, array axis order.
        moving_spacing: D voxel edges of ``moving``, mm, array axis order.
        initial: (D + 1, D + 1) rigid map fixed voxel -> moving voxel, for example from the file headers. It adds a
            start, and all other starts use its rotation. None: the axes of both volumes point the same way.
        metric: The global one: ``"correlation"``, or ``"mutual_information"`` for images of different contrast.
        device: Where it runs.

    Returns:
        The map fixed voxel -> moving voxel.
    """
    frames = _Frames(fixed.shape[1:], moving.shape[1:], tuple(fixed_spacing), tuple(moving_spacing))
    first, second = (torch.from_numpy(standardised(image))[None].to(device) for image in (fixed, moving))
    stages = [_Stage(first, second, frames, voxels, penalty, metric) for voxels, _, penalty in _STAGES]
    given = frames.in_mm(centre_alignment(*frames.both) if initial is None else initial)
    names, maps = _starts(first, second, frames, given, rotated=initial is not None)
    unmoved = 1 if initial is None else 2
    with torch.no_grad():
        baselines = stages[1].objective(maps[:unmoved])
    better = int(baselines.argmin())
    before = float(baselines[better])
    unchanged = AffineResult(frames.in_voxels(maps[better]), "identity", before, before)
    if min(*fixed.shape[1:], *moving.shape[1:]) < _SHORTEST_AXIS:
        return unchanged
    maps, losses = _descended(stages[0], maps, _STAGES[0][1])
    kept = _distinct(maps, losses.tolist(), stages[0])[:_KEPT]
    if not kept:
        return unchanged
    maps, losses = _descended(stages[1], maps[kept], _STAGES[1][1])
    names = [names[index] for index in kept]
    probes = _probes(stages[1], maps[int(losses.argmin())])
    if len(probes):
        more, more_losses = _descended(stages[1], probes, _STAGES[1][1])
        maps, losses = torch.cat([maps, more]), torch.cat([losses, more_losses])
        names += ["shift"] * len(probes)
    found = losses.tolist()
    order = _distinct(maps, found, stages[1])
    if not order or not found[order[0]] < before:
        return unchanged
    best = order[0]
    finest, loss = _descended(stages[2], maps[best : best + 1], _STAGES[2][1], step=_STEP / 2)
    chosen = finest[0] if torch.isfinite(loss[0]) else maps[best]
    near = [index for index in order[1:] if found[index] - found[best] < _NEAR]
    rivals = tuple(frames.in_voxels(maps[index]) for index in near)
    return AffineResult(frames.in_voxels(chosen), names[best], before, found[best], rivals)


@dataclass(frozen=True)
class _Frames:
    """Shapes and voxel edges (mm) of both images. Millimetres are counted from their centres, along their axes."""

    fixed_shape: tuple[int, ...]
    moving_shape: tuple[int, ...]
    fixed_spacing: tuple[float, ...]
    moving_spacing: tuple[float, ...]

    @property
    def both(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
        return self.fixed_shape, self.moving_shape, self.fixed_spacing, self.moving_spacing

    @property
    def extents(self) -> np.ndarray:
        """Edges of the moving image, mm."""
        return np.multiply(self.moving_shape, self.moving_spacing)

    def in_mm(self, matrix: np.ndarray) -> np.ndarray:
        """A map fixed voxel -> moving voxel as the map moving mm -> fixed mm, both (D + 1, D + 1)."""
        return _frame(self.fixed_shape, self.fixed_spacing) @ np.linalg.inv(matrix) @ self._from_moving

    def in_voxels(self, transform: Tensor) -> np.ndarray:
        """A map moving mm -> fixed mm as the map fixed voxel -> moving voxel, both (D + 1, D + 1)."""
        in_mm = transform.detach().cpu().double().numpy()
        return self._from_moving @ np.linalg.inv(in_mm) @ _frame(self.fixed_shape, self.fixed_spacing)

    @property
    def _from_moving(self) -> np.ndarray:
        return np.linalg.inv(_frame(self.moving_shape, self.moving_spacing))


def _frame(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Voxel -> mm from the centre, (D + 1, D + 1)."""
    frame = np.diag([*map(float, spacing), 1.0])
    frame[:-1, -1] = -np.multiply(spacing, np.subtract(shape, 1)) / 2
    return frame


def _starts(
    fixed: Tensor, moving: Tensor, frames: _Frames, given: np.ndarray, *, rotated: bool
) -> tuple[list[str], Tensor]:
    """Names and maps moving mm -> fixed mm, (S, D + 1, D + 1), of all starts; the unmoved ones come first."""
    centred = given.copy()
    centred[:-1, -1] = 0
    masses = centred.copy()
    centre_of_fixed = _centre_of_mass(fixed, frames.fixed_spacing)
    masses[:-1, -1] = centre_of_fixed - masses[:-1, :-1] @ _centre_of_mass(moving, frames.moving_spacing)
    found = [("initial", given), ("centre", centred)] if rotated else [("centre", centred)]
    found.append(("moments", masses))
    longest = int(frames.extents.argmax())
    for share in _SHIFTS:
        shifted = centred.copy()
        shifted[:-1, -1] = shifted[:-1, longest] * share * frames.extents[longest]
        found.append(("shift", shifted))
    # In float32 before it goes there: MPS has no float64.
    maps = torch.from_numpy(np.stack([matrix for _, matrix in found])).float().to(fixed.device)
    return [name for name, _ in found], maps


def _centre_of_mass(image: Tensor, spacing: Sequence[float]) -> np.ndarray:
    """Of the mean of the channels above its minimum, mm from the centre; 0 for a constant image."""
    mass = image[0].mean(0).cpu().double().numpy()
    mass = mass - mass.min()
    if not mass.any():
        return np.zeros(mass.ndim)
    return (np.array(center_of_mass(mass)) - (np.array(mass.shape) - 1) / 2) * np.asarray(spacing, float)


class _Stage:
    """The objective on one grid over the moving image.

    Args:
        fixed: (1, C, *shape), standardised.
        moving: (1, C, *shape), standardised.
        frames: Their shapes and voxel edges.
        voxels: Largest number of voxels of the grid.
        penalty: Weight of stretching and shearing.
        metric: See `register_affine`.
    """

    def __init__(
        self, fixed: Tensor, moving: Tensor, frames: _Frames, voxels: int, penalty: float, metric: str
    ) -> None:
        grid = RegistrationGrid.over(frames.moving_shape, frames.moving_spacing, voxels)
        self.shape, self.spacing = grid.shape, grid.spacing
        self._moving = downsample(moving, grid.shape)
        edge = min(grid.spacing)
        sizes = [
            max(min(n, _SHORTEST_AXIS), round(n * min(1.0, spacing / edge)))
            for n, spacing in zip(frames.fixed_shape, frames.fixed_spacing, strict=True)
        ]
        self._fixed = downsample(fixed, sizes)
        self._sizes = fixed.new_tensor(sizes)[:, None]
        edges = np.multiply(frames.fixed_spacing, frames.fixed_shape) / sizes
        self._edges = fixed.new_tensor(edges.tolist())[:, None]
        centre = fixed.new_tensor([(n - 1) / 2 for n in grid.shape])[:, None]
        places = identity_grid(grid.shape, device=fixed.device).flatten(1) - centre
        self.places = places * fixed.new_tensor(grid.spacing)[:, None]
        self._window = correlation_window(_WINDOW, grid.shape)
        self._moments = local_moments(self._moving, self._window)
        volumes = [prod(np.multiply(n, s)) for n, s in zip(frames.both[:2], frames.both[2:], strict=True)]
        self._largest_overlap = min(1.0, volumes[0] / volumes[1])
        self._penalty, self._metric = penalty, metric

    def objective(self, maps: Tensor) -> Tensor:
        """(K,) of maps moving mm -> fixed mm (K, D + 1, D + 1); smaller is better."""
        linear = maps[:, :-1, :-1]
        places = linear @ self.places + maps[:, :-1, -1:]
        read = places / self._edges + (self._sizes - 1) / 2
        inside = ((read > -0.5) & (read < self._sizes - 0.5)).all(1).to(read.dtype).view(-1, 1, *self.shape)
        fixed = sample_at(self._fixed.expand(len(maps), *self._fixed.shape[1:]), read.view(len(maps), -1, *self.shape))
        moving, *moments = (v.expand(len(maps), *v.shape[1:]) for v in (self._moving, *self._moments))
        local = squared_local_correlation(fixed, moving, self._window, moments=(moments[0], moments[1]))
        similarity = masked_mean(local, inside) + _GLOBAL * self._globally(fixed, moving, inside)
        overlap = (inside.flatten(1).mean(1) / self._largest_overlap).clamp(max=1)
        stretch = (linear.transpose(1, 2) @ linear - torch.eye(linear.shape[-1], device=linear.device)).square()
        return self._penalty * stretch.sum((1, 2)) - similarity * (1 + overlap) / 2

    def _globally(self, fixed: Tensor, moving: Tensor, inside: Tensor) -> Tensor:
        if self._metric == "mutual_information":
            return mutual_information(fixed, moving, inside).mean(1)
        fixed, moving = fixed.mean(1, keepdim=True), moving.mean(1, keepdim=True)
        axes = (-1, *[1] * (fixed.ndim - 1))
        fixed, moving = (image - masked_mean(image, inside).view(axes) for image in (fixed, moving))
        both, *each = (masked_mean(product, inside) for product in (fixed * moving, fixed**2, moving**2))
        return both / (each[0] * each[1] + 1e-6).sqrt()


def _descended(stage: _Stage, maps: Tensor, iterations: int, *, step: float = _STEP) -> tuple[Tensor, Tensor]:
    """Maps (K, D + 1, D + 1) after Adam on a stage's objective, and the objective (K,), infinite where implausible."""
    dim = maps.shape[-1] - 1
    edge = min(stage.spacing)
    # A step of the linear part moves the border of the image about as far as a step of the translation.
    border = float(np.mean(np.multiply(stage.shape, stage.spacing))) / 2
    linear, shift = (torch.zeros_like(part).requires_grad_(True) for part in (maps[:, :dim, :dim], maps[:, :dim, dim]))
    rates = (step * edge / border, step)
    optimizer = torch.optim.Adam(
        [{"params": [linear], "lr": rates[0]}, {"params": [shift], "lr": rates[1]}], eps=_SMALLEST_GRADIENT
    )
    for iteration in range(iterations):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - 0.9 * iteration / iterations)
        optimizer.zero_grad(set_to_none=True)
        stage.objective(_moved(maps, linear, edge * shift)).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found = _moved(maps, linear, edge * shift)
        losses = stage.objective(found)
    return found, torch.where(_are_plausible(found[:, :dim, :dim]) & torch.isfinite(losses), losses, torch.inf)


@torch.no_grad()
def _probes(stage: _Stage, best: Tensor) -> Tensor:
    """Maps (P, D + 1, D + 1) beside the best one, shifted along the longest edge to where the objective is lowest.

    Structures that repeat, such as vertebrae, fit almost as well one period further.
    """
    edges = np.multiply(stage.shape, stage.spacing)
    longest = int(edges.argmax())
    shares = torch.linspace(-_FURTHEST_PROBE, _FURTHEST_PROBE, 2 * _PROBES + 1, device=best.device)
    maps = best.repeat(len(shares), 1, 1)
    maps[:, :-1, -1] += best[:-1, longest] * shares[:, None] * float(edges[longest])
    losses = torch.cat([stage.objective(part) for part in maps.split(_PROBES // 2)])
    lowest = (losses[1:-1] <= losses[:-2]) & (losses[1:-1] <= losses[2:]) & (shares[1:-1].abs() > SAME_MAP)
    places = 1 + lowest.nonzero()[:, 0]
    return maps[places[losses[places].argsort()[:_FOLLOWED]]]


def _moved(maps: Tensor, linear: Tensor, shift: Tensor) -> Tensor:
    """Maps M p + t with M (1 + ``linear``) and t + ``shift``, (K, D + 1, D + 1)."""
    dim = linear.shape[-1]
    new = maps[:, :dim, :dim] @ (torch.eye(dim, device=maps.device) + linear)
    upper = torch.cat([new, (maps[:, :dim, dim] + shift)[..., None]], dim=2)
    return torch.cat([upper, maps[:, dim:]], dim=1)


def _distinct(maps: Tensor, losses: Sequence[float], stage: _Stage) -> list[int]:
    """Maps that lead to different places, best first; those with an infinite objective are left out."""
    far = SAME_MAP * max(np.multiply(stage.shape, stage.spacing))
    finite = [int(index) for index in np.argsort(losses, kind="stable") if np.isfinite(losses[index])]
    pairs = list(combinations(finite, 2))
    # Fetched from the device at once.
    found = torch.stack([_distance(maps[a], maps[b], stage.places) for a, b in pairs]).tolist() if pairs else []
    apart = dict(zip(pairs, found, strict=True))
    chosen: list[int] = []
    for index in finite:
        if all(apart[other, index] > far for other in chosen):
            chosen.append(index)
    return chosen


def _distance(first: Tensor, second: Tensor, places: Tensor) -> Tensor:
    """Mean distance of where two maps lead, mm."""
    difference = first - second
    return (difference[:-1, :-1] @ places + difference[:-1, -1:]).norm(dim=0).mean()


def _are_plausible(linear: Tensor) -> Tensor:
    """Whether linear maps between mm (K, D, D) are finite and stretch no direction too much, (K,)."""
    finite = torch.isfinite(linear).all(2).all(1)
    stretches = torch.linalg.svdvals(torch.where(finite[:, None, None], linear, torch.zeros_like(linear)))
    return finite & (stretches[:, 0] <= _LARGEST_STRETCH) & (stretches[:, -1] >= 1 / _LARGEST_STRETCH)
