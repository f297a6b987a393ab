"""Parts of the page: cuts, outlines, curves, logs of trainings; and pages in 2D and of several atlases."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.report.cuts import divided, image_at, joined, planes_through, upright
from nnunet_oneshot.report.drawing import SCALE, Chart, chart_svg, data_uri, outlines
from nnunet_oneshot.report.training import charts_of, read_training


def head_up(axes):
    """Planes through a volume that holds, at each voxel, its place in the patient along z."""
    shape = (12, 14, 10)
    index = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"))
    height = np.tensordot(axes[0], index, axes=1)
    labelled = torch.from_numpy(np.argwhere(np.ones(shape)).T.astype(np.float32))
    planes = planes_through(labelled, shape, (1.0, 2.0, 1.0), axes)
    return planes, divided(image_at(height, joined(planes)), planes)


@pytest.mark.parametrize("axes", [np.eye(3), np.diag([-1.0, 1, -1]), np.eye(3)[[1, 0, 2]], -np.eye(3)[[2, 1, 0]]])
def test_seven_planes_show_the_head_above(axes):
    planes, cuts = head_up(axes)
    assert [plane.name.split(",")[0] for plane in planes] == ["axial"] * 3 + ["coronal"] * 2 + ["sagittal"] * 2
    for cut in cuts[:3]:
        assert np.ptp(cut) < 1e-3
    for cut in cuts[3:]:
        assert (cut[0] > cut[-1]).all() and np.ptp(cut, axis=1).max() < 1e-3


def test_pixels_are_square_whatever_the_spacing():
    planes, _ = head_up(np.eye(3))
    down, right = (float(planes[0].points.diff(dim=axis)[axis - 1].abs().mean()) for axis in (2, 3))
    assert 2.0 * down == pytest.approx(right, rel=0.1)


def test_a_slice_is_turned_as_the_planes_are():
    cut = np.arange(6).reshape(2, 3)
    assert np.array_equal(upright(cut, np.eye(3)), cut)
    assert np.array_equal(upright(cut, np.diag([1.0, -1, -1])), cut[::-1, ::-1])
    # Across the first axis, which points to the left, lie those that point to the head and to the back.
    assert np.array_equal(upright(cut, np.eye(3)[[1, 2, 0]]), cut[::-1])


def test_outlines_lie_where_the_label_is():
    seg = np.zeros((40, 60), np.int16)
    seg[10:30, 20:50] = 3
    (path,) = outlines(seg, [1, 3]).values()
    start, steps = path[1:-1].split("l")
    points = np.cumsum([[int(v) for v in p.split(",")] for p in [start, *steps.split(" ")]], axis=0) / SCALE
    assert np.abs(points.min(0) - (20, 10)).max() < 1 and np.abs(points.max(0) - (50, 30)).max() < 1


def test_pictures_keep_to_their_size():
    noise = np.random.default_rng(0).integers(0, 255, (176, 176)).astype(np.uint8)
    for most in (10**6, 4096, 1000):
        kind, content = data_uri(noise, most_bytes=most).split(";base64,")
        assert kind.startswith("data:image/") and len(content) * 3 / 4 <= most


def test_a_chart_is_well_formed_and_leaves_gaps_where_nothing_is_known():
    series = {"a<b&c": [1.0, None, float("nan"), 3.0], **{str(n): [n, n] for n in range(8)}}
    root = ElementTree.fromstring(chart_svg(Chart("t", series, {1: "round 1"})))
    lines = root.findall("polyline")
    assert len(lines) == 9 and len(lines[0].get("points").split()) == 2
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in lines}) == 9
    assert "a<b&c ends at 3" in root.get("aria-label")
    assert chart_svg(Chart("t", {"a": [None]})) == ""


def test_a_damaged_checkpoint_leaves_the_log_and_a_resumed_training_counts_once(tmp_path):
    assert read_training(tmp_path / "missing") is None and read_training(tmp_path) is None
    (tmp_path / "checkpoint_latest.pth").write_bytes(b"damaged")
    trust = ": as a guide: [0.5], its Dice. 1 of 1 registrations that it guided are kept, those"
    first = (
        ": Epoch 0\n: hint 3.0 (weight 0.0), reconstruction 1.0\n: Epoch 1\n: hint nan (weight 0.1), reconstruction 2"
    )
    (tmp_path / "training_log_2026_1_2_9_0_0.txt").write_text(first)
    (tmp_path / "training_log_2026_1_2_10_0_0.txt").write_text(
        f"{trust}\n: Epoch 1 \n: hint 2.0 (weight 0.1), reconstruction 0.5\n"
    )
    training = read_training(tmp_path)
    assert training.terms["hint"] == [3.0, 2.0] and not training.is_finished and training.epochs == 0
    assert [(r.epoch, r.trust, r.kept) for r in training.rounds] == [(1, (0.5,), (1, 1))]
    assert any("damaged" in problem for problem in training.problems)
    assert [chart.title for chart in charts_of(training, ["x"])] == ["Hint and reconstruction", "Weight of the hint"]


def test_two_dimensions_regions_and_several_atlases(prepared_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [1]}}))
    dataset = prepared_dataset(
        configuration="2d",
        shape=(32, 36),
        ending=".png",
        labelled=("case_00", "case_01"),
        n_cases=4,
        labels={"background": 0, "whole": [1, 2], "right": 2},
        regions_class_order=[1, 2],
    )
    common = ["-d", str(dataset.id), "-c", "2d", "-p", "nnUNetOneShotCPUPlans", "-f", "all"]
    assert main(["register", *common, "--no_figures"]) == 0
    assert main(["report", *common, "-o", str(tmp_path / "p.html")]) == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "2: whole, right" in text and "1: whole<" in text.replace("</li>", "<")
    assert text.count('class="pair"') == 6 and "by case_01" in text
    assert text.count('role="img"') == 12
