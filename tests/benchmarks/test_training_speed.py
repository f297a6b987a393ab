"""What an iteration costs, on tiny data."""

from __future__ import annotations

import torch

from nnunet_oneshot.benchmarks.training_speed import Speed, main, report

PLANS = "nnUNetOneShotCPUPlans"


def test_trainers_are_timed_side_by_side(prepared_dataset, capsys):
    torch.set_num_threads(1)
    dataset = prepared_dataset(shape=(20, 24, 20))
    trainers = ["nnUNetTrainer", "OneShotDistillTrainer"]
    command = ["-d", str(dataset.id), "-p", PLANS, "-f", "0", "--device", "cpu", "--iterations", "2", "--warm-up", "1"]
    assert main([*command, "--trainers", *trainers]) == 0
    *_, first, second = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (first, second)]
    assert [row[0] for row in cells] == trainers
    assert cells[0][3] == "1.00"
    assert all(float(row[1]) > 0 for row in cells)
    assert [row[4] for row in cells] == ["", ""]
    assert not list(dataset.results.rglob("checkpoint_*.pth"))


def test_ratio_is_of_whole_iterations():
    table = report([Speed("a", step=1.0, wait=1.0, memory=None), Speed("b", step=2.0, wait=4.0, memory=512.4)])
    assert table.splitlines()[-1] == "| b | 2.0000 | 4.0000 | 3.00 | 512 |"


def test_what_is_missing_is_named(prepared_dataset, capsys):
    dataset = prepared_dataset()
    assert main(["-d", str(dataset.id), "-p", "otherPlans", "--device", "cpu"]) == 1
    assert "otherPlans" in capsys.readouterr().err
