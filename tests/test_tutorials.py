"""The tutorials: their blocks run in order, as they stand, on tiny data."""

import ast
import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from doc_shell import bash_blocks, run_blocks
from tiny_data import draw_blobs
from tiny_dicom import write_series

from nnunet_oneshot.demo.phantoms import write_phantom_dataset
from nnunet_oneshot.environment import TRAINER_FOLDER

DOCS = Path(__file__).resolve().parent.parent / "docs"
QUICK = {"registration": {"affine": False, "refine_iterations": [3, 3, 2]}}
# Found before the package's own: trainers of the names that the tutorials use, with one iteration.
TRAINERS = """
from nnunet_oneshot.trainers import OneShotDistillTrainer


class Short(OneShotDistillTrainer):
    epochs = 1

    def initialize(self):
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 1
        super().initialize()


class OneShotDistillTrainer_5epochs(Short):
    pass


class OneShotDistillTrainer_20epochs(Short):
    pass
"""

bash = pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="runs blocks for bash")


@pytest.fixture(autouse=True)
def _short(tmp_path, monkeypatch):
    """Trainings of one iteration, and quick registrations."""
    trainers = tmp_path / "trainers"
    trainers.mkdir()
    (trainers / "short_trainers.py").write_text(TRAINERS, encoding="utf-8")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(trainers), str(TRAINER_FOLDER)]))
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps(QUICK))
    # nnU-Net's commands set them, which a process can do once.
    for name in ("set_num_threads", "set_num_interop_threads"):
        monkeypatch.setattr(torch, name, lambda number: None)


def _write_patients(folder, number):
    """DICOM series of two blobs, and the label of the first as 3D Slicer saves it."""
    random = np.random.default_rng(0)
    for patient in range(1, number + 1):
        image, label = draw_blobs((16, 18, 14), random)
        image = sitk.GetImageFromArray(image.astype(np.int16))
        image.SetSpacing((1.0, 1.0, 1.5))
        write_series(image, folder / "scans" / f"patient_{patient:02d}")
        if patient == 1:
            drawn = sitk.GetImageFromArray(label)
            drawn.CopyInformation(image)
            for segment, name in enumerate(("left", "right")):
                drawn.SetMetaData(f"Segment{segment}_LabelValue", str(segment + 1))
                drawn.SetMetaData(f"Segment{segment}_Name", name)
            sitk.WriteImage(drawn, str(folder / "patient_01.seg.nrrd"))


@bash
def test_a_command_that_fails_ends_the_blocks(tmp_path):
    text = "Then:\n\n```bash\nnnunet_oneshot import nowhere -d 5 --label a b\ntouch after\n```\n"
    with pytest.raises(AssertionError, match="nowhere"):
        run_blocks(bash_blocks(text), tmp_path, tmp_path / "tools")
    assert not (tmp_path / "after").exists()
    assert bash_blocks(text, without="Then:") == []


@bash
def test_getting_started_goes_from_phantoms_to_scores(tmp_path):
    write_phantom_dataset(
        tmp_path / "nnUNet_raw" / "Dataset004_Hippocampus", training_cases=5, test_cases=0, labelled=5
    )
    text = (DOCS / "getting_started.md").read_text(encoding="utf-8")
    # The benchmark trains every method, at its full length where it is nnU-Net's.
    blocks = [block for block in bash_blocks(text) if not block.startswith("nnunet_oneshot benchmark")]
    ran = run_blocks(blocks, tmp_path, tmp_path / "tools")
    assert [line[0] for line in ran].count("nnUNetv2_train") == 1
    assert 0 <= json.loads((tmp_path / "predictions" / "summary.json").read_text())["foreground_mean"]["Dice"] <= 1
    assert len(list((tmp_path / "propagated").glob("*.nii.gz"))) == 2
    assert (tmp_path / "model.zip").is_file() and (tmp_path / "report.html").is_file()
    registrations = tmp_path / "nnUNet_preprocessed" / "Dataset004_Hippocampus" / "oneshot_registrations"
    assert len(list(registrations.rglob("*.npz"))) == 4


@bash
def test_own_scans_go_from_dicom_to_dicom(tmp_path):
    pytest.importorskip("highdicom")
    _write_patients(tmp_path, 4)
    text = (DOCS / "tutorials" / "own_scans_from_dicom.md").read_text(encoding="utf-8")
    ran = run_blocks(bash_blocks(text, without="With a GPU:"), tmp_path, tmp_path / "tools")
    commands = [line[1] if line[0] == "nnunet_oneshot" else line[0] for line in ran]
    assert commands == [
        *("doctor", "import", "plan_and_preprocess", "register", "report"),
        *("nnUNetv2_train", "report", "nnUNetv2_predict", "statistics", "to-dicom"),
    ]
    with open(tmp_path / "predictions" / "statistics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} == {"left", "right"}
    segmented = {path.stem for path in (tmp_path / "segmentations").iterdir()}
    assert segmented == {f"patient_{number:02d}" for number in range(1, 5)}
    assert "patient_02" in (tmp_path / "registrations.html").read_text(encoding="utf-8")


def test_powershell_sets_what_bash_sets():
    text = (DOCS / "tutorials" / "own_scans_from_dicom.md").read_text(encoding="utf-8")
    (powershell,) = re.findall(r"```powershell\n(.*?)```", text, re.DOTALL)
    (shell,) = (block for block in bash_blocks(text) if "export" in block)
    values = dict(re.findall(r"\$(?:env:)?(\w+) = (\"[^\"]*\")", powershell))
    assert len(values) == 6 and values == dict(re.findall(r"(\w+)=(\"[^\"]*\")", shell))


def test_python_of_the_how_to_imports_and_plans(tmp_path, monkeypatch):
    _write_patients(tmp_path, 3)
    (tmp_path / "scans" / "patient_01").rename(tmp_path / "scans" / "case_07")
    label = sitk.ReadImage(str(tmp_path / "patient_01.seg.nrrd"))
    sitk.WriteImage(sitk.Cast(label, sitk.sitkUInt8), str(tmp_path / "liver.nii.gz"))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "how_to" / "use_from_python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "use_from_python.md", "exec"), {})
    (planned,) = (tmp_path / "nnUNet_preprocessed").glob("Dataset004_*/nnUNetOneShotPlans_3d_fullres")
    assert len(list(planned.glob("*.pkl"))) == 3


def test_the_notebook_goes_from_phantoms_to_a_picture(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(DOCS / "tutorials" / "demo.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs or cell.execution_count for cell in cells] == [None] * len(cells), "commit it without outputs"
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    assert sum("image/png" in shown for shown in data) == 1
    (scores,) = (
        ast.literal_eval(shown["text/plain"]) for shown in data if "propagation" in shown.get("text/plain", "")
    )
    assert all(0 <= score <= 1 for score in scores.values())
