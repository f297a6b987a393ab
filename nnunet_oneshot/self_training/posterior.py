"""Corrects propagated labels by the intensities of the target image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BINS = 40
_BIN_SMOOTHING = 1.5
_IMAGE_SMOOTHING = 0.5
_REACH = 4
_ITERATIONS = 5
_OUTER_SHARE = 0.005
_FLOOR = 1e-3
_CANDIDATES = 4
_CELL = 4
# Values of all labels at the voxels of a band that are compared at a time.
_VALUES = 2**25
_SURROUNDINGS = 8.0
_WHOLE_SHARE = 0.2


def posterior_labels(image: Tensor, labels: Tensor, *, blur: float, strength: float) -> Tensor:
    r"""The most probable label of every voxel, given a propagated label map and the image itself.

    Propagated labels show the right structures, but their borders are off by a voxel or two. They serve as prior,
    blurred by that uncertainty. Expectation maximisation learns the intensities of each label from the same image
    (after Van Leemput et al., IEEE TMI 18(10), 1999, with histograms instead of Gaussians). Background intensities are
    learned locally, since the surroundings of a structure differ from side to side:

    .. math:: q_l(p) \propto \pi_l(p) \prod_c h_{l,c}(I_c(p))^{s / C},
              \quad h_{l,c}(i) \propto \sum_p q_l(p) \, [I_c(p) \in \mathrm{bin}_i]

    with the blurred prior :math:`\pi` and strength :math:`s`. Voxels more than 4 voxels from any foreground remain
    background, so that the background intensities come only from the surroundings of the structures.

    Args:
        image: (B, C, *spatial), two or three spatial axes.
        labels: (B, 1, *spatial) whole numbers >= 0, 0 is background.
        blur: Standard deviation of the Gaussian that blurs the prior, voxels. For a thin label it is limited to the
            ratio of the label's voxels to its faces (for a sheet: half its thickness). With more blur, its surroundings
            would be more probable than the label even inside it.
        strength: The exponent s; 0 returns ``labels`` unchanged.

    Returns:
        Labels of the same shape and type. A sample gets no labels that it did not have before.
    """
    if strength == 0:
        return labels
    results = [
        _posterior(own, label[0], blur=blur, strength=strength)
        for own, label in zip(image.float(), labels, strict=True)
    ]
    return torch.stack(results)[:, None].to(labels.dtype)


def posterior_probabilities(
    image: Tensor, labels: Tensor, values: Sequence[int], *, blur: float, strength: float, out: Tensor | None = None
) -> Tensor:
    """The probabilities of which `posterior_labels` takes the largest.

    Args:
        image: (C, *spatial), two or three spatial axes.
        labels: (*spatial) whole numbers >= 0, 0 is background.
        values: The labels whose probabilities are wanted, 0 first.
        blur: See `posterior_labels`.
        strength: The same; 0 gives the labels themselves.
        out: Memory of the result, which is overwritten; None takes new memory.

    Returns:
        (len(values), *spatial) float32; far from any foreground the background has 1.
    """
    labels = labels.long()
    result = torch.empty((len(values), *labels.shape)) if out is None else out
    solved = _solved(image.float(), labels, blur=blur, strength=strength) if strength else None
    for row, value in zip(result, values, strict=True):
        row.copy_(labels == value)
        if solved is not None:
            row.view(-1)[solved.band] = (solved.posterior * (solved.present[solved.candidates] == value)).sum(0)
    return result


def posterior_target(
    image: Tensor,
    target: Tensor | list[Tensor],
    *,
    num_heads: int,
    has_regions: bool,
    **options: float,
) -> Tensor | list[Tensor]:
    """`posterior_labels` for a target in the format of nnU-Net's loaders.

    Args:
        image: (B, C, *spatial).
        target: Labels (B, 1, *spatial), or regions (B, R, *spatial), each processed separately, with one more channel
            if the dataset has an ignore label. With deep supervision, a list of these, full resolution first. Ignored
            voxels remain ignored.
        num_heads: Number of the network's outputs; for labels also the value of the ignore label.
        has_regions: Whether the network's outputs are regions.
        options: ``blur`` and ``strength`` of `posterior_labels`.

    Returns:
        A target of the same structure; lower resolutions are nearest-neighbour samples of the full one, as in nnU-Net.
    """
    full = target[0] if isinstance(target, list) else target
    if has_regions:
        result = full.clone()
        for region in range(num_heads):
            result[:, region : region + 1] = posterior_labels(image, full[:, region : region + 1], **options)
    else:
        ignored = full >= num_heads
        labels = posterior_labels(image, full.masked_fill(ignored, 0), **options)
        result = torch.where(ignored, full, labels)
    if isinstance(target, list):
        return [_nearest(result, level.shape[2:]) for level in target]
    return result


class _Solved(NamedTuple):
    """What expectation maximisation finds.

    Attributes:
        band: Flat index of each voxel near any foreground, (N,).
        present: The labels that there are, (L,).
        candidates: The few labels that are possible in each voxel, (M, N), as places in `present`.
        posterior: Their probabilities, (M, N).
    """

    band: Tensor
    present: Tensor
    candidates: Tensor
    posterior: Tensor


def _posterior(image: Tensor, labels: Tensor, *, blur: float, strength: float) -> Tensor:
    """One sample: image (C, *spatial), labels (*spatial)."""
    solved = _solved(image, labels, blur=blur, strength=strength)
    if solved is None:
        return labels
    result = torch.zeros_like(labels).flatten()
    likeliest = solved.candidates.gather(0, solved.posterior.max(0, keepdim=True).indices)[0]
    result[solved.band] = solved.present[likeliest]
    return result.view(labels.shape)


def _solved(image: Tensor, labels: Tensor, *, blur: float, strength: float) -> _Solved | None:
    """Expectation maximisation for one sample: image (C, *spatial), labels (*spatial); None for a single label."""
    present = labels.unique()
    if len(present) < 2:
        return None
    band = _dilated(labels != 0).flatten().nonzero()[:, 0]
    prior, candidates = _most_probable(labels, present, band, blur)
    bins = [_binned(channel[band]) for channel in _gaussian(image, _IMAGE_SMOOTHING).flatten(1)]
    cells, grid = _cells(band, labels.shape)
    background = candidates == (present == 0).nonzero()[0] if bool((present == 0).any()) else None
    log_prior = prior.log()
    posterior = prior
    for _ in range(_ITERATIONS):
        evidence = torch.zeros_like(prior)
        for index in bins:
            places = candidates * _BINS + index
            counts = prior.new_zeros(len(present) * _BINS).index_add_(0, places.flatten(), posterior.flatten())
            found = _histograms(counts.view(len(present), _BINS)).log().flatten()[places]
            if background is not None:
                own = _local_histograms((posterior * background).sum(0), index, cells, grid).log()
                found = torch.where(background, own, found)
            evidence += found
        posterior = torch.softmax(log_prior + strength / len(bins) * evidence, dim=0)
    return _Solved(band, present, candidates, posterior)


def _dilated(mask: Tensor) -> Tensor:
    """A mask (*spatial) dilated by `_REACH` voxels along each axis in turn."""
    result = mask.float()
    for axis in range(mask.ndim):
        lines = result.movedim(axis, -1)
        grown = F.max_pool1d(lines.reshape(-1, 1, lines.shape[-1]), 2 * _REACH + 1, stride=1, padding=_REACH)
        result = grown.view(lines.shape).movedim(-1, axis)
    return result > 0


def _largest(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest of (L, N) values in each column and their rows, (number, N) each, in descending order; of equal ones
    the first row. The values are overwritten.

    Only few labels are possible at any one voxel, so ``number`` is small; ``topk`` is several times slower.
    """
    found = []
    for _ in range(number):
        largest = values.max(0, keepdim=True)
        values.scatter_(0, largest.indices, -1.0)
        found.append(largest)
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _most_probable(labels: Tensor, present: Tensor, band: Tensor, blur: float) -> tuple[Tensor, Tensor]:
    """The largest of the labels' blurred indicators at each voxel of the band and their labels' numbers in ``present``.

    Of many labels not all are in memory at a time: those that were the largest so far compete with the next ones.

    Returns:
        (number, N) each, in descending order; number is `_CANDIDATES`, or that of the labels.
    """
    number = min(_CANDIDATES, len(present))
    together = min(len(present), max(number, _VALUES // len(band)))
    values = torch.empty((number + together, len(band)), device=labels.device)
    best, chosen = values[:0], torch.empty((0, len(band)), dtype=torch.long, device=labels.device)
    rows = 0
    for index, indicator in enumerate(_blurred_indicators(labels, present, blur)):
        torch.index_select(indicator.flatten(), 0, band, out=values[len(best) + rows])
        rows += 1
        if rows == together or index == len(present) - 1:
            known = len(best)
            best, places = _largest(values[: known + rows], min(number, known + rows))
            new = places - known + index + 1 - rows
            old = chosen.gather(0, places.clamp_max(known - 1)) if known else new
            chosen = torch.where(places < known, old, new)
            values[: len(best)] = best
            rows = 0
    return best, chosen


def _blurred_indicators(labels: Tensor, present: Tensor, blur: float) -> Iterator[Tensor]:
    """Each label's indicator, blurred: (*spatial), overwritten by the next; computed in the box around the label."""
    result = torch.zeros(labels.shape, device=labels.device)
    radius = math.ceil(3 * blur)
    places = torch.searchsorted(present.long(), labels.long())
    lowest, highest = _extents(places, len(present))
    deviations = _voxels_by_faces(places, len(present)).clamp_max(blur).masked_fill(present == 0, blur).tolist()
    for index, (label, low, high) in enumerate(zip(present, lowest.tolist(), highest.tolist(), strict=True)):
        box = tuple(slice(max(0, start - radius), stop + radius + 1) for start, stop in zip(low, high, strict=True))
        result[box] = _gaussian((labels[box] == label).float()[None], deviations[index])[0]
        yield result
        result[box] = 0


def _voxels_by_faces(labels: Tensor, number: int) -> Tensor:
    """Voxels per face of labels 0 ... number - 1 of a map (*spatial), (number,); for a sheet, half its thickness."""
    volumes = torch.bincount(labels.flatten(), minlength=number)
    faces = torch.zeros_like(volumes)
    for axis, size in enumerate(labels.shape):
        lower, upper = labels.narrow(axis, 0, size - 1), labels.narrow(axis, 1, size - 1)
        for side in (lower[lower != upper], upper[lower != upper]):
            faces += torch.bincount(side, minlength=number)
    return volumes / faces.clamp_min(1)


def _extents(labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest voxel index of the labels 0 ... number - 1 of a map (*spatial), (number, D) each."""
    lowest, highest = [], []
    for axis, size in enumerate(labels.shape):
        places = torch.arange(size, device=labels.device).view([-1 if a == axis else 1 for a in range(labels.ndim)])
        shown = torch.zeros(number * size, dtype=torch.bool, device=labels.device)
        shown[(labels * size + places).flatten()] = True
        found = torch.where(shown.view(number, size), places.flatten(), -1)
        highest.append(found.amax(1))
        lowest.append(torch.where(found < 0, size, found).amin(1))
    return torch.stack(lowest, dim=1), torch.stack(highest, dim=1)


def _nearest(volume: Tensor, shape: torch.Size) -> Tensor:
    """(B, C, *spatial) at another resolution, by nearest neighbours."""
    if volume.shape[2:] == shape:
        return volume
    return F.interpolate(volume.float(), size=tuple(shape), mode="nearest-exact").to(volume.dtype)


def _binned(values: Tensor) -> Tensor:
    """Bin index of each value (N,); the bins lie between quantiles that exclude the outermost values."""
    ordered = values.sort().values
    outer = int(_OUTER_SHARE * (len(ordered) - 1))
    low, high = ordered[outer], ordered[-1 - outer]
    # Bins scale with the range of the values, whatever their unit; constant values share a bin.
    width = (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    return ((values - low) / width * _BINS).clamp(0, _BINS - 1).long()


def _histograms(counts: Tensor) -> Tensor:
    """Smoothed histograms (L, bins), each with sum 1 and above 0 everywhere."""
    counts = _smooth(counts, _kernel(_BIN_SMOOTHING), 0)
    counts = counts + _FLOOR * counts.sum(1, keepdim=True).clamp_min(1e-8)
    return counts / counts.sum(1, keepdim=True)


def _cells(band: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, ...]]:
    """The cell (edge `_CELL` voxels) of each voxel in the band, and the shape of the grid of cells."""
    grid = tuple(-(-size // _CELL) for size in shape)
    cells, rest = torch.zeros_like(band), band
    stride = 1
    for size, count in zip(reversed(shape), reversed(grid), strict=True):
        cells = cells + (rest % size) // _CELL * stride
        rest, stride = rest // size, stride * count
    return cells, grid


def _local_histograms(weights: Tensor, index: Tensor, cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Probability of each voxel's bin in the histogram of its surroundings: (N,), above 0.

    The surroundings of a structure differ from side to side, so the background needs a local histogram. Where there is
    little background nearby, the histogram of the whole band contributes more.
    """
    counts = weights.new_zeros(math.prod(grid) * _BINS).index_add_(0, cells * _BINS + index, weights)
    counts = counts.view(-1, _BINS)
    around = _gaussian(counts.T.reshape(_BINS, *grid), _SURROUNDINGS / _CELL).flatten(1).T
    amount = around.sum(1, keepdim=True)
    whole = counts.sum(0) / counts.sum().clamp_min(1e-8)
    found = _histograms(around + _WHOLE_SHARE * amount.max() * whole)
    return found.flatten()[cells * _BINS + index]


def _gaussian(volumes: Tensor, deviation: float) -> Tensor:
    """Separable Gaussian filter of (N, *spatial) volumes whose border voxels are repeated."""
    if deviation == 0:
        return volumes
    kernel = _kernel(deviation)
    for axis in range(volumes.ndim - 1):
        volumes = _smooth(volumes, kernel, axis)
    return volumes


def _kernel(deviation: float) -> list[float]:
    """Weights of a Gaussian; a list, because reading a tensor's values one by one from a GPU is slow."""
    radius = math.ceil(3 * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float32) / deviation) ** 2)
    return (kernel / kernel.sum()).tolist()


def _smooth(volumes: Tensor, kernel: list[float], axis: int) -> Tensor:
    """Convolution of (N, *spatial) along one spatial axis, as a sum of shifted copies because kernels are short."""
    size, radius = volumes.shape[axis + 1], len(kernel) // 2
    first, last = volumes.narrow(axis + 1, 0, 1), volumes.narrow(axis + 1, size - 1, 1)
    repeats = [1] * volumes.ndim
    repeats[axis + 1] = radius
    padded = torch.cat([first.repeat(repeats), volumes, last.repeat(repeats)], dim=axis + 1)
    result = kernel[0] * padded.narrow(axis + 1, 0, size)
    for offset in range(1, len(kernel)):
        result.add_(padded.narrow(axis + 1, offset, size), alpha=kernel[offset])
    return result
