"""What many cases cost: ``python -m nnunet_oneshot.benchmarks.scale``.

Plans a few tiny generated volumes, gives their preprocessed files many names, and registers all of them. Then starts
again with everything in the cache, as a training does. Each measurement is a process of its own. Costs for each case
should not depend on the number of cases.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.benchmarks.registration_worker import memory_mb
from nnunet_oneshot.config import OVERRIDES_VARIABLE
from nnunet_oneshot.data.parallel import default_processes
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.written import record_cases
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.io import require_env, save_json_atomic
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.dataset.command import register

_NAME, _PLANS, _CONFIGURATION = "Dataset900_Scale", "nnUNetOneShotCPUPlans", "3d_fullres"
_EDGE, _TEMPLATES = 20, 4
_SETTINGS = {"registration": {"refine_iterations": [5, 5]}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", type=int, default=[10, 100, 1000], metavar="N", help="%(default)s")
    parser.add_argument("-np", type=int, metavar="N", help="processes (default: as `nnunet_oneshot register`)")
    parser.add_argument("-o", metavar="FOLDER", help="where scale.json and table.csv are written (default: nowhere)")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="DATASET",
        help="only compare the cache of these data sets with their preprocessed data",
    )
    parser.add_argument("-p", default=_PLANS, metavar="PLANS", help="with --sizes (default: %(default)s)")
    parser.add_argument("-c", default=_CONFIGURATION, metavar="CONFIGURATION", help="likewise (default: %(default)s)")
    parser.add_argument("--measure", choices=list(_MEASUREMENTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    processes = options.np or default_processes()
    if options.measure is not None:
        print(json.dumps(_MEASUREMENTS[options.measure](processes)))
        return
    if options.sizes:
        opened = [PreparedDataset.open(dataset=d, plans_name=options.p, configuration=options.c) for d in options.sizes]
        rows = [cache_size(prepared) for prepared in opened]
    else:
        rows = [{"cases": cases, "processes": processes, **measured(cases, processes)} for cases in options.cases]
    print(table(rows))
    if options.o is not None:
        write(rows, Path(options.o))


def measured(cases: int, processes: int) -> dict[str, Any]:
    """Registers so many cases and starts again, in a temporary folder.

    Args:
        cases: Number of cases beside the atlas.
        processes: Worker processes.

    Returns:
        Figures by name: seconds (the main process has loaded its libraries before, workers load theirs), MiB of the
        main process at its peak, libraries included, files and bytes.

    Raises:
        OneShotError: A command failed.
    """
    with tempfile.TemporaryDirectory() as folder, _environment(Path(folder)) as environment:
        _plan(Path(folder), environment)
        _multiply(Path(folder) / "nnUNet_preprocessed" / _NAME, cases)
        first, cached, loaded = (_ask(name, processes, environment) for name in _MEASUREMENTS)
        prepared = PreparedDataset.open(dataset=_NAME, plans_name=_PLANS, configuration=_CONFIGURATION)
        sizes = cache_size(prepared)
    return {
        "register_s": first["seconds"],
        "register_processor_s": first["processor"],
        "register_processor_ms_per_case": round(1000 * first["processor"] / cases, 1),
        "register_mib": first["mib"],
        "cached_start_s": cached["seconds"],
        "cached_start_processor_ms_per_case": round(1000 * cached["processor"] / cases, 2),
        "cached_start_mib": cached["mib"],
        "images_read_first": first["images"],
        "images_read_cached": cached["images"],
        "load_s": loaded["seconds"],
        "load_processor_ms_per_case": round(1000 * loaded["processor"] / cases, 2),
        "load_mib": loaded["mib"],
        "files_per_case": round(sizes["files"] / cases, 2),
        "cache_kib_per_case": round(sizes["cache_bytes"] / cases / 1024, 2),
    }


def cache_size(prepared: PreparedDataset) -> dict[str, Any]:
    """Compares the registrations of a data set with the preprocessed files of the cases they belong to.

    Args:
        prepared: The data set; some of its pairs are registered.

    Raises:
        OneShotError: None is.
    """
    folder = prepared.kept / FOLDER / prepared.folder.name
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npz", ".json", ".png")]
    cases = [path.stem for path in files if path.suffix == ".npz"]
    if not cases:
        raise OneShotError(f"{folder} holds no registration: run `nnunet_oneshot register` first.")
    pictures = sum(path.stat().st_size for path in files if path.suffix == ".png")
    total = sum(path.stat().st_size for path in files)
    preprocessed = sum(path.stat().st_size for case in cases for path in prepared.folder.glob(f"{case}[._]*"))
    shape = np.median([prepared.image(case).shape[1:] for case in cases[:10]], axis=0)
    return {
        "dataset": prepared.name,
        "pairs": len(cases),
        "median_shape": "x".join(str(int(n)) for n in shape),
        "files": len(files),
        "preprocessed_bytes": preprocessed,
        "cache_bytes": total - pictures,
        "picture_bytes": pictures,
        "cache_percent": round(100 * (total - pictures) / preprocessed, 2),
        "with_pictures_percent": round(100 * total / preprocessed, 2),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, one column a row, since they have many figures."""
    lines = [f"| {name} | {' | '.join(str(row[name]) for row in rows)} |" for name in rows[0]]
    return "\n".join([lines[0], f"| --- |{' --- |' * len(rows)}", *lines[1:]])


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes ``scale.json`` and ``table.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_json_atomic(list(rows), folder / "scale.json")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[dict[str, str]]:
    """Points nnU-Net's variables at folders below this one, in this process and in those that are given them."""
    before = dict(os.environ)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (folder / name).mkdir()
        os.environ[name] = str(folder / name)
    os.environ[OVERRIDES_VARIABLE] = json.dumps(_SETTINGS)
    try:
        yield dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _plan(folder: Path, environment: dict[str, str]) -> None:
    """Writes the raw volumes, of which the first is labelled, and preprocesses them."""
    raw = folder / "nnUNet_raw" / _NAME
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, _EDGE)] * 3, indexing="ij"))
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number in range(_TEMPLATES):
        centre, radius = random.normal(0, 0.1, (3, 1, 1, 1)), random.uniform(0.4, 0.6)
        label = (((grid - centre) ** 2).sum(0) < radius**2).astype(np.uint8)
        image = (50 + 100 * label + random.normal(0, 8, label.shape)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(raw / "imagesTr" / f"template_{number}_0000.nii.gz"))
        if number == 0:
            sitk.WriteImage(sitk.GetImageFromArray(label), str(raw / "labelsTr" / f"template_{number}.nii.gz"))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "numTraining": _TEMPLATES}
    save_json_atomic({**description, "file_ending": ".nii.gz"}, raw / "dataset.json")
    plan = ["plan_and_preprocess", "-d", _NAME, "-pl", "OneShotCPUPlanner", "-c", _CONFIGURATION, "-np", "1"]
    _call(["nnunet_oneshot.cli", *plan, "--no_pbar", "--no_estimate"], environment)


def _multiply(base: Path, cases: int) -> None:
    """Gives the preprocessed files of the templates so many names, the atlas aside."""
    folder = base / f"{_PLANS}_{_CONFIGURATION}"
    names = ["template_0"]
    for number in range(cases):
        source = f"template_{1 + number % (_TEMPLATES - 1)}"
        names.append(f"case_{number:05d}")
        for path in folder.glob(f"{source}[._]*"):
            shutil.copyfile(path, folder / path.name.replace(source, names[-1], 1))
    for number in range(1, _TEMPLATES):
        for path in folder.glob(f"template_{number}[._]*"):
            path.unlink()
    (base / "splits_final.json").unlink(missing_ok=True)
    record_cases(base, folder.name, names)


def _ask(name: str, processes: int, environment: dict[str, str]) -> dict[str, Any]:
    """Runs one of `_MEASUREMENTS` in a process of its own."""
    return json.loads(_call([__spec__.name, "--measure", name, "-np", str(processes)], environment).splitlines()[-1])


def _call(arguments: Sequence[str], environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OneShotError(f"`python -m {' '.join(arguments)}` ended with status {done.returncode}: {done.stderr}")
    return done.stdout


def _timed(act: Callable[[], object]) -> dict[str, Any]:
    """Seconds of a call on the clock and of the processor, peak memory (MiB), and images read for checksums."""
    original, read = PreparedDataset.digest, []

    def digest(self: PreparedDataset, case: str) -> str:
        read.append(case)
        return original(self, case)

    PreparedDataset.digest = digest  # type: ignore[method-assign]
    started, computed = time.perf_counter(), _processor_seconds()
    act()
    seconds, processor = time.perf_counter() - started, _processor_seconds() - computed
    return {
        "seconds": round(seconds, 3),
        "processor": round(processor, 3),
        "mib": memory_mb()[1],
        "images": len(read),
    }


def _processor_seconds() -> float:
    """Of this process and of the workers that have ended, their start included."""
    return sum(os.times()[:4])


def _register(processes: int) -> dict[str, Any]:
    """All registrations, or where they are cached the look that finds them."""
    return _timed(
        lambda: register(
            dataset=_NAME,
            configuration=_CONFIGURATION,
            plans_name=_PLANS,
            folds=["all"],
            figures=False,
            num_processes=processes,
        )
    )


def _load(processes: int) -> dict[str, Any]:
    """All registrations in memory, as a training keeps them."""
    (preprocessed,) = require_env("nnUNet_preprocessed")
    cache = RegistrationCache(preprocessed / _NAME / FOLDER / f"{_PLANS}_{_CONFIGURATION}")
    cases = sorted(path.stem for path in (cache.folder / "template_0").glob("*.npz"))
    return _timed(lambda: [cache.load("template_0", case) for case in cases])


# In their order; the second finds what the first has left.
_MEASUREMENTS: dict[str, Callable[[int], dict[str, Any]]] = {"register": _register, "cached": _register, "load": _load}


if __name__ == "__main__":
    sys.exit(main())
