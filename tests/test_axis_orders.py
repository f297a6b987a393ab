"""Datasets whose files are stored in different axis orders: the same labels in the scanner's space."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_oneshot.cli import main

PLANS = "nnUNetOneShotCPUPlans"


def reorder(path, random):
    """Rewrites a file in one of the 48 axis orders, with the header to match; returns what was done."""
    image = sitk.ReadImage(str(path))
    order, flips = random.permutation(3).tolist(), (random.random(3) < 0.5).tolist()
    return write(path, image, order, flips)


def write(path, image, order, flips):
    moved = sitk.Flip(sitk.PermuteAxes(image, order), flips)
    sitk.WriteImage(moved, str(path), True)
    return order, flips


def shuffled(dataset, seed=0):
    """Rewrites images and labels of every case, each case in an order of its own."""
    random = np.random.default_rng(seed)
    for case in dataset.cases:
        order, flips = reorder(dataset.image(case), random)
        write(dataset.label(case), sitk.ReadImage(str(dataset.label(case))), order, flips)
    return dataset


def plan(dataset, capsys):
    capsys.readouterr()
    command = [
        "plan_and_preprocess",
        "-d",
        str(dataset.id),
        "-pl",
        "OneShotCPUPlanner",
        "-c",
        "3d_fullres",
        "--no_pbar",
    ]
    assert main([*command, "--no_pbar", "--atlas", "case_00"]) == 0
    return capsys.readouterr().out


def propagated(dataset, out, *arguments):
    command = ["propagate", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS, "-f", "1", "-o", str(out)]
    assert main([*command, *arguments]) == 0
    return json.loads((out / "summary.json").read_text())["foreground_mean"]["Dice"]


@pytest.mark.parametrize("method", ["registration", "affine", "demons"])
def test_propagation_does_not_depend_on_the_order_of_the_axes(tiny_dataset, tmp_path, capsys, method):
    scores = []
    for shuffle in (False, True):
        dataset = tiny_dataset(labelled="all", n_cases=6, shape=(18, 20, 22), dataset_id=901 + shuffle)
        # Case 00 is the atlas and in the training part of fold 1.
        splits = [{"train": dataset.cases[:3], "val": dataset.cases[3:]}] * 2
        (dataset.raw / "splits_final.json").write_text(json.dumps(splits))
        plan(shuffled(dataset) if shuffle else dataset, capsys)
        scores.append(propagated(dataset, tmp_path / str(shuffle), "--method", method))
    assert scores[0] > 0.75
    assert scores[1] == pytest.approx(scores[0], abs=0.03)
