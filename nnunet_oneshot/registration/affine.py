"""Affine registration with SimpleITK: several starts, a coarse-to-fine optimisation, and a check against identity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

# Enough voxels for a 12-parameter transform; more only cost time.
_FINEST_VOXELS = 250_000


@dataclass(frozen=True)
class AffineResult:
    """An affine map and how it was found.

    Attributes:
        matrix: (D + 1, D + 1) float64, fixed voxel coordinates -> moving voxel coordinates, array axis order.
        start: Name of the start that led to it: ``"centre"``, ``"moments"`` or ``"identity"``.
        metric_before: Correlation metric of the two volumes laid centre on centre (-1 is best).
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
    """The map fixed voxel -> moving voxel that lays the centres of both volumes on each other in mm, (D + 1, D + 1)."""
    dim = len(fixed_shape)
    scale = np.asarray(fixed_spacing, float) / np.asarray(moving_spacing, float)
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = np.diag(scale)
    fixed_centre = (np.asarray(fixed_shape) - 1) / 2
    moving_centre = (np.asarray(moving_shape) - 1) / 2
    matrix[:dim, dim] = moving_centre - scale * fixed_centre
    return matrix


def register_affine(
    fixed: np.ndarray, moving: np.ndarray, *, fixed_spacing: Sequence[float], moving_spacing: Sequence[float]
) -> AffineResult:
    """Registers ``moving`` to ``fixed`` with an affine transform.

    Each start (centres of the grids, centres of mass) is optimised coarse to fine; the best by the metric is kept.
    Where nothing beats laying the centres on each other, that is the result. Single-threaded inside, so that equal
    inputs give equal results.

    Args:
        fixed: (C, *shape) image with D = 2 or 3 spatial axes; channels are averaged after z-scoring.
        moving: (C, *shape), any grid.
        fixed_spacing: D voxel edges of ``fixed``, mm, array axis order.
        moving_spacing: D voxel edges of ``moving``, mm, array axis order.

    Returns:
        The map fixed voxel -> moving voxel.
    """
    dim = fixed.ndim - 1
    centred = centre_alignment(fixed.shape[1:], moving.shape[1:], fixed_spacing, moving_spacing)
    fixed_image = _to_sitk(fixed, fixed_spacing)
    moving_image = _to_sitk(moving, moving_spacing)
    baseline = sitk.AffineTransform(dim)
    geometry = sitk.CenteredTransformInitializer(
        fixed_image, moving_image, baseline, sitk.CenteredTransformInitializerFilter.GEOMETRY
    )
    before = _metric(fixed_image, moving_image, geometry)
    if min(min(fixed.shape[1:]), min(moving.shape[1:])) < 4 or not np.isfinite(before):
        return AffineResult(centred, "identity", before, before)

    candidates = [("identity", geometry, before)]
    for name, operation in (
        ("centre", sitk.CenteredTransformInitializerFilter.GEOMETRY),
        ("moments", sitk.CenteredTransformInitializerFilter.MOMENTS),
    ):
        try:
            start = sitk.CenteredTransformInitializer(
                _shifted(fixed_image), _shifted(moving_image), sitk.AffineTransform(dim), operation
            )
            affine = _optimise(fixed_image, moving_image, start, levels=(2, 1))
            candidates.append((name, affine, _metric(fixed_image, moving_image, affine)))
        except RuntimeError:
            # The images stopped overlapping on the way: this start leads nowhere, the others remain.
            continue
    name, best, after = min(candidates, key=lambda candidate: candidate[2] if np.isfinite(candidate[2]) else np.inf)
    if name == "identity" or not np.all(np.isfinite(_voxel_matrix(best, fixed_spacing, moving_spacing))):
        return AffineResult(centred, "identity", before, before)
    return AffineResult(_voxel_matrix(best, fixed_spacing, moving_spacing), name, before, after)


def _to_sitk(image: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """Mean of the z-scored channels as a SimpleITK image at the origin, at most ``_FINEST_VOXELS`` voxels."""
    channels = [(c - c.mean()) / max(float(c.std()), 1e-6) for c in np.asarray(image, np.float32)]
    result = sitk.GetImageFromArray(np.mean(channels, axis=0, dtype=np.float32))
    result.SetSpacing([float(s) for s in reversed(list(spacing))])
    factor = 1
    while result.GetNumberOfPixels() / factor ** image[0].ndim > _FINEST_VOXELS:
        factor += 1
    if factor > 1:
        shrink = [factor if n >= 8 * factor else 1 for n in result.GetSize()]
        result = sitk.BinShrink(result, shrink)
    return result


def _shifted(image: sitk.Image) -> sitk.Image:
    """The image with its minimum at 0, as centres of mass need weights that are not negative."""
    low = float(sitk.GetArrayViewFromImage(image).min())
    return image - low


def _method(fixed_image: sitk.Image) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetNumberOfThreads(1)
    return method


def _metric(fixed_image: sitk.Image, moving_image: sitk.Image, transform: sitk.Transform) -> float:
    method = _method(fixed_image)
    method.SetInitialTransform(transform)
    try:
        return float(method.MetricEvaluate(fixed_image, moving_image))
    except RuntimeError:
        return float("nan")


def _optimise(
    fixed_image: sitk.Image, moving_image: sitk.Image, start: sitk.Transform, *, levels: Sequence[int]
) -> sitk.Transform:
    """Gradient descent on the correlation, coarse to fine; shrink factors never leave an axis under 8 voxels."""
    smallest = min(fixed_image.GetSize())
    factors = [max(1, min(level, smallest // 8)) for level in levels]
    spacing = float(np.mean(fixed_image.GetSpacing()))
    method = _method(fixed_image)
    method.SetShrinkFactorsPerLevel(factors)
    method.SetSmoothingSigmasPerLevel([0.5 * f * spacing for f in factors])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=spacing, minStep=1e-3 * spacing, numberOfIterations=100, relaxationFactor=0.5
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(start, inPlace=False)
    result = method.Execute(fixed_image, moving_image)
    return result.GetNthTransform(0).Downcast() if isinstance(result, sitk.CompositeTransform) else result.Downcast()


def _voxel_matrix(
    transform: sitk.Transform, fixed_spacing: Sequence[float], moving_spacing: Sequence[float]
) -> np.ndarray:
    """A SimpleITK linear transform between mm spaces (x, y, z) as a map between voxels in array axis order."""
    dim = len(fixed_spacing)
    linear = np.array(transform.GetMatrix()).reshape(dim, dim)
    centre = np.array(transform.GetCenter())
    offset = centre + np.array(transform.GetTranslation()) - linear @ centre
    linear, offset = linear[::-1, ::-1], offset[::-1]
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = (
        np.diag(1 / np.asarray(moving_spacing, float)) @ linear @ np.diag(np.asarray(fixed_spacing, float))
    )
    matrix[:dim, dim] = offset / np.asarray(moving_spacing, float)
    return matrix
