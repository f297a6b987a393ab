"""Checks that two runs gave bitwise equal results: ``python -m nnunet_oneshot.benchmarks.equality BEFORE AFTER``.

To verify that a change keeps results the same, run the program (the demonstration, registrations, a short training)
before and after it, into two folders, on the same machine with the same number of threads. The comparison covers
images, registrations and networks, but not logs, times and pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch

from nnunet_oneshot.checkpoints import load_data, loading_checkpoint
from nnunet_oneshot.errors import OneShotError, exit_status

# Names and arrays in a file.
Content = dict[str, np.ndarray]


def read_image(path: Path) -> Content:
    """Voxels and geometry of an image file."""
    image = sitk.ReadImage(str(path))
    geometry = [*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection()]
    return {"voxels": sitk.GetArrayFromImage(image), "geometry": np.array(geometry)}


def read_arrays(path: Path) -> Content:
    """The arrays of a registration."""
    with np.load(path) as arrays:
        return dict(arrays)


def read_network(path: Path) -> Content:
    """The tensors of a checkpoint's network, or of a teacher's file."""
    with loading_checkpoint(path, advice="Leave it out of the comparison."):
        checkpoint = load_data(path)
        weights = checkpoint.get("network_weights", checkpoint.get("distiller", checkpoint))
    return {name: value.numpy() for name, value in weights.items() if isinstance(value, torch.Tensor)}


READERS: dict[str, Callable[[Path], Content]] = {
    "*.nii.gz": read_image,
    "*.npz": read_arrays,
    "*.pth": read_network,
}


def compare(before: Path, after: Path) -> Iterator[tuple[str, str]]:
    """Compares two folders file by file.

    Args:
        before: A folder of results.
        after: Folder of the same results from another run.

    Yields:
        Pattern of `READERS`, and a sentence about the difference.

    Raises:
        OneShotError: A folder does not exist, or there is nothing to compare.
    """
    for folder in (before, after):
        if not folder.is_dir():
            raise OneShotError(f"{folder} is no folder: give two folders of results.")
    names = {pattern: _found(before, pattern) | _found(after, pattern) for pattern in READERS}
    if not any(names.values()):
        raise OneShotError(f"{before} and {after} hold none of {', '.join(READERS)}: there is nothing to compare.")
    for pattern, found in names.items():
        for name in sorted(found):
            if missing := [str(folder) for folder in (before, after) if not (folder / name).is_file()]:
                yield pattern, f"{name} is missing in {', '.join(missing)}"
                continue
            first, second = (READERS[pattern](folder / name) for folder in (before, after))
            yield from ((pattern, f"{name}: {difference}") for difference in differences(first, second))


def differences(first: Content, second: Content) -> Iterator[str]:
    """Yields a sentence for each entry that is not bitwise equal."""
    for key in sorted(first.keys() | second.keys()):
        if key not in first or key not in second:
            yield f"{key} is in one of them only"
        elif first[key].shape != second[key].shape or first[key].dtype != second[key].dtype:
            kinds = [f"{array.shape} {array.dtype}" for array in (first[key], second[key])]
            yield f"{key} is {kinds[0]} and {kinds[1]}"
        elif first[key].tobytes() != second[key].tobytes():
            gap = np.abs(first[key].astype(np.float64) - second[key].astype(np.float64))
            yield f"{key} differs in {np.count_nonzero(gap)} of {gap.size} values, by up to {gap.max():.3g}"


def _found(folder: Path, pattern: str) -> set[str]:
    """Paths of files relative to the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


def _run(options: argparse.Namespace) -> None:
    before, after = Path(options.before), Path(options.after)
    found: list[Any] = list(compare(before, after))
    for _, sentence in found:
        print(sentence)
    for pattern in READERS:
        count = len(_found(before, pattern) | _found(after, pattern))
        differing = len({sentence.split(": ")[0] for kind, sentence in found if kind == pattern})
        print(f"{pattern}: {count - differing} of {count} files are equal to the bit")
    if found:
        raise OneShotError(f"{before} and {after} differ; see above.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status, which is 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_oneshot.benchmarks.equality",
        description="Compares the images, registrations and networks of two folders to the bit.",
    )
    parser.add_argument("before", metavar="BEFORE", help="folder of the first run")
    parser.add_argument("after", metavar="AFTER", help="folder of the second run")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
