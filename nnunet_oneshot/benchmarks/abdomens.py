"""Generated abdominal CTs with organs that move: ``python -m nnunet_oneshot.benchmarks.abdomens``.

They serve to measure registration with large displacements and organs that move independently of each other (see
`nnunet_oneshot.benchmarks.registration`). Cases share only a body plan. Body size, and the position, size, tilt and
density of each organ, are drawn for each case; bowel, gas and noise do not correspond between cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.io import atomic_folder, is_occupied, save_json_atomic, writing

SHAPE = (96, 80, 64)
SPACING = (4.0, 4.0, 5.0)

_AIR, _FAT, _WALL, _BOWEL = -1000.0, -90.0, 55.0, 45.0
# Standard deviations between cases: position of an organ and of a vessel (mm), density (HU), tilt (radians), size.
_PLACE, _VESSEL_PLACE, _DENSITY, _TILT, _SIZE = 12.0, 5.0, 12.0, 0.15, 0.15


@dataclass(frozen=True)
class _Organ:
    """An organ of the body plan, axes right to left, back to front, bottom to top.

    Attributes:
        centre: First two axes in half widths of the space inside the body wall, third axis in units of 150 mm.
        semi_axes: In mm.
        density: In HU.
        is_vessel: Whether the position varies less and the direction not at all.
    """

    centre: tuple[float, float, float]
    semi_axes: tuple[float, float, float]
    density: float
    is_vessel: bool = False


# In painting order; later organs cover earlier ones.
_ORGANS = {
    "aorta": _Organ((0.07, -0.38, 0.0), (9, 9, 400), 200, True),
    "vena_cava": _Organ((-0.12, -0.33, 0.0), (11, 9, 400), 150, True),
    "stomach": _Organ((0.35, 0.35, 0.25), (45, 38, 38), 40),
    "liver": _Organ((-0.42, 0.15, 0.25), (75, 60, 55), 105),
    "spleen": _Organ((0.62, -0.25, 0.3), (28, 35, 38), 115),
    "right_kidney": _Organ((-0.38, -0.45, -0.2), (24, 22, 48), 170),
    "left_kidney": _Organ((0.38, -0.45, -0.1), (24, 22, 48), 170),
    "pancreas": _Organ((0.08, 0.05, 0.0), (48, 13, 14), 90),
    "gallbladder": _Organ((-0.3, 0.35, -0.05), (15, 15, 22), 10),
    "bladder": _Organ((0.0, 0.1, -0.8), (38, 32, 30), 8),
}
LABELS = {"background": 0, **{name: index for index, name in enumerate(_ORGANS, start=1)}}


def write_abdomen_dataset(folder: str | Path, *, cases: int = 12, seed: int = 2024) -> None:
    """Writes a raw nnU-Net dataset of generated abdomens, all of them labelled.

    Args:
        folder: Dataset folder with an nnU-Net name (``Dataset998_Abdomens``); must be missing or empty.
        cases: Number of images.
        seed: The same seed gives the same files.

    Raises:
        OneShotError: The folder is not empty or cannot be written, or ``cases`` is less than 1.
    """
    folder = Path(folder)
    if cases < 1:
        raise OneShotError(f"{cases} abdomens were asked for: give a number of cases of at least 1.")
    if is_occupied(folder):
        raise OneShotError(f"{folder} exists and is not empty: abdomens are only written into a new folder.")
    dataset = {
        "name": "Abdomens",
        "description": "Generated abdominal CTs (nnunet_oneshot)",
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    with writing(folder), atomic_folder(folder) as unfinished:
        for name in ("imagesTr", "labelsTr"):
            (unfinished / name).mkdir()
        for index in range(cases):
            image, label = make_abdomen(np.random.default_rng([seed, index]))
            _write(image, unfinished / "imagesTr" / f"abdomen_{index:03d}_0000.nii.gz")
            _write(label, unfinished / "labelsTr" / f"abdomen_{index:03d}.nii.gz")
        save_json_atomic(dataset, unfinished / "dataset.json")


def make_abdomen(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One abdomen.

    Args:
        rng: Random generator for all variation between cases.

    Returns:
        Image (X, Y, Z) int16 in HU and label (X, Y, Z) uint8, voxels of ``SPACING`` mm.
    """
    half_width = np.array([165.0, 115.0]) * rng.normal(1, 0.08, 2)
    points = _places(rng)
    around = _elliptic(points, half_width)
    inside, wall = _elliptic(points, half_width - (22, 18)) < 1, _elliptic(points, half_width - (10, 8)) < 1
    spine = _elliptic(points + np.array([0, 0.62 * half_width[1], 0]).reshape(3, 1, 1, 1), (22, 20)) < 1
    image = np.where(around < 1, _FAT, _AIR)
    image[wall], image[inside] = _WALL, _FAT
    image[spine] = 250 + 120 * np.sin(points[2][spine] / 6)
    content = _smooth_noise((3, 3, 2.5), rng)
    belly = inside & ~spine & (points[2] < 20)
    image[belly & (content > 0.4)], image[belly & (content > 1.9)] = _BOWEL, _AIR
    label = np.zeros(SHAPE, np.uint8)
    reach = np.array([half_width[0] - 25, half_width[1] - 22, 150.0])
    for name, organ in _ORGANS.items():
        where = _organ_mask(points, organ, reach, rng) & wall & ~spine
        image[where] = organ.density + rng.normal(0, _DENSITY)
        label[where] = LABELS[name]
    image = gaussian_filter(image, 0.5) + 8 * _smooth_noise(1.5, rng) + rng.normal(0, 12, SHAPE)
    return image.round().astype(np.int16), label


def _places(rng: np.random.Generator) -> np.ndarray:
    """Body coordinates (3, X, Y, Z) of each voxel in mm, smoothly displaced, around a random centre."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(SHAPE, SPACING, strict=True)]
    displacement = np.stack([5 * _smooth_noise(5, rng) for _ in axes])
    middle = rng.normal(0, (12, 12, 15))
    return np.stack(np.meshgrid(*axes, indexing="ij")) + displacement - middle.reshape(3, 1, 1, 1)


def _elliptic(points: np.ndarray, half_width: np.ndarray | tuple[float, float]) -> np.ndarray:
    """Squared distance (X, Y, Z) from an upright axis, in half widths: 1 on the surface of an elliptic cylinder."""
    return (points[0] / half_width[0]) ** 2 + (points[1] / half_width[1]) ** 2


def _organ_mask(points: np.ndarray, organ: _Organ, reach: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask of a slightly boxy ellipsoid with random position, size and tilt, (X, Y, Z) bool."""
    centre = np.array(organ.centre) * reach + rng.normal(0, _VESSEL_PLACE if organ.is_vessel else _PLACE, 3)
    semi_axes = np.array(organ.semi_axes) * rng.normal(1, _SIZE, 3)
    local = points - centre.reshape(3, 1, 1, 1)
    if not organ.is_vessel:
        local = np.einsum("ij,jxyz->ixyz", _rotation(rng.normal(0, _TILT, 3)), local)
    return (np.abs(local / semi_axes.reshape(3, 1, 1, 1)) ** 2.3).sum(0) < 1


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation by three angles in radians, one per plane, (3, 3)."""
    result = np.eye(3)
    for angle, (first, second) in zip(angles, ((0, 1), (0, 2), (1, 2)), strict=True):
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        result = result @ turn
    return result


def _smooth_noise(smoothing: float | tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise (X, Y, Z), smoothed over ``smoothing`` voxels and scaled to unit standard deviation."""
    noise = gaussian_filter(rng.standard_normal(SHAPE), smoothing)
    return noise / noise.std()


def _write(array: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing(SPACING)
    # The second axis runs from back to front, ITK's from front to back.
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path), True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``python -m nnunet_oneshot.benchmarks.abdomens``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_oneshot.benchmarks.abdomens",
        description="Writes a raw nnU-Net dataset of generated CTs.",
    )
    parser.add_argument("folder", help="such as nnUNet_raw/Dataset998_Abdomens")
    parser.add_argument("--cases", type=int, default=12, help="number of images (default: 12)")
    parser.add_argument("--seed", type=int, default=2024, help="the same seed gives the same files (default: 2024)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write_abdomen_dataset(options.folder, cases=options.cases, seed=options.seed))


if __name__ == "__main__":
    sys.exit(main())
