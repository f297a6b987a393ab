"""Registration by algorithms of ITK, for comparison: B-splines and demons (SimpleITK), SyN (ANTs, extra ``ants``).

Every algorithm gives a SimpleITK transform from mm in the fixed image to mm in the moving one. `read_places` turns it
into places in the moving image, which is what our own registration gives too. Settings are those of the packages' own
examples and defaults; none was tuned on data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.errors import OneShotError

_SHRINK = (4, 2, 1)
# No level leaves an axis under this many voxels.
_COARSEST_EDGE = 8
# Edge of a cell of the finest B-spline grid, voxels.
_BSPLINE_CELL = 8
_BSPLINE_ITERATIONS = 20
# Voxels of a level on which the metric of the B-splines is computed, regularly spaced where a level has more: its cost
# is their number times that of the coefficients.
_BSPLINE_SAMPLES = 20_000
_DEMONS_ITERATIONS = 50
# Standard deviation of the smoothing of the displacement, voxels: SimpleITK's default.
_DEMONS_SMOOTHING = 1.0


def to_image(volume: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """The mean of the channels of (C, *shape) as a float32 image whose first voxel lies at 0 mm.

    Args:
        volume: (C, *shape) with D = 2 or 3 spatial axes.
        spacing: D voxel edges, mm, array axis order.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.mean(axis=0), dtype=np.float32))
    image.SetSpacing([float(edge) for edge in spacing][::-1])
    return image


def affine_transform(
    matrix: np.ndarray, *, fixed_spacing: Sequence[float], moving_spacing: Sequence[float]
) -> sitk.AffineTransform:
    """A map between voxels as a transform between the mm of two images of `to_image`.

    Args:
        matrix: (D + 1, D + 1), fixed voxel -> moving voxel, array axis order.
        fixed_spacing: D voxel edges, mm, array axis order.
        moving_spacing: Those of the moving image.
    """
    dim = len(matrix) - 1
    in_mm = np.diag([*moving_spacing, 1.0]) @ matrix @ np.diag([*(1 / np.asarray(fixed_spacing, float)), 1.0])
    result = sitk.AffineTransform(dim)
    result.SetMatrix(in_mm[:dim, :dim][::-1, ::-1].ravel().tolist())
    result.SetTranslation(in_mm[:dim, dim][::-1].tolist())
    return result


def read_places(transform: sitk.Transform, fixed: sitk.Image, moving_spacing: Sequence[float]) -> np.ndarray:
    """Where every voxel of the fixed image is read in the moving one.

    Args:
        transform: mm of the fixed image -> mm of the moving one, both from `to_image`.
        fixed: The fixed image.
        moving_spacing: D voxel edges of the moving image, mm, array axis order.

    Returns:
        (D, *fixed shape) float32, voxel coordinates of the moving image, array axis order.
    """
    field = sitk.TransformToDisplacementField(
        transform, sitk.sitkVectorFloat64, fixed.GetSize(), fixed.GetOrigin(), fixed.GetSpacing(), fixed.GetDirection()
    )
    places = np.moveaxis(sitk.GetArrayFromImage(field), -1, 0)[::-1]
    axes = (-1, *[1] * fixed.GetDimension())
    places = places + np.indices(places.shape[1:]) * np.reshape(fixed.GetSpacing()[::-1], axes)
    return (places / np.reshape(moving_spacing, axes)).astype(np.float32)


def register_bspline(
    fixed: sitk.Image, moving: sitk.Image, affine: sitk.Transform, *, mutual_information: bool
) -> sitk.Transform:
    """Cubic B-splines after an affine transform, three levels, L-BFGS on correlation or Mattes mutual information.

    Args:
        fixed: Fixed image.
        moving: Moving image.
        affine: Fixed mm -> moving mm.
        mutual_information: Whether the contrasts differ; else correlation is maximised.
    """
    factors = _shrink_factors(fixed)
    method = sitk.ImageRegistrationMethod()
    if mutual_information:
        method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    else:
        method.SetMetricAsCorrelation()
    voxels = fixed.GetNumberOfPixels()
    shares = [min(1.0, _BSPLINE_SAMPLES * factor ** fixed.GetDimension() / voxels) for factor in factors]
    if min(shares) < 1:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentagePerLevel(shares)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel(factors)
    method.SetSmoothingSigmasPerLevel([0.5 * factor if factor > 1 else 0.0 for factor in factors])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    # No test of convergence: that of LBFGS2 divides by the metric, which is negative, and stops at once.
    method.SetOptimizerAsLBFGS2(numberOfIterations=_BSPLINE_ITERATIONS, lineSearchMaximumEvaluations=10)
    method.SetMovingInitialTransform(affine)
    doublings = [1, 2, 4]
    cells = [max(1, round(n / (doublings[-1] * _BSPLINE_CELL))) for n in fixed.GetSize()]
    splines = sitk.BSplineTransformInitializer(fixed, cells)
    method.SetInitialTransformAsBSpline(splines, inPlace=True, scaleFactors=doublings)
    method.Execute(fixed, moving)
    return sitk.CompositeTransform([affine, splines])


def register_demons(fixed: sitk.Image, moving: sitk.Image, affine: sitk.Transform) -> sitk.Transform:
    """Fast symmetric forces demons after an affine transform and histogram matching, three levels.

    Args:
        fixed: Fixed image.
        moving: Moving image, of the same contrast.
        affine: Fixed mm -> moving mm.
    """
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(fixed)
    resampler.SetTransform(affine)
    resampler.SetInterpolator(sitk.sitkLinear)
    # Beyond the moving image the nearest voxel counts, as in our own warp.
    resampler.UseNearestNeighborExtrapolatorOn()
    aligned = sitk.HistogramMatching(
        resampler.Execute(moving), fixed, numberOfHistogramLevels=256, numberOfMatchPoints=7
    )
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(_DEMONS_ITERATIONS)
    demons.SetSmoothDisplacementField(True)
    demons.SetStandardDeviations(_DEMONS_SMOOTHING)
    field = None
    for factor in _shrink_factors(fixed):
        pair = [_shrunken(image, factor) for image in (fixed, aligned)]
        if field is None:
            field = demons.Execute(*pair)
        else:
            resampler = sitk.ResampleImageFilter()
            resampler.SetReferenceImage(pair[0])
            resampler.UseNearestNeighborExtrapolatorOn()
            field = demons.Execute(*pair, resampler.Execute(field))
    return sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(field)])


def register_syn(fixed: sitk.Image, moving: sitk.Image, *, kind: str, seed: int, deterministic: bool) -> sitk.Transform:
    """ANTs' affine and deformable registration with the default settings of antspyx.

    Args:
        fixed: Fixed image.
        moving: Moving image.
        kind: ANTs' ``type_of_transform``: ``"SyN"`` or ``"SyNCC"``.
        seed: Of ANTs' random sampling.
        deterministic: Whether ANTs is held to one thread; else it has as many as ITK is told, and results vary.

    Raises:
        OneShotError: antspyx is not installed.
    """
    ants = require_ants()
    ants.config.set_ants_deterministic(on=deterministic, seed_value=seed + 1)
    # ANTs starts from centres of mass, which need weights that are not negative.
    arrays = [sitk.GetArrayFromImage(image) for image in (fixed, moving)]
    images = [
        ants.from_numpy(np.ascontiguousarray((array - array.min()).T), spacing=image.GetSpacing())
        for array, image in zip(arrays, (fixed, moving), strict=True)
    ]
    with tempfile.TemporaryDirectory(prefix="nnunet_oneshot_syn_") as folder:
        found = ants.registration(*images, type_of_transform=kind, outprefix=str(Path(folder) / "pair_"))
        # ANTs names the warp first and applies the affine map to the image first; SimpleITK takes the same order.
        stages = [_read_transform(path) for path in reversed(found["fwdtransforms"])]
    return sitk.CompositeTransform(stages)


def require_ants():
    """The module ``ants``.

    Raises:
        OneShotError: antspyx is not installed.
    """
    try:
        import ants
    except ImportError as error:
        raise OneShotError(
            "Method syn needs ANTs, which is not installed: run `pip install nnunet_oneshot[ants]`, or leave the "
            "method out."
        ) from error
    return ants


def _read_transform(path: str) -> sitk.Transform:
    if path.endswith(".mat"):
        return sitk.ReadTransform(path)
    return sitk.DisplacementFieldTransform(sitk.ReadImage(path, sitk.sitkVectorFloat64))


def _shrink_factors(fixed: sitk.Image) -> list[int]:
    return [max(1, min(factor, min(fixed.GetSize()) // _COARSEST_EDGE)) for factor in _SHRINK]


def _shrunken(image: sitk.Image, factor: int) -> sitk.Image:
    if factor == 1:
        return image
    smooth = sitk.SmoothingRecursiveGaussian(image, [0.5 * factor * edge for edge in image.GetSpacing()])
    return sitk.Shrink(smooth, [factor] * image.GetDimension())
