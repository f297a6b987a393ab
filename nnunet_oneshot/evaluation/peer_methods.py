"""Registration by packages of other groups, for comparison: Greedy and ConvexAdam (extra ``peers``).

As in `itk_methods`, every function gives a SimpleITK transform from mm in the fixed image to mm in the moving one.
Settings are those of the packages' own quick start or defaults; none was tuned on data.
"""

from __future__ import annotations

import importlib
import io
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.errors import OneShotError

# Greedy's quick start: iterations from the finest level to the coarsest, each of half the resolution, and the radius of
# the weighted local correlation, voxels.
_GREEDY_ITERATIONS = (10, 50, 100)
_GREEDY_RADIUS = 2
# Greedy smooths each level by a filter that needs as many voxels along each axis.
_GREEDY_SMALLEST = 4
# ConvexAdam's default spacing of its grid, voxels. It averages over three nodes along each axis.
_CONVEXADAM_GRID = 6
_CONVEXADAM_SMALLEST = 3 * _CONVEXADAM_GRID


def require_greedy() -> ModuleType:
    """The module ``picsl_greedy``.

    Raises:
        OneShotError: It is not installed.
    """
    return _required("picsl_greedy", "Greedy", "greedy")


def require_convexadam() -> ModuleType:
    """The module ``convexAdam.convex_adam_MIND``.

    Raises:
        OneShotError: It is not installed.
    """
    # When it is imported the package silences all warnings of the process.
    with warnings.catch_warnings():
        return _required("convexAdam.convex_adam_MIND", "ConvexAdam", "convexadam")


def register_greedy(
    fixed: sitk.Image, moving: sitk.Image, affine: sitk.AffineTransform | None, *, seed: int, threads: int
) -> sitk.Transform:
    """Greedy by its quick start: stationary velocities, weighted local correlation.

    Source: Yushkevich et al., Alzheimer's & Dementia 12(7), 2016, and https://greedy.readthedocs.io.

    Args:
        fixed: Fixed image of 2 or 3 axes, from `nnunet_oneshot.evaluation.itk_methods.to_image`.
        moving: Moving image, from there too.
        affine: Fixed mm -> moving mm, or None: Greedy's own affine stage (12 degrees of freedom, from the centres of
            the images), by the same metric and iterations.
        seed: Of Greedy's random sampling and noise.
        threads: Results of more than one thread may vary.

    Raises:
        OneShotError: picsl_greedy is not installed, an axis has fewer than 4 voxels, or Greedy failed or gave places
            that are not finite.
    """
    package = require_greedy()
    dim = fixed.GetDimension()
    tool = package.Greedy2D() if dim == 2 else package.Greedy3D()
    iterations = _greedy_iterations([*fixed.GetSize(), *moving.GetSize()])
    # The seed 0 would stand for the time of day.
    shared = f"-i fixed moving -m WNCC {'x'.join([str(_GREEDY_RADIUS)] * dim)} -n {iterations} -threads {threads}"
    shared += f" -seed {seed + 1} -V 0"

    def run(command: str, **objects: object) -> None:
        messages = io.StringIO()
        try:
            tool.execute(f"{shared} {command}", messages, messages, **objects)
        except RuntimeError as error:
            found = " ".join(str(error).split()).rstrip(".")
            raise OneShotError(f"Greedy failed on this pair ({found}): leave its methods out.") from error

    if affine is None:
        run("-a -dof 12 -ia-image-centers -o affine", fixed=fixed, moving=moving, affine=None)
        affine = _from_ras(_finite("Greedy", tool["affine"]))
    with tempfile.TemporaryDirectory(prefix="nnunet_oneshot_greedy_") as folder:
        # As a file: picsl_greedy 1.4.0.3 takes no matrix from memory that is not its own.
        matrix = Path(folder) / "affine.mat"
        np.savetxt(matrix, _in_ras(affine))
        run(f'-sv -it "{matrix}" -o warp', fixed=fixed, moving=moving, warp=None)
    # The affine map was applied to the image first, so it comes last on the way from fixed to moving.
    warp = tool["warp"]
    _finite("Greedy", sitk.GetArrayFromImage(warp))
    return sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(warp)])


def register_convexadam(
    fixed: sitk.Image, moving: sitk.Image, affine: sitk.AffineTransform, *, device: str
) -> sitk.Transform:
    """ConvexAdam on MIND features with its defaults, after an affine transform (Siebert et al., IEEE TMI 2024).

    It expects two volumes on one grid and searches as many voxels along each axis (24). Both images are resampled to a
    grid over the fixed image whose voxels are cubes of the volume of the fixed image's voxels, with a size that the
    spacing of its own grid (6 voxels) divides. Beyond an image its nearest voxel counts. It has no affine stage.

    Args:
        fixed: Fixed image of 3 axes, from `nnunet_oneshot.evaluation.itk_methods.to_image`.
        moving: Moving image, from there too.
        affine: Fixed mm -> moving mm.
        device: Where it runs; it takes half precision on CUDA, which is its default there.

    Raises:
        OneShotError: convexAdam is not installed, the images have two axes, or it gave places that are not finite.
    """
    import torch

    tool = require_convexadam()
    if fixed.GetDimension() != 3:
        raise OneShotError(
            "Method convexadam registers volumes, and these images are single slices: leave the method out, or choose "
            "greedy, which registers slices too."
        )
    grid = _cubic_grid(fixed)
    volumes = [sitk.GetArrayFromImage(_resampled(fixed, grid, sitk.Transform(3, sitk.sitkIdentity)))]
    volumes.append(sitk.GetArrayFromImage(_resampled(moving, grid, affine)))
    place = torch.device(device)
    precision = torch.float16 if place.type == "cuda" else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        displacement = tool.convex_adam_pt(*volumes, grid_sp=_CONVEXADAM_GRID, device=place, dtype=precision)
    # It is in voxels and array axis order; ITK has it in mm and begins with the last axis.
    in_mm = _finite("ConvexAdam", displacement)[..., ::-1] * np.asarray(grid.GetSpacing())
    field = sitk.GetImageFromArray(np.ascontiguousarray(in_mm, dtype=np.float64), isVector=True)
    field.CopyInformation(grid)
    return sitk.CompositeTransform([affine, sitk.DisplacementFieldTransform(field)])


def _required(module: str, tool: str, method: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise OneShotError(
            f"Method {method} needs {tool}, which is not installed: run `pip install nnunet_oneshot[peers]`, or leave "
            f"the method out."
        ) from error


def _finite(tool: str, values: np.ndarray) -> np.ndarray:
    """The values that a package gave.

    Raises:
        OneShotError: Some are not finite.
    """
    if not np.isfinite(values).all():
        raise OneShotError(
            f"{tool} gave places that are not finite, as it does for images without any structure: look at the images "
            f"of this pair, or leave the method out."
        )
    return values


def _greedy_iterations(sizes: list[int]) -> str:
    """Greedy's iterations from the coarsest level to the finest, without levels for which an axis is too short."""
    shortest = min(sizes)
    if shortest < _GREEDY_SMALLEST:
        raise OneShotError(
            f"Method greedy needs {_GREEDY_SMALLEST} voxels along each axis, and one of these images has {shortest}: "
            f"leave the method out."
        )
    levels = [n for level, n in enumerate(_GREEDY_ITERATIONS) if shortest // 2**level >= _GREEDY_SMALLEST]
    return "x".join(map(str, reversed(levels)))


def _signs(dim: int) -> np.ndarray:
    """What turns ITK's axes (to the left, to the back, up) into those of Greedy's matrices (right, front, up)."""
    return np.diag([-1.0, -1.0, *[1.0] * (dim - 1)])


def _in_ras(transform: sitk.AffineTransform) -> np.ndarray:
    """(D + 1, D + 1): an affine transform as the matrix that Greedy reads."""
    dim = transform.GetDimension()
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = np.reshape(transform.GetMatrix(), (dim, dim))
    matrix[:dim, dim] = transform.TransformPoint([0.0] * dim)
    return _signs(dim) @ matrix @ _signs(dim)


def _from_ras(matrix: np.ndarray) -> sitk.AffineTransform:
    """The affine transform of a matrix (D + 1, D + 1) of Greedy."""
    dim = len(matrix) - 1
    turned = _signs(dim) @ matrix @ _signs(dim)
    transform = sitk.AffineTransform(dim)
    transform.SetMatrix(turned[:dim, :dim].ravel().tolist())
    transform.SetTranslation(turned[:dim, dim].tolist())
    return transform


def _cubic_grid(image: sitk.Image) -> sitk.Image:
    """A grid of cubes over an image, of a size that ConvexAdam's grid divides."""
    edge = float(np.prod(image.GetSpacing())) ** (1 / 3)
    spans = [(size - 1) * spacing for size, spacing in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    # A hair less, so that rounding adds no voxel.
    sizes = [int(np.ceil(span / edge - 1e-6)) + 1 for span in spans]
    rounded = [max(_CONVEXADAM_SMALLEST, -(-size // _CONVEXADAM_GRID) * _CONVEXADAM_GRID) for size in sizes]
    grid = sitk.Image(rounded, sitk.sitkFloat32)
    grid.SetSpacing([edge] * 3)
    grid.SetOrigin(image.GetOrigin())
    return grid


def _resampled(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform) -> sitk.Image:
    resampler = sitk.ResampleImageFilter()
    resampler.SetReferenceImage(grid)
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.UseNearestNeighborExtrapolatorOn()
    return resampler.Execute(image)
