"""The benchmark of registration methods on tiny data: maps, processes, records, tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from nnunet_oneshot.benchmarks import registration as benchmark
from nnunet_oneshot.benchmarks.registration_summary import summarise
from nnunet_oneshot.benchmarks.registration_worker import Worker, measure
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation import itk_methods as itk
from nnunet_oneshot.evaluation.metrics import dice
from nnunet_oneshot.evaluation.registration_methods import MethodOptions

PLANS = "nnUNetOneShotCPUPlans"
SPACING = (1.0, 1.5, 0.8)
CONFIG = RegistrationConfig(refine_iterations=(10,))
OPTIONS = MethodOptions(CONFIG)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")


class SameProcess:
    """A `Worker` that needs no process of its own."""

    def __init__(self, method, options):
        self.method, self.options, self.alive = method, replace(options, config=CONFIG), True

    def measure(self, case, atlas, atlas_labels):
        if self.method == "bspline":
            raise OneShotError("RuntimeError: no memory left")
        return {**measure(self.method, case, atlas, self.options, atlas_labels=atlas_labels), "start_memory_mb": 1.0}

    def close(self):
        self.alive = False


@pytest.fixture
def tiny(prepared_dataset, monkeypatch, tmp_path):
    """A function that runs the benchmark on a tiny dataset, in this process; returns status and rows."""
    monkeypatch.setattr(benchmark, "Worker", SameProcess)
    dataset = prepared_dataset(n_cases=5)

    def run(*arguments):
        command = ["-d", str(dataset.id), "-p", PLANS, "-o", str(tmp_path / "out"), *map(str, arguments)]
        status = benchmark.main(command)
        return status, benchmark.read_pairs(tmp_path / "out")

    return run


def texture(shape, seed=0):
    image = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.8)
    return (image / image.std()).astype(np.float32)


def test_affine_map_is_kept_in_mm_of_other_voxels():
    random = np.random.default_rng(0)
    for shape, moving_spacing in (((5, 6, 7), (2.0, 0.5, 1.1)), ((6, 7), (0.5, 1.1))):
        dim = len(shape)
        matrix = np.eye(dim + 1)
        matrix[:dim] += random.normal(0, 0.2, (dim, dim + 1))
        fixed = itk.to_image(np.zeros((2, *shape)), SPACING[:dim])
        transform = itk.affine_transform(matrix, fixed_spacing=SPACING[:dim], moving_spacing=moving_spacing)
        expected = np.einsum("ij,j...->i...", matrix[:dim, :dim], np.indices(shape))
        expected += matrix[:dim, dim].reshape(-1, *[1] * dim)
        assert itk.read_places(transform, fixed, moving_spacing) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["bspline", "demons"])
def test_known_deformation_is_found(method, monkeypatch):
    monkeypatch.setattr(itk, "_BSPLINE_SAMPLES", 2500)
    moving = texture((16, 20, 18))
    grid = np.indices(moving.shape).astype(float)
    bent = [np.sin(2 * np.pi * grid[(k + 1) % 3] / moving.shape[(k + 1) % 3]) for k in range(3)]
    true = grid + np.stack(bent)
    fixed = map_coordinates(moving, true, order=1, mode="nearest")
    images = [itk.to_image(image[None], SPACING) for image in (fixed, moving)]
    start = itk.affine_transform(np.eye(4), fixed_spacing=SPACING, moving_spacing=SPACING)
    if method == "bspline":
        found = itk.register_bspline(*images, start, mutual_information=False)
    else:
        found = itk.register_demons(*images, start)
    inner = (slice(None), *[slice(3, -3)] * 3)
    errors = [np.abs(places - true)[inner].mean() for places in (grid, itk.read_places(found, images[0], SPACING))]
    assert errors[1] < 0.45 * errors[0]


@pytest.mark.parametrize("flat", [False, True])
def test_map_of_syn_warps_labels_as_ants_does(flat):
    pytest.importorskip("ants")
    import ants

    from nnunet_oneshot.registration.pair.warp import sample_labels

    shape = (1, 40, 36) if flat else (18, 20, 16)
    grid = np.indices(shape)
    labels = [
        (sum((axis - c) ** 2 for axis, c in zip(grid, np.array(shape) * place, strict=True)) < 36)
        for place in ((0.5, 0.4, 0.45), (0.5, 0.55, 0.5))
    ]
    random = np.random.default_rng(0)
    case, atlas = (
        ((2 * label + 0.1 * random.normal(size=shape))[None].astype(np.float32), spacing)
        for label, spacing in zip(labels, (SPACING, (1.0, 1.4, 0.9)), strict=True)
    )
    found = measure("syn", case, atlas, OPTIONS)
    assert found["places"].shape == (3, *shape) and found["seconds"] > 0
    own = sample_labels(torch.from_numpy(labels[1][None].astype(np.int16)), torch.from_numpy(found["places"]))[0]
    fixed, moving, mask = (
        ants.from_numpy(np.ascontiguousarray(array[0] if flat else array), spacing=spacing[1:] if flat else spacing)
        for array, spacing in (
            (case[0][0] - case[0].min(), case[1]),
            (atlas[0][0] - atlas[0].min(), atlas[1]),
            (labels[1].astype(np.float32), atlas[1]),
        )
    )
    transforms = ants.registration(fixed=fixed, moving=moving, type_of_transform="SyN")["fwdtransforms"]
    theirs = ants.apply_transforms(fixed=fixed, moving=mask, transformlist=transforms, interpolator="linear").numpy()
    assert dice(own.numpy().reshape(theirs.shape) == 1, theirs > 0.5) > 0.93
    assert dice(own.numpy() == 1, labels[0]) > 0.9


def test_slices_are_registered_in_two_dimensions():
    image = texture((1, 24, 22))[None]
    for method in ("affine", "ours", "demons"):
        found = measure(method, (image, SPACING), (image, SPACING), OPTIONS)
        error = np.abs(found["places"] - np.indices(image.shape[1:]))
        assert error.mean() < 0.1 and error.max() < 1
        assert benchmark.folded_share(torch.from_numpy(found["places"])) == 0


def test_folds_are_counted_in_the_case():
    places = torch.from_numpy(np.indices((8, 6, 5)).astype(np.float32))
    assert benchmark.folded_share(2 * places + 3) == 0
    places[0, 4:] = 7 - places[0, 4:]
    assert benchmark.folded_share(places) == pytest.approx(5 / 8, abs=0.13)


def test_method_runs_in_a_process_of_its_own():
    worker = Worker("affine", OPTIONS)
    image = texture((12, 14, 10))[None]
    try:
        found = worker.measure((image, SPACING), (image, SPACING))
        with pytest.raises(OneShotError, match="Error"):
            worker.measure((image, SPACING), (image[0], SPACING))
        assert worker.alive
        again = worker.measure((image, SPACING), (image, SPACING))
        worker._process.kill()
        with pytest.raises(OneShotError, match="process of method affine ended with status -9"):
            worker.measure((image, SPACING), (image, SPACING))
        assert not worker.alive
    finally:
        worker.close()
    assert found["places"] == pytest.approx(again["places"])
    assert found["peak_memory_mb"] is None or found["peak_memory_mb"] < 1500


def test_pairs_are_recorded_and_measured_once(tiny, tmp_path, capsys):
    chosen = ["--atlas", "case_00", "case_03", "--methods", "demons", "affine", "ours"]
    status, rows = tiny(*chosen, "--cases", 2)
    assert status == 0 and len(rows) == 12
    assert [row["method"] for row in rows[:3]] == ["affine", "ours", "demons"]
    assert "similarity_at_labels" in rows[1]["quality"] and "quality" not in rows[0]
    pairs = {(row["atlas"], row["case"]) for row in rows}
    assert len(pairs) == 4 and all(atlas != case for atlas, case in pairs)
    for row in rows:
        assert set(row["dice_per_label"]) == {"left", "right"}
        assert row["dice"] == pytest.approx(np.mean(list(row["dice_per_label"].values())), abs=1e-5)
        assert row["dice"] > 0.6 and row["folding"] < 0.05 and row["hd95"] < 5 and row["seconds"] > 0

    file = tmp_path / "out" / "pairs.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]) + '{"method": "dem')
    capsys.readouterr()
    status, again = tiny(*chosen, "--cases", 2)
    assert status == 0 and again[:-1] == rows[:-1] and len(again) == 12
    assert capsys.readouterr().out.count(" s, ") == 1

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["pairs"] == 4 and set(summary["methods"]["ours"]["atlases"]) == {"case_00", "case_03"}
    text = (tmp_path / "out" / "summary.md").read_text()
    for expected in ("Tiny", "4 pairs of 2 atlas", "1 thread", "SimpleITK ", "torch ", "--cases 2", "| demons | 4 |"):
        assert expected in text
    assert tiny(*chosen, "--threads", 2)[0] == 1
    assert "threads: 1, now 2" in capsys.readouterr().err


def test_failed_method_is_named_and_the_others_are_done(tiny, capsys):
    status, rows = tiny("--methods", "affine", "bspline")
    captured = capsys.readouterr()
    assert status == 1 and "no memory left" in captured.out and "bspline on case" in captured.err
    assert rows and {row["method"] for row in rows} == {"affine"}


def test_syn_is_left_out_without_ants(monkeypatch):
    monkeypatch.setitem(sys.modules, "ants", None)
    said = []
    assert benchmark.available_methods(["syn", "syncc", "affine"], said.append) == ["affine"]
    assert len(said) == 2 and all("not installed" in text for text in said)
    with pytest.raises(OneShotError, match="No method is left"):
        benchmark.available_methods(["syn"], said.append)


def test_mistakes_are_found_before_anything_runs(tiny, tmp_path, capsys):
    for arguments, message in (
        (["--methods", "magic"], "magic are not known"),
        (["--atlas", "case_99"], "case_99"),
        (["--cases", "0"], "number from 1"),
        (["--threads", "0"], "from 1"),
    ):
        assert tiny(*arguments) == (1, [])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def row(method, atlas, case, value, seconds, **changes):
    shared = {"hd95": 2.0, "folding": 0.0, "cpu_seconds": seconds, "peak_memory_mb": 100.0, "start_memory_mb": 60.0}
    per_label = {"dice_per_label": {"a": value}}
    return {
        "method": method,
        "atlas": atlas,
        "case": case,
        "dice": value,
        "seconds": seconds,
        **shared,
        **per_label,
        **changes,
    }


def test_summary_is_over_atlases_and_against_syn():
    rows = [
        row("ours", "x", "1", 0.8, 1.0, folding=0.25),
        row("ours", "x", "2", 0.6, 3.0),
        row("ours", "y", "1", 0.0, 2.0, peak_memory_mb=300.0),
        row("ours", "y", "2", None, 2.0, hd95=None),
        row("syn", "x", "1", 0.7, 10.0, peak_memory_mb=200.0, hd95=4.0),
    ]
    methods = summarise(rows)["methods"]
    assert list(methods) == ["ours", "syn"]
    overall, first = methods["ours"]["all"], methods["ours"]["atlases"]["x"]
    assert first["dice_mean"] == 0.7 and first["dice_sd"] == pytest.approx(0.2 / 2**0.5, abs=1e-6)
    assert overall["dice_mean"] == 0.35 and overall["dice_sd_atlases"] == pytest.approx(0.7 / 2**0.5, abs=1e-6)
    assert overall["dice_median"] == 0.6 and overall["dice_to_syn"] == pytest.approx(0.8 / 0.7, abs=1e-6)
    assert overall["hd95_median"] == 2 and overall["hd95_to_syn"] == 0.5
    assert overall["folding_max"] == 0.25 and overall["folding_median"] == 0
    assert overall["seconds_median"] == 2 and overall["seconds_to_syn"] == 0.1
    assert overall["peak_memory_mb"] == 300 and overall["peak_memory_to_syn"] == 0.5
    assert overall["memory_above_start_mb"] == 240
    assert methods["ours"]["atlases"]["y"]["seconds_to_syn"] is None
    assert methods["syn"]["all"]["dice_sd_atlases"] is None
    assert methods["ours"]["all"]["quality_spearman"] is None


def test_similarity_is_held_against_dice_within_each_atlas():
    def pairs(atlas, level, values):
        return [
            row("ours", atlas, str(i), value, 1.0, quality={"similarity_after": level + i})
            for i, value in enumerate(values)
        ]

    rows = [*pairs("x", 0.0, [0.5, 0.6, 0.7]), *pairs("y", 9.0, [0.2, 0.4, 0.3]), row("syn", "x", "0", 0.5, 1.0)]
    unscored = row("ours", "x", "9", None, 1.0, hd95=None, quality={"similarity_after": -1.0})
    methods = summarise([*rows, unscored])["methods"]
    assert methods["ours"]["atlases"]["x"]["quality_spearman"] == 1.0
    assert methods["ours"]["atlases"]["y"]["quality_spearman"] == 0.5
    assert methods["ours"]["all"]["quality_spearman"] == 0.75
    assert methods["syn"]["all"]["quality_spearman"] is None
