"""Rewrites a raw dataset in mixed axis orders: ``python -m nnunet_oneshot.benchmarks.axis_orders SOURCE TARGET``.

Stores each case in one of the 48 axis orders and directions, drawn at random, with a matching header, as scanners and
converters produce them. Nothing moves in the scanner's space, so training on the copy must score as on the source.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.io import atomic_folder, is_occupied, writing


def reorder(image: sitk.Image, order: Sequence[int], flips: Sequence[bool]) -> sitk.Image:
    """An image with permuted and reversed axes, and a header that keeps each voxel at its physical position.

    Args:
        image: Image with three axes.
        order: For each axis k of the result, the axis of the image, in the order x, y, z.
        flips: For each axis k of the result, whether it is reversed.
    """
    return sitk.Flip(sitk.PermuteAxes(image, list(order)), list(flips))


def write_mixed_orders(source: str | Path, target: str | Path, *, seed: int = 0) -> None:
    """Copies a raw dataset of volumes with a random axis order for each case.

    Args:
        source: ``nnUNet_raw/DatasetXXX_Name`` with images in ``imagesTr`` and labels in ``labelsTr``.
        target: Folder of the copy; must be missing or empty.
        seed: Seed for drawing the orders.

    Raises:
        OneShotError: The target is not empty, or the source is not a raw dataset.
    """
    raw, target = RawDataset(source), Path(target)
    if is_occupied(target):
        raise OneShotError(f"{target} exists and is not empty: name a new folder.")
    random = np.random.default_rng(seed)
    with writing(target), atomic_folder(target) as folder:
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir()
        shutil.copyfile(raw.folder / "dataset.json", folder / "dataset.json")
        for case in tqdm(raw.cases, desc="Rewriting"):
            order, flips = random.permutation(3).tolist(), (random.random(3) < 0.5).tolist()
            label = raw.label(case)
            for path in [*raw.images(case), *([label] if label else [])]:
                image = reorder(sitk.ReadImage(path), order, flips)
                sitk.WriteImage(image, str(folder / Path(path).parent.name / Path(path).name), True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_oneshot.benchmarks.axis_orders",
        description="Copies a raw dataset, each case in a random order of its axes.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder of a raw dataset")
    parser.add_argument("target", metavar="TARGET", help="folder of the copy, such as nnUNet_raw/Dataset904_Mixed")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    return exit_status(lambda: write_mixed_orders(options.source, options.target, seed=options.seed))


if __name__ == "__main__":
    sys.exit(main())
