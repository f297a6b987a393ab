"""The check of a GPU, rehearsed on the processor."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from nnunet_oneshot.benchmarks import gpu_check


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_it_is_rehearsed_on_the_processor(tmp_path):
    out = tmp_path / "check"
    command = [
        sys.executable,
        "-m",
        "nnunet_oneshot.benchmarks.gpu_check",
        "-o",
        str(out),
        "--small",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, env={**os.environ, "nnUNet_compile": "f"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(out / "table.csv")
    assert [row["part"] for row in table] == list(gpu_check.PARTS)
    assert all(row["passed"] == "True" for row in table)
    # The processor does not deviate from itself, but for its number formats.
    for part in ("warped", "registered", "corrected", "steps"):
        assert all(float(row["value"]) == 0 for row in rows(out / f"{part}.csv")), part
    assert 0 < float(rows(out / "formats.csv")[1]["value"]) < 0.05
    assert {row["what"].split(",")[0] for row in rows(out / "steps.csv")} == set(gpu_check._TRAINERS)
    assert float(rows(out / "registrations.csv")[0]["seconds_a_pair"]) > 0
    record = json.loads((out / "record.json").read_text())
    assert set(record) == set(evidence().KEYS) and record["topic"] in evidence().TOPICS
    assert "All parts pass" in record["claim"]
    assert not (out / "work").exists()


def evidence():
    path = Path(__file__).resolve().parents[2] / "docs" / "build_evidence.py"
    spec = importlib.util.spec_from_file_location("build_evidence", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failed_part_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    def fails(check):
        raise ValueError("no memory\nmore lines")

    def deviates(check):
        return gpu_check._judged([gpu_check._row("a", 0.1, 1.0), gpu_check._row("b", float("nan"), 1.0)])

    def works(check):
        return [{"seconds": 1.0}]

    monkeypatch.setattr(gpu_check, "PARTS", {"fails": fails, "deviates": deviates, "works": works})
    check = gpu_check.Check(tmp_path, torch.device("cpu"), True, 8.0)
    assert gpu_check.run(check, list(gpu_check.PARTS)) == ["fails", "deviates"]
    table = rows(tmp_path / "table.csv")
    assert [row["passed"] for row in table] == ["False", "False", "True"]
    assert table[0]["error"] == "ValueError: no memory" and "b: nan" in table[1]["error"]
    assert "no memory" in (tmp_path / "fails.error.txt").read_text()
    assert [row["what"] for row in rows(tmp_path / "deviates.csv")] == ["a", "b"]
    assert rows(tmp_path / "works.csv") == [{"seconds": "1.0"}]
    assert "All but fails, deviates pass" in json.loads((tmp_path / "record.json").read_text())["claim"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert gpu_check.main(["-o", str(tmp_path), "--device", "cpu"]) == 1
    assert "is not empty" in capsys.readouterr().err
