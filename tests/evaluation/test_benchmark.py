"""The benchmark through the command, with trainings replaced by copies of the reference and once with real ones."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from filelock import FileLock

from nnunet_oneshot.cli import main
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation import runs
from nnunet_oneshot.evaluation.commands import CommandResult

PLANS = "nnUNetOneShotCPUPlans"
FAST = ["--methods", "nnunet-atlas", "synthesis", "distill", "nnunet-full", "--epochs", "5"]


def benchmark(dataset, out, *arguments):
    return main(["benchmark", "-d", str(dataset.id), "-p", PLANS, "-o", str(out), *arguments])


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture
def commands(prepared_dataset, monkeypatch):
    """A prepared dataset, and the commands that runs would have started; each leaves worse and worse segmentations."""
    dataset = prepared_dataset()
    issued = []

    def run_command(arguments, *, environment, log_file, cwd=None):
        overrides = json.loads(environment.get("nnUNet_oneshot_overrides", "{}"))
        issued.append((list(arguments), overrides))
        trainer = arguments[arguments.index("-tr") + 1]
        fold = arguments[3]
        folder = Path(environment["nnUNet_results"]) / dataset.name / f"{trainer}__{PLANS}__3d_fullres" / f"fold_{fold}"
        (folder / "validation").mkdir(parents=True, exist_ok=True)
        for reference in (dataset.preprocessed / "gt_segmentations").iterdir():
            image = sitk.ReadImage(str(reference))
            array = sitk.GetArrayFromImage(image)
            if "Atlas" in trainer:
                array[array == 2] = 0
            if "OneShot" in trainer:
                array[:, array.shape[1] // 2 :] = 0
            changed = sitk.GetImageFromArray(array)
            changed.CopyInformation(image)
            sitk.WriteImage(changed, str(folder / "validation" / reference.name))
        return CommandResult(line=" ".join(arguments), seconds=1.5, peak_memory_mb=100.0)

    monkeypatch.setattr(runs, "run_command", run_command)
    return dataset, issued


def test_all_methods_are_scored_on_the_same_cases(commands, tmp_path):
    dataset, issued = commands
    assert benchmark(dataset, tmp_path / "out", *FAST) == 0
    rows = results(tmp_path / "out")
    scored = [{(r["case"], r["label"]) for r in rows if r["method"] == m} for m in ("distill", "nnunet-full")]
    assert scored[0] == scored[1] and len(scored[0]) == 2
    missed = [r for r in rows if r["method"] == "nnunet-atlas" and r["label"] == "right"]
    assert missed and all(r["dice"] == 0 and r["nsd_2mm"] == 0 for r in missed)
    shape = np.array(sitk.ReadImage(str(dataset.label("case_00"))).GetSize())
    assert missed[0]["hd95"] == pytest.approx(np.linalg.norm(shape))
    assert all(r["dice"] == 1 for r in rows if r["method"] == "nnunet-full")
    wanted = {"dataset", "method", "atlas", "fold", "seed", "epochs", "case", "label", "dice", "hd95", "nsd_2mm"}
    assert wanted | {"seconds", "peak_memory_mb", "versions"} == set(rows[0])
    assert [a[a.index("-tr") + 1] for a, _ in issued][-1] == "nnUNetTrainer_5epochs"


def test_tables_and_figures_are_written(commands, tmp_path):
    dataset, _ = commands
    assert benchmark(dataset, tmp_path / "out", *FAST, "--seed", "1", "2") == 0
    out = tmp_path / "out"
    lines = list(csv.DictReader((out / "summary.csv").open()))
    atlas_right = next(line for line in lines if line["method"] == "nnunet-atlas" and line["label"] == "right")
    assert float(atlas_right["dice_mean"]) == 0 and atlas_right["not_found"] == atlas_right["scores"] == "2"
    text = (out / "summary.md").read_text()
    for expected in ("| distill - nnunet-atlas |", "gap closed", PLANS, "nnUNetv2_train", "torch", "| 5 |"):
        assert expected in text
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert {"dice_per_label.png", "hd95_per_label.png", "gap_closed.png", "examples.png"} <= drawn


def test_the_gap_is_counted_against_our_own_ceilings_where_they_were_run(commands, tmp_path):
    dataset, _ = commands
    out = tmp_path / "out"
    assert benchmark(dataset, out, *FAST) == 0
    assert "Gap closed: 0 is `nnunet-atlas`, 1 is `nnunet-full`." in (out / "summary.md").read_text()
    assert benchmark(dataset, out, "--methods", "supervised-atlas", "--epochs", "5") == 0
    assert "Gap closed: 0 is `supervised-atlas`, 1 is `nnunet-full`." in (out / "summary.md").read_text()
    assert benchmark(dataset, out, "--methods", "supervised", "--epochs", "5") == 0
    text = (out / "summary.md").read_text()
    assert "Gap closed: 0 is `supervised-atlas`, 1 is `supervised`." in text
    rows = [line.split("|") for line in text.split("## Differences")[0].splitlines() if line.startswith("|")]
    closed = {row[1].strip(): row[-2].strip() for row in rows[2:]}
    assert closed["supervised"] == closed["supervised-atlas"] == ""
    assert closed["nnunet-full"].startswith("+") and closed["distill"]


def test_finished_runs_are_skipped_and_new_ones_added(commands, tmp_path, capsys):
    dataset, issued = commands
    assert benchmark(dataset, tmp_path / "out", *FAST, "--seed", "1") == 0
    before = len(issued)
    assert benchmark(dataset, tmp_path / "out", *FAST, "--seed", "1", "2") == 0
    assert len(issued) == 2 * before
    assert capsys.readouterr().out.count("finished before") == before
    assert {row["seed"] for row in results(tmp_path / "out")} == {1, 2}


def test_tables_hold_the_runs_of_earlier_calls(commands, tmp_path):
    dataset, _ = commands
    for method in ("distill", "nnunet-atlas"):
        assert benchmark(dataset, tmp_path / "out", "--methods", method, "--epochs", "5") == 0
    assert {row["method"] for row in results(tmp_path / "out")} == {"nnunet-atlas", "distill"}


def test_records_are_enough_to_go_on_from(commands, tmp_path):
    dataset, issued = commands
    first, second = tmp_path / "first", tmp_path / "second"
    assert benchmark(dataset, first, *FAST) == 0
    for source in [first / "benchmark.json", *first.rglob("run.json")]:
        target = second / source.relative_to(first)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    issued.clear()
    assert benchmark(dataset, second, *FAST) == 0
    assert not issued
    assert results(second) == results(first)
    assert (second / "summary.md").is_file() and not (second / "figures" / "examples.png").exists()


def test_interrupted_training_is_resumed(commands, tmp_path):
    dataset, issued = commands
    assert benchmark(dataset, tmp_path / "out", *FAST) == 0
    (record,) = (tmp_path / "out" / "runs" / "distill").rglob("run.json")
    record.unlink()
    (fold,) = record.parent.rglob("fold_0")
    (fold / "checkpoint_latest.pth").touch()
    assert benchmark(dataset, tmp_path / "out", *FAST) == 0
    assert issued[-1][0][-1] == "--c" and "OneShotDistillTrainer_5epochs" in issued[-1][0]
    assert json.loads(record.read_text())["resumed"]


def test_two_benchmarks_in_one_folder_share_the_runs(commands, tmp_path, monkeypatch, capsys):
    """While one is at a run, the other leaves it alone and does the rest."""
    dataset, issued = commands
    out, run_command, methods = tmp_path / "out", runs.run_command, ["--methods", "synthesis", "distill"]
    second = []

    def during_the_first(*arguments, **options):
        monkeypatch.setattr(runs, "run_command", run_command)
        second.append(benchmark(dataset, out, *methods, "--epochs", "5"))
        return run_command(*arguments, **options)

    monkeypatch.setattr(runs, "run_command", during_the_first)
    assert benchmark(dataset, out, *methods, "--epochs", "5") == 0 and second == [0]
    trainers = [arguments[arguments.index("-tr") + 1] for arguments, _ in issued]
    assert trainers == ["OneShotDistillTrainer_5epochs", "OneShotSynthesisTrainer_5epochs"]
    assert "synthesis, atlas case_04, fold 0, seed 12345: left to another benchmark" in capsys.readouterr().out
    assert {row["method"] for row in results(out)} == {"synthesis", "distill"}
    assert not list(out.rglob("*.lock"))


def test_file_systems_without_locks_hinder_no_run(commands, tmp_path, monkeypatch):
    dataset, _ = commands

    def acquire(self, timeout):
        raise NotImplementedError("flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert benchmark(dataset, tmp_path / "out", "--methods", "distill", "--epochs", "5") == 0
    assert {row["method"] for row in results(tmp_path / "out")} == {"distill"}


def test_lock_file_of_a_killed_benchmark_is_taken_over(commands, tmp_path):
    dataset, issued = commands
    arguments = (dataset, tmp_path / "out", "--methods", "distill", "--epochs", "5")
    assert benchmark(*arguments) == 0
    (record,) = (tmp_path / "out" / "runs").rglob("run.json")
    record.unlink()
    record.parent.with_suffix(".lock").touch()
    assert benchmark(*arguments) == 0
    assert record.is_file() and len(issued) == 2


def test_runs_are_told_atlas_seed_and_settings(commands, tmp_path):
    dataset, issued = commands
    splits = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    first, second = splits[0]["train"][:2]
    arguments = ["--atlas", first, second, "--seed", "7", "--set", "distillation.levels=1", "--epochs", "5"]
    variant = "distill:unlabelled_fraction=0.5"
    assert benchmark(dataset, tmp_path / "out", "--methods", "distill", variant, "nnunet-full", *arguments) == 0
    overrides = [o for _, o in issued]
    assert [o.get("atlases") for o in overrides] == [[first], [first], None, [second], [second]]
    assert all(o["seed"] == 7 and o["distillation"] == {"levels": 1} for o in overrides)
    assert [o.get("unlabelled_fraction") for o in overrides] == [None, 0.5, None, None, 0.5]
    figures = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert "dice_by_unlabelled_cases.png" in figures


def test_atlas_is_left_out_of_the_fold_that_holds_it_out(commands, tmp_path, capsys):
    dataset, issued = commands
    splits = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    atlas = splits[1]["val"][0]
    arguments = ["--methods", "distill", "--epochs", "5", "--atlas", atlas, "--fold", "0", "1"]
    assert benchmark(dataset, tmp_path / "out", *arguments) == 0
    assert [a[3] for a, _ in issued] == ["0"]
    assert f"Atlas {atlas} is a validation case of fold 1" in capsys.readouterr().out


def test_failed_run_is_named_and_the_others_are_done(commands, tmp_path, monkeypatch, capsys):
    dataset, _ = commands
    working = runs.run_command

    def failing(arguments, **options):
        if "OneShotSynthesisTrainer_5epochs" in arguments:
            raise OneShotError("no memory left")
        return working(arguments, **options)

    monkeypatch.setattr(runs, "run_command", failing)
    assert benchmark(dataset, tmp_path / "out", *FAST) == 1
    captured = capsys.readouterr()
    assert "no memory left" in captured.out and "synthesis, atlas" in captured.err
    assert {row["method"] for row in results(tmp_path / "out")} == {"nnunet-atlas", "distill", "nnunet-full"}


def test_other_settings_in_the_same_folder_are_refused(commands, tmp_path, capsys):
    dataset, _ = commands
    assert benchmark(dataset, tmp_path / "out", *FAST) == 0
    assert benchmark(dataset, tmp_path / "out", *FAST[:-1], "10") == 1
    assert "epochs: 5, now 10" in capsys.readouterr().err


def test_folder_of_something_else_is_left_alone(commands, tmp_path, capsys):
    dataset, issued = commands
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    assert benchmark(dataset, tmp_path / "out", *FAST) == 1
    assert "holds no benchmark" in capsys.readouterr().err and not issued


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "'magic' is not known"),
        (["--methods", "distill", "--epochs", "7"], "no variant of 7 epochs"),
        (["--methods", "distill", "--set", "distillation.hint=loud"], "hint"),
        (["--methods", "distill:nonsense=1"], "nonsense"),
        (["--methods", "distill", "--atlas", "case_99"], "case_99"),
    ],
)
def test_mistakes_are_found_before_anything_runs(commands, tmp_path, capsys, arguments, message):
    dataset, issued = commands
    assert benchmark(dataset, tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not issued


def test_ceilings_need_all_labels(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset(labelled=("case_00", "case_01"))
    for method in ("nnunet-full", "supervised"):
        assert benchmark(dataset, tmp_path / "out", "--methods", method, "--epochs", "5") == 1
        assert f"Method {method} needs the labels of all cases" in capsys.readouterr().err


def test_partial_labels_are_not_given_to_stock_nnunet(commands, tmp_path, capsys):
    dataset, issued = commands
    path = dataset.preprocessed / "dataset.json"
    partial = {"oneshot": {"partial": {"case_00": ["left"]}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **partial}))
    assert benchmark(dataset, tmp_path / "out", "--methods", "nnunet-full", "--epochs", "5") == 1
    assert "would learn what partly labelled cases do not show as background" in capsys.readouterr().err
    assert not issued


def test_nothing_to_score_is_an_error(prepared_dataset, tmp_path, capsys):
    dataset = prepared_dataset(labelled=("case_00",))
    assert benchmark(dataset, tmp_path / "out", "--methods", "affine") == 1
    assert "no labelled validation case" in capsys.readouterr().err


def test_label_propagation_runs_through_its_command(prepared_dataset, tmp_path):
    dataset = prepared_dataset()
    assert benchmark(dataset, tmp_path / "out", "--methods", "affine", "registration") == 0
    rows = results(tmp_path / "out")
    assert {row["method"] for row in rows} == {"affine", "registration"}
    assert np.mean([row["dice"] for row in rows]) > 0.6
    shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_trainings_run_through_nnunet(prepared_dataset, tmp_path):
    dataset = prepared_dataset()
    methods = ["nnunet-atlas", "supervised-atlas", "propagation", "synthesis", "distill", "supervised", "nnunet-full"]
    assert benchmark(dataset, tmp_path / "out", "--methods", *methods, "--epochs", "1") == 0
    rows = results(tmp_path / "out")
    assert {row["method"] for row in rows} == set(methods)
    assert all(row["peak_memory_mb"] > 100 for row in rows)
