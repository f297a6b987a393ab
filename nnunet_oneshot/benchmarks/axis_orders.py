"""Rewrites a raw dataset in mixed axis orders: ``python -m nnunet_oneshot.benchmarks.axis_orders SOURCE TARGET``.

Each case is stored in one of the 48 orders of its axes, drawn at random, with the header to match, as scanners and
converters leave them. In the scanner's space nothing moves: what is trained on the copy must score as on the source.
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
    """An image with its axes exchanged and reversed, and a header with which every voxel stays where it is.

    Args:
        image: Three axes.
        order: Axis k of the result is this axis of the image, in the order x, y, z.
        flips: Whether axis k of the result runs the other way.
    """
    return sitk.Flip(sitk.PermuteAxes(image, list(order)), list(flips))


def write_mixed_orders(source: str | Path, target: str | Path, *, seed: int = 0) -> None:
    """Copies a raw dataset of volumes, each case in an order of its own.

    Args:
        source: ``nnUNet_raw/DatasetXXX_Name`` with images in ``imagesTr`` and labels in ``labelsTr``.
        target: The copy, which does not exist yet.
        seed: Of the draw.

    Raises:
        OneShotError: The target exists, or the source is no raw dataset.
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
