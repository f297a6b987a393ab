"""Rounds judged by true labels, on tiny data whose second registrations are spoiled."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from nnunet_oneshot.benchmarks.round_labels import main as judge
from nnunet_oneshot.cli import main

PLANS, TRAINER = "nnUNetOneShotCPUPlans", "OneShotDistillTrainer_5epochs"


def test_first_and_guided_registrations_are_scored_side_by_side(tiny_dataset, tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)
    dataset = tiny_dataset(n_cases=4, labelled="all")
    where = ["-d", str(dataset.id), "-c", "3d_fullres"]
    plan = ["plan_and_preprocess", *where, "-pl", "OneShotCPUPlanner", "--no_pbar", "--atlas", "case_00"]
    assert main(plan) == 0
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [5, 5]}}))
    assert main(["register", *where, "-p", PLANS, "-f", "1", "--no_figures"]) == 0
    training = Path(dataset.results) / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_1" / "oneshot_registrations"
    shutil.copytree(dataset.preprocessed / "oneshot_registrations" / f"{PLANS}_3d_fullres", training)
    spoiled = training / "case_00" / "case_01.json"
    record = json.loads(spoiled.read_text())
    record["quality"]["similarity_at_labels"] *= 0.5
    spoiled.write_text(json.dumps(record))
    arrays = dict(np.load(spoiled.with_suffix(".npz")))
    arrays["affine"][:3, 3] += 6
    np.savez(spoiled.with_suffix(".npz"), **arrays)
    command = [*where, "-p", PLANS, "-f", "1", "-tr", TRAINER, "-o", str(tmp_path / "out")]
    assert judge(command) == 0
    rows = {row["case"]: row for row in csv.DictReader((tmp_path / "out" / "table.csv").open())}
    assert set(rows) == {"case_01", "case_02", "case_03", "mean"}
    assert float(rows["case_01"]["guided"]) < 0.5 * float(rows["case_01"]["first"])
    assert (rows["case_01"]["kept"], rows["case_02"]["kept"], rows["mean"]["kept"]) == ("False", "True", "2")
    assert rows["case_02"]["guided"] == rows["case_02"]["first"]
    assert "case_01" in capsys.readouterr().out
