"""Fixtures shared by all tests: tiny generated data sets, and an environment that spares the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_data import draw_blobs, write_image

# Tests run side by side: one thread each, and one that waits leaves its core to others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

LABELS = {"background": 0, "left": 1, "right": 2}


@dataclass(frozen=True)
class TinyDataset:
    """A generated raw data set and where its preprocessed form goes.

    Attributes:
        id: Number of the data set.
        name: Its folder's name.
        raw: ``nnUNet_raw/<name>``.
        preprocessed: ``nnUNet_preprocessed/<name>``.
        results: ``nnUNet_results/<name>``.
        cases: Names of the cases.
        ending: Suffix of the files.
    """

    id: int
    name: str
    raw: Path
    preprocessed: Path
    results: Path
    cases: list[str]
    ending: str

    def image(self, case: str, channel: int = 0) -> Path:
        return self.raw / "imagesTr" / f"{case}_{channel:04d}{self.ending}"

    def label(self, case: str) -> Path:
        return self.raw / "labelsTr" / f"{case}{self.ending}"

    def edit_json(self, **changes: object) -> None:
        path = self.raw / "dataset.json"
        content = json.loads(path.read_text())
        content.update(changes)
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(autouse=True)
def _spare_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.delenv("nnUNet_oneshot_overrides", raising=False)
    # It starts a process of its own; tests/test_training_time.py asks for it.
    monkeypatch.setattr("nnunet_oneshot.training_time.training_time", lambda *_: "Training time: not estimated.")


@pytest.fixture
def tiny_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TinyDataset]:
    """A function that writes a raw data set and points nnU-Net's variables at folders below ``tmp_path``."""

    def make(
        n_cases: int = 4,
        shape: Sequence[int] = (16, 18, 14),
        labelled: Sequence[str] | str = ("case_00",),
        *,
        channels: Sequence[str] = ("MRI",),
        labels: dict | None = None,
        dataset_id: int = 901,
        ending: str = ".nii.gz",
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        seed: int = 0,
        **json_entries: object,
    ) -> TinyDataset:
        """Writes ``n_cases`` noisy images of two blobs.

        Args:
            n_cases: Number of training cases, named case_00, case_01, ...
            shape: Shape of the arrays, SimpleITK's axis order (z, y, x); (y, x) for 2D.
            labelled: Cases that get a label file, or "all".
            channels: Channel names.
            labels: The labels of dataset.json; values 1 and 2 are drawn.
            dataset_id: Number of the data set.
            ending: ``.nii.gz``, another suffix SimpleITK writes, or ``.png`` (2D).
            spacing: mm, in the array's axis order.
            seed: Seed of shapes and noise.
            **json_entries: Further entries of dataset.json.
        """
        name = f"Dataset{dataset_id:03d}_Tiny"
        roots = {key: tmp_path / key for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for key, folder in roots.items():
            folder.mkdir(exist_ok=True)
            monkeypatch.setenv(key, str(folder))
        raw = roots["nnUNet_raw"] / name
        for folder in ("imagesTr", "labelsTr"):
            (raw / folder).mkdir(parents=True)
        cases = [f"case_{number:02d}" for number in range(n_cases)]
        dataset = TinyDataset(
            id=dataset_id,
            name=name,
            raw=raw,
            preprocessed=roots["nnUNet_preprocessed"] / name,
            results=roots["nnUNet_results"] / name,
            cases=cases,
            ending=ending,
        )
        random = np.random.default_rng(seed)
        for case in cases:
            image, label = draw_blobs(shape, random)
            for channel in range(len(channels)):
                write_image(dataset.image(case, channel), image * (1 + channel), spacing)
            if labelled == "all" or case in labelled:
                write_image(dataset.label(case), label, spacing)
        content = {
            "channel_names": {str(number): channel for number, channel in enumerate(channels)},
            "labels": labels or LABELS,
            "numTraining": n_cases,
            "file_ending": ending,
            **json_entries,
        }
        (raw / "dataset.json").write_text(json.dumps(content))
        return dataset

    return make


@pytest.fixture
def prepared_dataset(tiny_dataset: Callable[..., TinyDataset]) -> Callable[..., TinyDataset]:
    """A function that makes a tiny dataset and plans and preprocesses it through the command."""
    import torch

    from nnunet_oneshot.cli import main

    torch.set_num_threads(1)

    def make(*, configuration: str = "3d_fullres", **settings: object) -> TinyDataset:
        dataset = tiny_dataset(**{"labelled": "all", "n_cases": 5, **settings})
        plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", configuration]
        assert main([*plan, "--no_pbar"]) == 0
        return dataset

    return make
