"""The demonstration's page holds its pictures and the numbers of nnU-Net's evaluation."""

import html
import json
import re

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.demo.phantoms import LABELS, write_phantom_dataset
from nnunet_oneshot.demo.report import write_report
from nnunet_oneshot.evaluation.commands import CommandResult
from nnunet_oneshot.evaluation.metrics import dice


@pytest.fixture
def finished(tmp_path):
    """A demonstration's folder after its last command, with made-up segmentations."""
    raw = tmp_path / "nnUNet_raw" / "Dataset999_Phantoms"
    write_phantom_dataset(raw, training_cases=1, test_cases=2)
    for method, missing in (("propagation", "arch"), ("student", None)):
        folder = tmp_path / "predictions" / method
        folder.mkdir(parents=True)
        per_case = []
        for file in sorted((raw / "labelsTs").iterdir()):
            image = sitk.ReadImage(str(file))
            reference = sitk.GetArrayFromImage(image)
            prediction = np.where(reference == LABELS.get(missing, -1), 0, reference)
            written = sitk.GetImageFromArray(prediction)
            written.CopyInformation(image)
            sitk.WriteImage(written, str(folder / file.name))
            metrics = {str(v): {"Dice": dice(prediction == v, reference == v)} for v in LABELS.values() if v}
            per_case.append({"metrics": metrics})
        mean = {k: {"Dice": np.mean([c["metrics"][k]["Dice"] for c in per_case])} for k in per_case[0]["metrics"]}
        (folder / "summary.json").write_text(json.dumps({"metric_per_case": per_case, "mean": mean}))
    return tmp_path, raw


def test_numbers_and_pictures_are_on_the_page(finished):
    out, raw = finished
    commands = [CommandResult("nnunet_oneshot register -d 999", 12.4, None)]
    report = write_report(
        out,
        raw=raw,
        preprocessed=out / "nnUNet_preprocessed",
        model=out / "model",
        trainer="OneShotDistillTrainer_5epochs",
        commands=commands,
        seconds=20.0,
    )
    assert report["dice"]["propagation"] == {"left_lobe": 1.0, "right_lobe": 1.0, "core": 1.0, "arch": 0.0}
    assert report["mean_dice"] == {"propagation": 0.75, "student": 1.0}
    assert json.loads((out / "report.json").read_text()) == report
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "nnunet_oneshot register -d 999" in page and "<td>0.750</td>" in page
    assert "| mean | 0.750 | 1.000 |" in (out / "report.md").read_text()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a$x_1$", "a|b`c`*d*"])
def test_names_from_files_become_no_markup(finished, name):
    out, raw = finished
    path = raw / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"] = {name if key == "core" else key: value for key, value in content["labels"].items()}
    path.write_text(json.dumps(content))
    command = CommandResult(f"nnunet_oneshot register -d {name}", 1.0, None)
    places = {"raw": raw, "preprocessed": out / "p", "model": out / "m"}
    write_report(out, **places, trainer=name, commands=[command], seconds=1.0)
    page, text = ((out / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))
    assert name in html.unescape(page)
    assert "<script" not in page and "<img src=x" not in page
    row = text.split("right_lobe")[1].splitlines()[1]
    assert "<script" not in text and "<img" not in text
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert not re.search(r"(?<!\\)[`*$]", row)
