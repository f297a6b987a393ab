"""The speed of loaders, on tiny volumes."""

from __future__ import annotations

import json

import pytest

from nnunet_oneshot.benchmarks.loader_speed import LOADERS, STOCK, main, measure

TINY = ["--shape", "36", "40", "32", "--patch", "16", "24", "16", "--batches", "1", "--warm-up", "0", "--labels", "3"]


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch):
    """The benchmark sets nnU-Net's variables; they are put back after each test."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer", "nnUNet_n_proc_DA"):
        monkeypatch.setenv(name, "")


def test_all_loaders_are_timed_beside_nnunets(tmp_path, capsys):
    assert main([*TINY, "--json", str(tmp_path / "speed.json")]) == 0
    rows = capsys.readouterr().out.strip().splitlines()[-len(LOADERS) :]
    assert [row.split("|")[1].strip() for row in rows] == list(LOADERS)
    found = json.loads((tmp_path / "speed.json").read_text())["loaders"]
    assert found[0]["ratio"] == found[0]["cpu_ratio"] == 1
    assert all(row["patches"] == 2 and row["seconds"] > 0 for row in found)


def test_ratio_is_of_patches_a_second(monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("time.process_time", iter([0.0, 1.0, 1.0, 3.0]).__next__)
    stock, ours = measure(
        {STOCK: iter([{"data": [0, 0]}]), "ours": iter([{"data": [0, 0]}])}, batches=1, warm_up=0, seed=0
    )
    assert (stock.patches, stock.seconds, ours.patches_per_second) == (2, 2.0, 1.0)
    assert (ours.ratio, ours.cpu_ratio) == (2.0, 0.5)


@pytest.mark.parametrize("wrong", [["--cases", "2"], ["--labels", "11"], ["--patch", "0", "16", "16"]])
def test_impossible_sizes_are_refused(wrong, capsys):
    assert main([*TINY, *wrong]) == 1
    assert "error: " in capsys.readouterr().err
