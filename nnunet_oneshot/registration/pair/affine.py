"""Affine registration with SimpleITK: several starts, a coarse-to-fine optimisation, and a check against identity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.intensities import standardised

# Enough voxels for a 12-parameter transform; more only cost time.
_FINEST_VOXELS = 250_000
# The optimisation failed if a map stretches or shrinks any direction by more than this factor.
_LARGEST_STRETCH = 2.0
# Points at which each optimisation step evaluates the metric, drawn with a fixed seed.
_SAMPLES = 10_000


@dataclass(frozen=True)
class AffineResult:
    """An affine map and how it was found.

    Attributes:
        matrix: (D + 1, D + 1) float64, fixed voxel coordinates -> moving voxel coordinates, array axis order.
        start: Name of the start that led to it: ``"initial"``, ``"centre"``, ``"moments"``, or ``"identity"`` if no
            optimisation improved on the initial alignment.
        metric_before: Metric of the two volumes before any optimisation (smaller is better; correlation: -1 is best).
        metric_after: The same metric after registration.
    """

    matrix: np.ndarray
    start: str
    metric_before: float
    metric_after: float


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
) -> AffineResult:
    """Registers ``moving`` to ``fixed`` with an affine transform.

    Each start (the initial map if given, centres of the grids, centres of mass) is optimised at half resolution. The
    start with the best metric is then optimised at full resolution. Maps that stretch or shrink any direction more
    than twofold are discarded. If no optimised map improves on the initial map and on aligned centres, the better of
    those two is the result. Runs single-threaded, so that equal inputs give equal results.

    Args:
        fixed: (C, *shape) image with D = 2 or 3 spatial axes; channels are standardised, then averaged.
        moving: (C, *shape), any grid.
        fixed_spacing: D voxel edges of ``fixed``, mm, array axis order.
        moving_spacing: D voxel edges of ``moving``, mm, array axis order.
        initial: (D + 1, D + 1) rigid map fixed voxel -> moving voxel, for example from the file headers. It adds a
            start, and all other starts use its rotation. None: the axes of both volumes point the same way.
        metric: ``"correlation"``, or ``"mutual_information"`` (Mattes) for images of different contrast.

    Returns:
        The map fixed voxel -> moving voxel.
    """
    dim = fixed.ndim - 1
    fixed_frame = np.diag([*map(float, fixed_spacing), 1.0])
    moving_frame = (
        np.diag([*map(float, moving_spacing), 1.0]) if initial is None else fixed_frame @ np.linalg.inv(initial)
    )
    centred = np.linalg.inv(moving_frame) @ fixed_frame
    centred[:dim, dim] = _centre(moving) - centred[:dim, :dim] @ _centre(fixed)
    pair = _ImagePair(_to_sitk(fixed, fixed_frame), _to_sitk(moving, moving_frame), metric)
    geometry = sitk.CenteredTransformInitializer(
        pair.fixed, pair.moving, sitk.AffineTransform(dim), sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    baselines = [(centred, pair.evaluate(geometry))]
    given = sitk.AffineTransform(dim)
    if initial is not None:
        baselines.append((np.asarray(initial, float), pair.evaluate(given)))
    unoptimised, before = min(baselines, key=lambda baseline: _order(baseline[1]))
    unchanged = AffineResult(unoptimised, "identity", before, before)
    if min(min(fixed.shape[1:]), min(moving.shape[1:])) < 4 or not np.isfinite(before):
        return unchanged
    starts = [] if initial is None or np.allclose(initial, centred, atol=1e-3) else [("initial", given)]
    # Identity comes first, so that it wins ties: nothing moves unless the metric improves.
    candidates = [("identity", geometry, before), *_optimised(pair, [*starts, *_centred_starts(pair)])]
    name, best, after = min(candidates, key=lambda candidate: _order(candidate[2]))
    if name == "identity":
        return unchanged
    return AffineResult(_voxel_matrix(best, fixed_frame, moving_frame), name, before, after)


# Name of its start, transform and metric.
_Candidate = tuple[str, sitk.AffineTransform, float]


@dataclass(frozen=True)
class _ImagePair:
    """Two images and the metric to optimise between them."""

    fixed: sitk.Image
    moving: sitk.Image
    metric: str

    def evaluate(self, transform: sitk.Transform) -> float:
        """The metric at full resolution; NaN where it cannot be computed."""
        method = _method(self.metric)
        method.SetInitialTransform(transform)
        try:
            return float(method.MetricEvaluate(self.fixed, self.moving))
        except RuntimeError:
            return float("nan")


def _centred_starts(pair: _ImagePair) -> list[tuple[str, sitk.AffineTransform]]:
    """Starts that align the centres of the grids, and the centres of mass."""
    filters = sitk.CenteredTransformInitializerFilter
    starts = []
    for name, operation in (("centre", filters.GEOMETRY), ("moments", filters.MOMENTS)):
        with contextlib.suppress(RuntimeError):
            # A constant image has no centre of mass.
            start = sitk.CenteredTransformInitializer(
                _shifted(pair.fixed), _shifted(pair.moving), sitk.AffineTransform(pair.fixed.GetDimension()), operation
            )
            starts.append((name, start))
    return starts


def _optimised(pair: _ImagePair, starts: Sequence[tuple[str, sitk.AffineTransform]]) -> list[_Candidate]:
    """All starts optimised at half resolution, and the best of these at full resolution."""
    found = [result for start in starts if (result := _descended(pair, start, shrink=2))]
    if found:
        name, transform, _ = min(found, key=lambda candidate: _order(candidate[2]))
        finest = _descended(pair, (name, transform), shrink=1)
        found += [finest] if finest else []
    return found


def _descended(pair: _ImagePair, start: tuple[str, sitk.AffineTransform], *, shrink: int) -> _Candidate | None:
    """The result of optimising from one start; None if it fails or is implausible."""
    name, transform = start
    try:
        affine = _optimise(pair, transform, shrink=shrink)
    except RuntimeError:
        # The images no longer overlap; the other starts remain.
        return None
    return (name, affine, pair.evaluate(affine)) if _is_plausible(affine) else None


def _centre(image: np.ndarray) -> np.ndarray:
    return (np.array(image.shape[1:]) - 1) / 2


def _order(value: float) -> float:
    """Sorting key of a metric: values that could not be computed come last."""
    return value if np.isfinite(value) else np.inf


def _to_sitk(image: np.ndarray, frame: np.ndarray) -> sitk.Image:
    """Mean of the standardised channels as a SimpleITK image of at most ``_FINEST_VOXELS`` voxels.

    ``frame`` (D + 1, D + 1) maps voxels to mm, both in array axis order.
    """
    dim = image.ndim - 1
    result = sitk.GetImageFromArray(np.asarray(np.mean(standardised(image), axis=0, dtype=np.float32)))
    spacing = np.linalg.norm(frame[:dim, :dim], axis=0)
    result.SetSpacing(spacing[::-1].tolist())
    result.SetDirection((frame[:dim, :dim] / spacing)[::-1, ::-1].ravel().tolist())
    result.SetOrigin(frame[:dim, dim][::-1].tolist())
    factor = 1
    while result.GetNumberOfPixels() / factor ** image[0].ndim > _FINEST_VOXELS:
        factor += 1
    if factor > 1:
        shrink = [factor if n >= 8 * factor else 1 for n in result.GetSize()]
        result = sitk.BinShrink(result, shrink)
    return result


def _shifted(image: sitk.Image) -> sitk.Image:
    """The image with its minimum at 0, since centres of mass need non-negative weights."""
    low = float(sitk.GetArrayViewFromImage(image).min())
    return image - low


def _method(metric: str) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    if metric == "mutual_information":
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    else:
        method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfThreads(1)
    return method


def _optimise(pair: _ImagePair, start: sitk.AffineTransform, *, shrink: int) -> sitk.AffineTransform:
    """Gradient descent on the metric at one resolution; shrinking never leaves an axis under 8 voxels."""
    fixed_image = pair.fixed
    factor = max(1, min(shrink, min(fixed_image.GetSize()) // 8))
    spacing = float(np.mean(fixed_image.GetSpacing()))
    method = _method(pair.metric)
    method.SetShrinkFactorsPerLevel([factor])
    method.SetSmoothingSigmasPerLevel([0.5 * factor * spacing])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    voxels = fixed_image.GetNumberOfPixels() / factor ** fixed_image.GetDimension()
    if voxels > _SAMPLES:
        method.SetMetricSamplingStrategy(sitk.ImageRegistrationMethod.RANDOM)
        method.SetMetricSamplingPercentage(_SAMPLES / voxels, seed=1)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=spacing, minStep=1e-2 * spacing, numberOfIterations=100, relaxationFactor=0.5
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=False)
    result = method.Execute(fixed_image, pair.moving)
    return result.GetNthTransform(0).Downcast() if isinstance(result, sitk.CompositeTransform) else result.Downcast()


def _is_plausible(transform: sitk.AffineTransform) -> bool:
    """Whether a linear transform between mm spaces is finite and stretches no direction too much."""
    dim = transform.GetDimension()
    linear = np.array(transform.GetMatrix()).reshape(dim, dim)
    if not np.all(np.isfinite([*transform.GetMatrix(), *transform.GetTranslation()])):
        return False
    stretches = np.linalg.svd(linear, compute_uv=False)
    return bool(stretches[0] <= _LARGEST_STRETCH and stretches[-1] >= 1 / _LARGEST_STRETCH)


def _voxel_matrix(transform: sitk.AffineTransform, fixed_frame: np.ndarray, moving_frame: np.ndarray) -> np.ndarray:
    """A SimpleITK linear transform between mm spaces (x, y, z) as a map between voxels in array axis order."""
    dim = len(fixed_frame) - 1
    linear = np.array(transform.GetMatrix()).reshape(dim, dim)
    centre = np.array(transform.GetCenter())
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = linear[::-1, ::-1]
    matrix[:dim, dim] = (centre + np.array(transform.GetTranslation()) - linear @ centre)[::-1]
    return np.linalg.inv(moving_frame) @ matrix @ fixed_frame
