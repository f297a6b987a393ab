"""Datasets whose files are stored in different axis orders: the same labels in the scanner's space."""

from __future__ import annotations

import json
import shutil

import pytest

from nnunet_oneshot.benchmarks.axis_orders import main as main_of_axis_orders
from nnunet_oneshot.cli import main

PLANS = "nnUNetOneShotCPUPlans"


def mixed(dataset, tmp_path, *, reader="SimpleITKIO"):
    """Rewrites the dataset, each case in an order of its own. Without a named reader one that reorients is chosen."""
    assert main_of_axis_orders([str(dataset.raw), str(tmp_path / dataset.name)]) == 0
    shutil.rmtree(dataset.raw)
    shutil.move(tmp_path / dataset.name, dataset.raw)
    if reader is not None:
        path = dataset.raw / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "overwrite_image_reader_writer": reader}))


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


@pytest.mark.parametrize(
    ("method", "reader"),
    [("registration", "SimpleITKIO"), ("affine", "SimpleITKIO"), ("demons", "SimpleITKIO"), ("registration", None)],
)
def test_propagation_does_not_depend_on_the_order_of_the_axes(tiny_dataset, tmp_path, capsys, method, reader):
    scores = []
    for shuffle in (False, True):
        dataset = tiny_dataset(labelled="all", n_cases=6, shape=(18, 20, 22), dataset_id=901 + shuffle)
        if shuffle:
            mixed(dataset, tmp_path, reader=reader)
        # Case 00 is the atlas and in the training part of fold 1.
        splits = [{"train": dataset.cases[:3], "val": dataset.cases[3:]}] * 2
        (dataset.raw / "splits_final.json").write_text(json.dumps(splits))
        plan(dataset, capsys)
        scores.append(propagated(dataset, tmp_path / str(shuffle), "--method", method))
    assert scores[0] > 0.75
    assert scores[1] == pytest.approx(scores[0], abs=0.03)


def test_a_reader_that_reorients_is_planned_for_files_in_different_orders(tiny_dataset, tmp_path, capsys):
    from nnunet_oneshot.data.prepared import PreparedDataset

    dataset = tiny_dataset(labelled="all", n_cases=6, shape=(18, 20, 22))
    plan(dataset, capsys)
    plain = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    assert plain.plans["image_reader_writer"] == "SimpleITKIO"
    mixed(dataset, tmp_path, reader=None)
    said = plan(dataset, capsys)
    assert "different axis orders" in said and "case_03" in said and "NibabelIOWithReorient" in said
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    assert prepared.plans["image_reader_writer"] == "NibabelIOWithReorient"
    assert len(prepared.orders(dataset.cases)) == 1
    assert len({prepared.image(case).shape for case in dataset.cases}) == 1


def test_orders_are_told_apart_and_mirroring_is_decided_for_all_axes(tiny_dataset, tmp_path, capsys):
    from nnunet_oneshot.data.prepared import PreparedDataset

    dataset = tiny_dataset(labelled="all", n_cases=6, shape=(18, 20, 22))
    mixed(dataset, tmp_path)
    said = plan(dataset, capsys)
    assert "different axis orders" in said and "case_03" in said and "NibabelIOWithReorient" in said
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    orders = prepared.orders(dataset.cases)
    assert len(orders) > 1 and sorted(case for cases in orders.values() for case in cases) == dataset.cases
    for case in dataset.cases:
        image = prepared.image_in_common_order(case)[0]
        middle = image.shape[2] // 2
        # The brighter blob lies on the same side in all of them.
        assert image[:, :, middle:].mean() > image[:, :, :middle].mean()
