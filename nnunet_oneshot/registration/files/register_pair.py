"""Registers two image files, in any orientation and on any grids, and writes what others can read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from nnunet_oneshot import __version__
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.data.headers import carry_geometry
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_folder, is_occupied, save_json_atomic, writing
from nnunet_oneshot.registration.files.volumes import Volume, header_alignment, read_labels, read_volume
from nnunet_oneshot.registration.pair.figure import registration_figure
from nnunet_oneshot.registration.pair.functional import identity_grid, sample_at, transform_points
from nnunet_oneshot.registration.pair.grid import RegistrationGrid
from nnunet_oneshot.registration.pair.quality import is_ambiguous
from nnunet_oneshot.registration.pair.registrar import register_arrays
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.similarities import similarity_loss
from nnunet_oneshot.registration.pair.warp import atlas_coordinates, sample_labels

# Local correlation; of a good start a little is lost to smoothness and resampling.
_NOTABLE = 0.01
_FOLDING_LIMIT = 1e-4
_LEAST_OVERLAP = 0.5


@dataclass(frozen=True)
class VolumeRegistration:
    """How a moving image is warped onto a fixed one.

    Attributes:
        fixed: The image that stays.
        moving: The image that is warped.
        registration: Affine and velocity field, fixed voxel -> moving voxel.
        initial: (4, 4) map fixed voxel -> moving voxel before registration.
        locations: (3, Z, Y, X) float32, where each voxel of the fixed image lies in the moving one, its voxels.
        quality: Figures; see ``register_pair``.
    """

    fixed: Volume
    moving: Volume
    registration: Registration
    initial: np.ndarray
    locations: torch.Tensor
    quality: dict

    def outside(self) -> np.ndarray:
        """(Z, Y, X), where the fixed image shows what the moving one does not."""
        return _outside(self.locations, self.moving.shape)

    def warped(self) -> np.ndarray:
        """The moving image on the fixed grid, (C, Z, Y, X) float32; its lowest value where it was not observed."""
        return _resampled(self.moving.array, self.locations)

    def warped_labels(self, labels: np.ndarray) -> np.ndarray:
        """Labels (1, Z, Y, X) of the moving image on the fixed grid, (Z, Y, X) int64; 0 where it was not observed.

        Each voxel gets the label with the highest linearly interpolated indicator.
        """
        values, places = np.unique(labels, return_inverse=True)
        index = torch.from_numpy(places.reshape(labels.shape).astype(np.int16))
        warped = values[sample_labels(index, self.locations)[0].numpy()]
        warped[self.outside()] = 0
        return warped

    def displacement_mm(self) -> np.ndarray:
        """Displacement as ITK has it, (Z, Y, X, D): point of the moving image less point of the fixed one, in LPS mm,
        components in the order x, y, z. D is the number of axes of the fixed file."""
        target = transform_points(torch.from_numpy(self.moving.frame), self.locations[None].double())[0]
        source = transform_points(torch.from_numpy(self.fixed.frame), identity_grid(self.fixed.shape)[None].double())[0]
        return (target - source).flip(0)[: self.fixed.dimension].movedim(0, -1).float().numpy()

    def displacement_image(self) -> sitk.Image:
        """`displacement_mm` as an image for SimpleITK's ``DisplacementFieldTransform``."""
        field = self.displacement_mm()
        if self.fixed.dimension == 3 and self.fixed.shape[0] == 1:
            # ITK reads a NIfTI field of one slice as 2D, and then refuses its three components.
            image = sitk.GetImageFromArray(np.repeat(field, 2, axis=0), isVector=True)
            image.SetSpacing(self.fixed.image.GetSpacing())
            image.SetOrigin(self.fixed.image.GetOrigin())
            image.SetDirection(self.fixed.image.GetDirection())
            return image
        return self.fixed.as_image(field, is_vector=True)

    def affine_mm(self) -> np.ndarray:
        """The affine part in LPS mm, fixed point -> moving point, (D + 1, D + 1), components in the order x, y, z."""
        matrix = self.moving.frame @ self.registration.affine @ np.linalg.inv(self.fixed.frame)
        order = [*range(2, 2 - self.fixed.dimension, -1), 3]
        return matrix[np.ix_(order, order)]


def register_volumes(
    fixed: Volume,
    moving: Volume,
    *,
    config: RegistrationConfig | None = None,
    device: torch.device | str = "cpu",
    labels: np.ndarray | None = None,
) -> VolumeRegistration:
    """Registers a volume to another through the space their headers share.

    Args:
        fixed: The image that stays.
        moving: The image that is warped.
        config: Settings; None for the defaults.
        device: Where the deformable stage runs.
        labels: (1, Z, Y, X) labels of the moving image, around which quality is judged too.

    Raises:
        OneShotError: The two differ in number of axes or channels.
    """
    if fixed.dimension != moving.dimension or (fixed.shape[0] == 1) != (moving.shape[0] == 1):
        raise OneShotError(
            f"{fixed.paths[0]} has size {fixed.image.GetSize()} and {moving.paths[0]} {moving.image.GetSize()}: a 2D "
            f"image and a volume cannot be registered. Give two images, two slices or two volumes."
        )
    if len(fixed.array) != len(moving.array):
        raise OneShotError(
            f"The fixed image has {len(fixed.array)} channel(s) ({', '.join(fixed.paths)}), the moving image "
            f"{len(moving.array)} ({', '.join(moving.paths)}): give the same channels of both, in the same order."
        )
    started = time.perf_counter()
    config = config or RegistrationConfig(method="refine")
    initial, by_headers = header_alignment(fixed, moving)
    registration = register_arrays(
        moving.array,
        fixed.array,
        atlas_spacing=moving.spacing,
        case_spacing=fixed.spacing,
        initial=initial,
        config=config,
        device=device,
        atlas_labels=labels,
    )
    seconds = time.perf_counter() - started
    locations = atlas_coordinates(registration)
    measured = dict(registration.quality)
    quality = {
        "similarity_before": _initial_similarity(fixed, moving, initial, config),
        "similarity_affine": measured.pop("similarity_before"),
        **measured,
        "overlap": round(1 - float(_outside(locations, moving.shape).mean()), 6),
        "start": "headers" if by_headers else "centres",
        "seconds": round(seconds, 3),
    }
    return VolumeRegistration(fixed, moving, registration, initial, locations, quality)


def register_pair(
    fixed: str | Sequence[str],
    moving: str | Sequence[str],
    *,
    out: str | Path,
    labels: str | None = None,
    config: RegistrationConfig | None = None,
    device: str = "cpu",
    log: Callable[[str], None] = print,
) -> VolumeRegistration:
    """What ``nnunet_oneshot register-pair`` does: registers two files and writes the results into a new folder.

    ``warped.nii.gz`` (``warped_0000.nii.gz``, ... for several channels) and ``warped_labels.nii.gz`` lie on the fixed
    grid. ``displacement.nii.gz`` is for SimpleITK's ``DisplacementFieldTransform`` and turns the moving file into the
    warped one. ``figure.png`` shows the moving image before registration, the fixed image, the warped image, the warped
    labels on the fixed image, and a grid of the moving image. ``quality.json`` holds squared local correlations before
    registration, after its affine stage and at its end (with labels also that around them), folding and Jacobian
    statistics, inverse consistency, the share of fixed voxels that the moving image shows (``overlap``), seconds, and
    the peak memory of the process in MiB.

    Args:
        fixed: Path, or one path a channel (as a list, or joined by commas).
        moving: The same of the image that is warped.
        out: A folder that does not exist or is empty.
        labels: Labels of the moving image, on its grid.
        config: Settings; None for the defaults.
        device: Where the deformable stage runs.
        log: Called with sentences about what was found.

    Raises:
        OneShotError: An input cannot be used, or ``out`` holds files.
    """
    target = Path(out).resolve()
    if is_occupied(target):
        raise OneShotError(f"{out} exists and is not empty: name a new folder, or remove it first.")
    usable_device(device)
    fixed_volume, moving_volume = read_volume(fixed, "fixed"), read_volume(moving, "moving")
    label_map, label_type = (None, None) if labels is None else read_labels(labels, moving_volume)
    result = register_volumes(fixed_volume, moving_volume, config=config, device=device, labels=label_map)
    quality = {
        **result.quality,
        "peak_memory_mib": _peak_memory_mib(),
        "device": device,
        "fixed": list(fixed_volume.paths),
        "moving": list(moving_volume.paths),
        "affine_lps_mm": result.affine_mm().round(9).tolist(),
        "warnings": [*fixed_volume.warnings, *moving_volume.warnings, *quality_warnings(result.quality)],
        "version": __version__,
    }
    with writing(target), atomic_folder(target) as folder:
        warped = result.warped()
        names = ["warped"] if len(warped) == 1 else [f"warped_{channel:04d}" for channel in range(len(warped))]
        for name, channel in zip(names, warped, strict=True):
            _write(fixed_volume, channel, folder / f"{name}.nii.gz")
        warped_labels = None
        if label_map is not None:
            warped_labels = result.warped_labels(label_map)
            _write(fixed_volume, warped_labels.astype(label_type), folder / "warped_labels.nii.gz")
        sitk.WriteImage(result.displacement_image(), str(folder / "displacement.nii.gz"), True)
        _draw(folder / "figure.png", result, warped, label_map, warped_labels)
        save_json_atomic(quality, folder / "quality.json")
    for warning in quality["warnings"]:
        log(f"Warning: {warning}")
    log(
        f"Registered in {quality['seconds']:.1f} s: squared local correlation {quality['similarity_before']:.3f} -> "
        f"{quality['similarity_affine']:.3f} (affine) -> {quality['similarity_after']:.3f}, folding "
        f"{100 * quality['folding']:.4f} % of voxels. Results are in {target}."
    )
    return result


def _write(volume: Volume, array: np.ndarray, path: Path) -> None:
    """Writes an array on the grid of a volume, with the volume's own header where that is NIfTI."""
    sitk.WriteImage(volume.as_image(array), str(path), True)
    carry_geometry(volume.paths[0], path)


def _resampled(image: np.ndarray, locations: torch.Tensor) -> np.ndarray:
    """(C, *in) read linearly at (3, *out) voxel coordinates; a channel's lowest value outside."""
    sampled = sample_at(torch.from_numpy(np.ascontiguousarray(image, np.float32))[None], locations[None])[0].numpy()
    outside = _outside(locations, image.shape[1:])
    for channel, source in zip(sampled, image, strict=True):
        channel[outside] = source.min()
    return sampled


def _outside(locations: torch.Tensor, shape: Sequence[int]) -> np.ndarray:
    sizes = torch.tensor(list(shape), dtype=locations.dtype).view(-1, *[1] * (locations.ndim - 1))
    return ((locations < -0.5) | (locations > sizes - 0.5)).any(0).numpy()


def _initial_similarity(fixed: Volume, moving: Volume, initial: np.ndarray, config: RegistrationConfig) -> float:
    """Squared local correlation before registration, on the grid on which the registration's own is measured."""
    flat = moving.shape[0] == 1
    arrays = [volume.array[:, 0] if flat else volume.array for volume in (moving, fixed)]
    grid = RegistrationGrid.over(arrays[0].shape[1:], moving.spacing[1:] if flat else moving.spacing, config.max_voxels)
    image, mask = grid.fixed_image(arrays[1], initial[1:, 1:] if flat else initial)
    loss = similarity_loss(grid.atlas_image(arrays[0]), image, mask, similarity="lncc", kernel=config.lncc_kernel)
    return round(-float(loss), 6)


def _draw(
    path: Path,
    result: VolumeRegistration,
    warped: np.ndarray,
    labels: np.ndarray | None,
    warped_labels: np.ndarray | None,
) -> None:
    from matplotlib.image import imsave

    before = transform_points(torch.from_numpy(result.initial).float(), identity_grid(result.fixed.shape)[None])[0]
    seg = np.zeros(result.fixed.shape, np.int64)
    if labels is not None:
        sampled = sample_at(
            torch.from_numpy(labels.astype(np.float32))[None], before[None], mode="nearest", padding="zeros"
        )
        seg = sampled[0, 0].numpy().astype(np.int64)
    figure = registration_figure(
        atlas=_resampled(result.moving.array[:1], before)[0],
        atlas_seg=seg,
        case=result.fixed.array[0],
        warped=warped[0],
        warped_seg=np.zeros_like(seg) if warped_labels is None else warped_labels,
        displacement=result.locations.numpy(),
    )
    imsave(path, figure)


def quality_warnings(quality: Mapping[str, Any], *, affine: bool = True) -> list[str]:
    """What makes a registration doubtful, judged by its own figures; clauses that end in a full stop.

    Args:
        quality: Figures of a registration; those of a pair of files know the overlap too.
        affine: Whether an affine map was looked for.
    """
    found = []
    if affine and quality["affine_start"] == "identity":
        found.append("the affine stage found nothing better than the alignment it began with, which was kept.")
    if is_ambiguous(quality):
        found.append("another position makes the images almost as alike, for example one vertebra further.")
    if quality["similarity_after"] < quality["similarity_before"] - _NOTABLE:
        found.append("the images are less alike than before: they may show different anatomy.")
    if quality.get("overlap", 1) < _LEAST_OVERLAP:
        found.append(f"the moving image shows only {100 * quality['overlap']:.0f} % of the fixed one.")
    if quality["folding"] > _FOLDING_LIMIT:
        found.append(f"the deformation folds at {100 * quality['folding']:.3f} % of voxels.")
    return found


def _peak_memory_mib() -> float | None:
    """Largest memory of this process so far; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
