"""The demonstration's page: numbers, pictures, commands and times in one HTML file; the same as Markdown and JSON."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import nnunet_oneshot
from nnunet_oneshot.evaluation.commands import CommandResult
from nnunet_oneshot.io import Each, Shape, atomic_path, load_json_checked, save_json_atomic
from nnunet_oneshot.report.page import render
from nnunet_oneshot.tables import Markup, markdown_table, plain

_SCORES: Shape = {"mean": Each({"Dice": object}), "metric_per_case": [{"metrics": Each({"Dice": object})}]}
_METHODS = {"propagation": "label propagation", "student": "student"}


def write_report(
    out: Path,
    *,
    raw: Path,
    preprocessed: Path,
    model: Path,
    trainer: str,
    commands: Sequence[CommandResult],
    seconds: float,
) -> dict:
    """Scores, pictures and times of a finished demonstration.

    Args:
        out: The demonstration's folder, with ``predictions/student`` and ``predictions/propagation`` scored by
            ``nnUNetv2_evaluate_folder``.
        raw: Raw dataset folder.
        preprocessed: Preprocessed dataset folder, in which the registrations' pictures are.
        model: The trained fold's folder.
        trainer: Name of the trainer.
        commands: What was run.
        seconds: Time of everything.

    Returns:
        The content of ``report.json``.
    """
    labels = load_json_checked(raw / "dataset.json", "the dataset's description", {"labels": Each(int)})["labels"]
    labels = {int(value): name for name, value in labels.items() if int(value) != 0}
    dice = {method: _dice(out / "predictions" / method / "summary.json", labels) for method in _METHODS}
    report = {
        "program": f"nnunet_oneshot {nnunet_oneshot.__version__}",
        "trainer": trainer,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores",
        "seconds": round(seconds, 1),
        "commands": [{"command": c.line, "seconds": round(c.seconds, 1)} for c in commands],
        "dice": dice,
        "mean_dice": {method: sum(per_label.values()) / len(per_label) for method, per_label in dice.items()},
    }
    pictures = _pictures(out, raw=raw, preprocessed=preprocessed, model=model, labels=labels)
    with atomic_path(out / "report.md") as temporary:
        Path(temporary).write_text(_markdown(report), encoding="utf-8")
    with atomic_path(out / "report.html") as temporary:
        Path(temporary).write_text(_page(report, pictures), encoding="utf-8")
    save_json_atomic(report, out / "report.json")
    return report


def _dice(summary: Path, labels: dict[int, str]) -> dict[str, float]:
    """Mean Dice of each label over the test cases."""
    means = load_json_checked(summary, "the scores of nnUNetv2_evaluate_folder", _SCORES)["mean"]
    return {name: float(means[str(value)]["Dice"]) for value, name in labels.items()}


def _pictures(
    out: Path, *, raw: Path, preprocessed: Path, model: Path, labels: dict[int, str]
) -> list[tuple[str, Path]]:
    """Caption and file of every picture of the page."""
    from nnunet_oneshot.evaluation.figures import box_plot_per_label, example_figure

    folder = out / "predictions"
    examples = _examples(out, raw, labels)
    example_figure(folder / "examples.png", examples, label_names=labels)
    per_case = {
        name: {
            title: [
                case["metrics"][str(value)]["Dice"]
                for case in load_json_checked(folder / method / "summary.json", "scores", _SCORES)["metric_per_case"]
            ]
            for method, title in _METHODS.items()
        }
        for value, name in labels.items()
    }
    box_plot_per_label(folder / "dice.png", per_case)
    pictures = [
        ("Test phantoms: reference, label propagation and student.", folder / "examples.png"),
        ("Dice of every test case.", folder / "dice.png"),
    ]
    registrations = sorted(preprocessed.rglob("*.png"))
    pictures += [(f"Registration {p.stem}", p) for p in registrations[:: max(1, len(registrations) // 3)][:3]]
    if (model / "progress.png").is_file():
        pictures.append(("Training, as nnU-Net draws it.", model / "progress.png"))
    return pictures


def _examples(out: Path, raw: Path, labels: dict[int, str]) -> list:
    """The first three test cases with all segmentations."""
    import SimpleITK as sitk

    from nnunet_oneshot.evaluation.figures import Example
    from nnunet_oneshot.evaluation.metrics import dice

    examples = []
    for reference_file in sorted((raw / "labelsTs").glob("*.nii.gz"))[:3]:
        case = reference_file.name.removesuffix(".nii.gz")
        image = sitk.ReadImage(str(raw / "imagesTs" / f"{case}_0000.nii.gz"))
        reference = sitk.GetArrayFromImage(sitk.ReadImage(str(reference_file)))
        segmentations = {"reference": reference}
        for method, title in _METHODS.items():
            file = out / "predictions" / method / reference_file.name
            predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
            mean = sum(dice(predicted == v, reference == v) for v in labels) / len(labels)
            segmentations[f"{title}, Dice {mean:.2f}"] = predicted
        examples.append(
            Example(case, sitk.GetArrayFromImage(image), tuple(reversed(image.GetSpacing())), segmentations)
        )
    return examples


def _rows(report: dict) -> list[list[str]]:
    names = list(next(iter(report["dice"].values())))
    rows = [[name, *[f"{report['dice'][m][name]:.3f}" for m in _METHODS]] for name in names]
    return [*rows, ["mean", *[f"{report['mean_dice'][m]:.3f}" for m in _METHODS]]]


def _facts(report: dict) -> str:
    return (
        f"{report['program']}, {report['trainer']}, {report['date']}, {report['hardware']}; "
        f"{report['seconds']:.0f} s in all. Mean over the test phantoms; an empty prediction counts as 0."
    )


def _markdown(report: dict) -> str:
    commands = [[Markup(f"<code>{plain(c['command'])}</code>"), f"{c['seconds']:.0f}"] for c in report["commands"]]
    lines = ["# One-shot segmentation of phantoms", "", plain(_facts(report)), ""]
    lines += markdown_table(["label", *_METHODS.values()], _rows(report))
    return "\n".join([*lines, "", *markdown_table(["command", "seconds"], commands)]) + "\n"


def _page(report: dict, pictures: list[tuple[str, Path]]) -> str:
    return render(
        "demo.html",
        {
            "title": "nnunet_oneshot demo",
            "facts": _facts(report),
            "head": ("label", *_METHODS.values()),
            "rows": _rows(report),
            "pictures": [(caption, _encoded(path)) for caption, path in pictures],
            "commands": [(c["command"], f"{c['seconds']:.0f}") for c in report["commands"]],
        },
    )


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
