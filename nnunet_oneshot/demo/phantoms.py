"""Generates anatomical phantoms: a small raw nnU-Net dataset with one labelled training case.

Signed distances (negative inside) define the anatomy once, in millimetres around the centre of the body. Each case
warps this anatomy by a smooth diffeomorphic map and a small change of pose and size. It has its own field of view,
origin, contrast, bias field and noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.spatial import cKDTree

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import is_occupied

LABELS = {"background": 0, "left_lobe": 1, "right_lobe": 2, "core": 3, "arch": 4}
SHAPE = (25, 28, 24)
SPACING = 2.75

_AIR, _FAT, _SOFT = 0.03, 0.70, 0.45
_TISSUE = {"left_lobe": 0.68, "right_lobe": 0.68, "core": 0.24, "arch": 0.95, "nodule": 0.80}
_SLIDE = 4.2
_CELL = 8.0
_BOX = 56.0


def write_phantom_dataset(
    folder: str | Path, *, training_cases: int = 14, test_cases: int = 5, labelled: int = 1, seed: int = 2024
) -> None:
    """Writes a raw nnU-Net dataset of phantoms, with ``imagesTs`` and ``labelsTs`` next to the training folders.

    Args:
        folder: Dataset folder with an nnU-Net name (``Dataset999_Phantoms``); must be missing or empty.
        training_cases: Images in ``imagesTr``.
        test_cases: Images in ``imagesTs``, each with a label in ``labelsTs``.
        labelled: Number of training cases with a label in ``labelsTr``.
        seed: The same seed gives the same files.

    Raises:
        OneShotError: The folder is not empty.
    """
    folder = Path(folder)
    if is_occupied(folder):
        raise OneShotError(f"{folder} exists and is not empty: phantoms are only written into a new folder.")
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    for index in range(training_cases + test_cases):
        rng = np.random.default_rng([seed, index])
        image, label, origin = make_phantom(rng)
        is_test = index >= training_cases
        part, case = "Ts" if is_test else "Tr", f"phantom_{index:03d}"
        _write(image, origin, folder / f"images{part}" / f"{case}_0000.nii.gz")
        if is_test or index < labelled:
            _write(label, origin, folder / f"labels{part}" / f"{case}.nii.gz")
    dataset = {
        "name": "Phantoms",
        "description": "Generated anatomical phantoms (nnunet_oneshot demo)",
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": training_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=2) + "\n")


def make_phantom(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One phantom.

    Args:
        rng: Random generator for all variation between cases.

    Returns:
        Image (X, Y, Z) int16, label (X, Y, Z) uint8 and the origin (3,) in mm; voxels are ``SPACING`` mm wide.
    """
    shape = np.array(SHAPE) + rng.integers(-2, 3, size=3)
    centre_of_view = rng.normal(0, 2.0, size=3)
    axes = [(np.arange(n) - (n - 1) / 2) * SPACING + c for n, c in zip(shape, centre_of_view, strict=True)]
    world = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    anatomy = _warp(_pose(world, rng), rng)

    sizes = rng.uniform(0.84, 1.16, size=4)
    # Organs slide against each other; a smooth map of the whole body cannot describe this.
    left, right, core, arch = (anatomy - shift for shift in rng.uniform(-_SLIDE, _SLIDE, size=(4, 3)))
    distances = {
        "left_lobe": _bean(left, -1, sizes[0]),
        "right_lobe": _bean(right, 1, sizes[1]),
        "core": _ellipsoid(core, (0, -15, 2), np.array([15, 11, 14]) * sizes[2]),
        "arch": _arch(arch, 4.8 * sizes[3], rng),
        "nodule": _ellipsoid(anatomy, rng.normal((0, -26, 10), 2.0), np.full(3, rng.uniform(2.5, 4.5))),
    }
    body = _ellipsoid(anatomy, (0, 0, 0), (32, 36, 29))

    image = np.full(len(world), _AIR)
    image = _paint(image, body, _FAT + rng.normal(0, 0.05))
    image = _paint(image, body + 3.5, _SOFT + rng.normal(0, 0.04))
    label = np.zeros(len(world), dtype=np.uint8)
    lobes = _TISSUE["left_lobe"] + rng.normal(0, 0.04)
    for name, distance in distances.items():
        tissue = lobes if name.endswith("lobe") else _TISSUE[name] + rng.normal(0, 0.04)
        image = _paint(image, distance, tissue)
        label[distance < 0] = LABELS.get(name, 0)
    image = _acquire(image.reshape(shape), rng)
    origin = np.array([a[0] for a in axes]) + rng.normal(0, 15.0, size=3)
    return image, label.reshape(shape), origin


def _pose(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (N, 3) after a small rotation (up to about 8 degrees per axis), shift and change of size."""
    a, b, c = rng.normal(0, np.deg2rad(4.0), size=3)
    turn_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    turn_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    size = 1 + rng.normal(0, 0.04, size=3)
    return points @ (turn_z @ turn_y @ turn_x).T / size + rng.normal(0, 1.5, size=3)


def _warp(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points (N, 3) moved by the flow of a smooth random velocity field (scaling and squaring on a coarse grid)."""
    nodes = int(2 * _BOX / _CELL) + 1
    velocity = np.zeros((3, nodes, nodes, nodes))
    for smoothing, deviation in ((2.2, 4.0), (1.1, 1.6)):
        noise = gaussian_filter(rng.standard_normal(velocity.shape), (0, smoothing, smoothing, smoothing))
        velocity += noise / noise.std() * deviation
    fine = zoom(velocity, (1, 3, 3, 3), order=3)
    cell = 2 * _BOX / (fine.shape[1] - 1)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in fine.shape[1:]], indexing="ij")).astype(float)
    displacement = fine / cell / 2**6
    for _ in range(6):
        displacement = displacement + np.stack(
            [map_coordinates(d, grid + displacement, order=1, mode="nearest") for d in displacement]
        )
    place = (points.T + _BOX) / cell
    moved = np.stack([map_coordinates(d, place, order=1, mode="nearest") for d in displacement], axis=-1)
    return points + moved * cell


def _ellipsoid(points: np.ndarray, centre: tuple | np.ndarray, semi_axes: tuple | np.ndarray) -> np.ndarray:
    """Approximate signed distance (N,) to an ellipsoid, mm."""
    semi_axes = np.asarray(semi_axes, dtype=float)
    scaled = (points - np.asarray(centre)) / semi_axes
    radius = np.linalg.norm(scaled, axis=1)
    gradient = np.linalg.norm(scaled / semi_axes, axis=1)
    return radius * (radius - 1) / np.maximum(gradient, 1e-6)


def _bean(points: np.ndarray, side: int, size: float) -> np.ndarray:
    """Signed distance (N,) to a lobe: an ellipsoid with a notch on its inner side; both sides are mirror images."""
    lobe = _ellipsoid(points, (side * 19, 4, 0), np.array([10, 15, 16]) * size)
    notch = _ellipsoid(points, (side * 9, 4, 0), np.array([5, 7, 6]) * size)
    return np.maximum(lobe, -notch)


def _arch(points: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Signed distance (N,) to a thin tube bent into an open ring, of varying width and extent."""
    start, end = np.deg2rad(rng.normal(-125, 8)), np.deg2rad(rng.normal(125, 8))
    angle = np.linspace(start, end, 80)
    line = np.stack([4 * np.sin(1.5 * angle), 14 + 12.5 * np.cos(angle), 14.5 * np.sin(angle)], axis=1)
    return cKDTree(line).query(points)[0] - radius


def _paint(image: np.ndarray, distance: np.ndarray, value: float) -> np.ndarray:
    """The image with a structure painted on it; its border is blurred over about one voxel, like partial volume."""
    share = 1 / (1 + np.exp(np.clip(distance / (SPACING / 4), -30, 30)))
    return image * (1 - share) + value * share


def _acquire(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Simulates a scanner: adds texture, contrast, bias field and noise to tissue values; returns int16."""
    image = image * (1 + 0.05 * _smooth_noise(image.shape, 2.0, rng))
    image = np.clip(image, 1e-3, None) ** rng.uniform(0.75, 1.35)
    image = image * np.exp(0.14 * _smooth_noise(image.shape, 12.0, rng))
    image = np.abs(image + rng.normal(0, rng.uniform(0.03, 0.06), size=image.shape))
    return (image * 1000 * rng.uniform(0.7, 1.4)).astype(np.int16)


def _smooth_noise(shape: tuple[int, ...], smoothing: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise, smoothed over ``smoothing`` voxels, with zero mean and unit standard deviation."""
    noise = gaussian_filter(rng.standard_normal(shape), smoothing, mode="reflect")
    return (noise - noise.mean()) / noise.std()


def _write(array: np.ndarray, origin: np.ndarray, path: Path) -> None:
    """Writes an array (X, Y, Z) as NIfTI."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing([SPACING] * 3)
    image.SetOrigin([float(o) for o in origin])
    sitk.WriteImage(image, str(path))
