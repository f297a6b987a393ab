"""Makes the pictures of the documentation again: ``python docs/make_pictures.py FOLDER``.

They show generated phantoms alone: the demonstration's, and the abdomens of `nnunet_oneshot.benchmarks.abdomens`. Pages
that lie in ``FOLDER`` from an earlier call are kept. Needs Chromium or Chrome. Takes some ten minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nnunet_oneshot.benchmarks.abdomens import write_abdomen_dataset
from nnunet_oneshot.demo.run import CONFIGURATION, PLANNER, PLANS, run_demo
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.evaluation.commands import command_environment, run_command

IMAGES = Path(__file__).resolve().parent / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TRAINER = "OneShotDistillTrainer_5epochs"
_ABDOMENS = "Dataset998_Abdomens"
# Width and largest height, pixels of the page; a telephone has 390 of them beside each other.
_WIDE, _NARROW = (1000, 1130), (390, 1520)
_NARROWEST_WINDOW = 500
_LARGEST, _STEP = 250_000, 5


def make_pictures(folder: Path) -> None:
    """Writes all pictures into ``docs/images``.

    Args:
        folder: Where datasets and pages are made.

    Raises:
        OneShotError: There is no browser, or a step failed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise OneShotError(f"None of {', '.join(BROWSERS)} is on the path: install Chromium.")
    pages = {"phantoms": _phantoms(folder / "phantoms"), "abdomens": _abdomens(folder / "abdomens")}
    for name, page in pages.items():
        for width, size in (("wide", _WIDE), ("narrow", _NARROW)):
            photograph(browser, page, IMAGES / f"report_{name}_{width}.png", size)
    (registered,) = (folder / "phantoms" / "demo" / "nnUNet_preprocessed").rglob("phantom_005.png")
    _save(Image.open(registered), IMAGES / "registration.png")


def _phantoms(folder: Path) -> Path:
    """The report of the demonstration's dataset."""
    page = folder / "page.html"
    if not page.exists():
        run_demo(folder / "demo", trainer=_TRAINER)
        _run(folder / "demo", [["report", "-d", "999", "-p", PLANS, "-tr", _TRAINER, "-o", str(page)]])
    return page


def _abdomens(folder: Path) -> Path:
    """The report of generated abdomens, of which one is labelled."""
    page = folder / "page.html"
    if not page.exists():
        raw = folder / "nnUNet_raw" / _ABDOMENS
        write_abdomen_dataset(raw, cases=8)
        for label in sorted((raw / "labelsTr").iterdir())[1:]:
            label.unlink()
        planned = ["-d", "998", "-c", CONFIGURATION]
        commands = [
            ["plan_and_preprocess", *planned, "-pl", PLANNER],
            ["register", *planned, "-p", PLANS],
            ["report", *planned, "-p", PLANS, "-o", str(page)],
        ]
        _run(folder, commands)
    return page


def _run(folder: Path, commands: Sequence[Sequence[str]]) -> None:
    """Runs commands of the package with nnU-Net's folders in ``folder``."""
    environment = command_environment(
        **{name: folder / f"nnUNet_{name}" for name in ("raw", "preprocessed", "results")}
    )
    for command in commands:
        log = folder / "logs" / f"{command[0]}.txt"
        run_command(["nnunet_oneshot", *command], environment=environment, log_file=log, cwd=folder)


def photograph(browser: str, page: Path, out: Path, size: tuple[int, int]) -> None:
    """Saves the top of a page as a browser of this width and height shows it."""
    width, height = size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The paths of whoever makes the pictures are no part of them.
        text = page.read_text(encoding="utf-8").replace(str(page.parent), "/data")
        (folder / "page.html").write_text(text.replace("/data/demo", "/data"), encoding="utf-8")
        # A window is not made narrower than this; a frame in it is.
        frame = f'<iframe src="page.html" style="border: 0; width: {width}px; height: {height}px"></iframe>'
        (folder / "frame.html").write_text(f'<body style="margin: 0; overflow: hidden">{frame}', encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder / 'user'}", f"--screenshot={folder / 'shot.png'}"]
        options += [f"--window-size={max(width, _NARROWEST_WINDOW)},{height}"]
        command = [browser, *options, (folder / "frame.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with Image.open(folder / "shot.png") as shot:
            _save(_uncut(shot.convert("RGB").crop((0, 0, width, height))), out)


def _uncut(image: Image.Image) -> Image.Image:
    """A picture without what its lower edge cuts."""
    pixels = np.asarray(image)
    blank = (pixels == pixels[:, :1]).all((1, 2))
    return image.crop((0, 0, image.width, int(np.flatnonzero(blank)[-1]) + 1))


def _save(image: Image.Image, out: Path) -> None:
    """Saves a picture.

    Raises:
        OneShotError: The file is larger than pictures of the documentation may be.
    """
    # Fewer levels of each colour do not show and take less room; grey stays grey.
    image.convert("RGB").point(lambda value: round(value / _STEP) * _STEP).save(out, optimize=True)
    if out.stat().st_size > _LARGEST:
        raise OneShotError(f"{out} has {out.stat().st_size} bytes, more than {_LARGEST}: show less of the page.")
    print(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0].split(":")[0] + ".")
    parser.add_argument("folder", type=Path, help="where datasets and pages are made and kept")
    folder = parser.parse_args().folder.resolve()
    return exit_status(lambda: make_pictures(folder))


if __name__ == "__main__":
    raise SystemExit(main())
