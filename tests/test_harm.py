"""Nothing is written or removed outside the folders of a dataset, whatever its files say."""

import json
import os
import socket
import subprocess
import sys

import pytest

from nnunet_oneshot.cli import main
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_folder

PLANS = "nnUNetOneShotCPUPlans"


def tree(folder):
    """Every file below a folder, with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plan(dataset, *arguments):
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
    return main([*command, *arguments])


@pytest.fixture
def planned(tiny_dataset, tmp_path):
    """A planned dataset with sentinels beside it and in it, and a function that changes its plans."""
    dataset = tiny_dataset(n_cases=3)
    assert plan(dataset) == 0
    for folder in (dataset.preprocessed.parent / "Dataset902_Other", dataset.preprocessed / "precious"):
        folder.mkdir()
        (folder / "sentinel.txt").write_text("keep")

    def edit(**changes):
        path = dataset.preprocessed / f"{PLANS}.json"
        plans = json.loads(path.read_text())
        plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", **changes}
        path.write_text(json.dumps(plans))

    return dataset, edit


@pytest.mark.parametrize(
    "identifier", [".", "..", "../Dataset902_Other", "precious", "gt_segmentations", "/tmp", "", 3, "a/b", ".hidden"]
)
def test_a_data_identifier_replaces_no_folder_but_one_of_preprocessed_cases(planned, capsys, identifier):
    dataset, edit = planned
    edit(data_identifier=identifier)
    before = tree(dataset.preprocessed.parent.parent)
    command = ["preprocess", "-d", str(dataset.id), "-plans_name", PLANS, "-c", "mine", "--no_pbar"]
    assert main(command) == 1
    assert "error: " in capsys.readouterr().err
    assert tree(dataset.preprocessed.parent.parent) == before


def test_a_folder_of_preprocessed_cases_is_replaced(planned):
    dataset, edit = planned
    edit(data_identifier="mine_data")
    command = ["preprocess", "-d", str(dataset.id), "-plans_name", PLANS, "-c", "mine", "--no_pbar"]
    for _ in range(2):
        assert main(command) == 0
    assert len(list((dataset.preprocessed / "mine_data").glob("*.pkl"))) == 3


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/tmp/x", "", ".hidden"])
def test_names_of_plans_are_no_paths(tiny_dataset, tmp_path, name):
    dataset = tiny_dataset(n_cases=3)
    before = tree(tmp_path)
    assert plan(dataset, "-overwrite_plans_name", name) == 1
    assert tree(tmp_path) == before


def test_two_writers_of_a_folder_do_not_share_their_temporary_folder(tmp_path):
    target = tmp_path / "data"
    with atomic_folder(target) as first, atomic_folder(target) as second:
        assert first != second
        (first / "a").write_text("first")
        (second / "b").write_text("second")
    # Whoever comes last has the place; nothing is mixed and nothing is left.
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in target.iterdir()] == ["a"]


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left(kind, process, name):
    return f".{kind}-{socket.gethostname()}-{process}-abc-{name}"


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked there")
def test_what_killed_processes_left_is_removed_and_what_they_put_aside_is_restored(tmp_path):
    target, dead = tmp_path / "data", dead_process()
    for name in (left("partial", dead, "data"), left("partial", os.getpid(), "data"), left("partial", dead, "other")):
        (tmp_path / name).mkdir()
    put_aside = tmp_path / left("previous", dead, "data")
    put_aside.mkdir()
    (put_aside / "old").write_text("kept")
    with pytest.raises(OneShotError), atomic_folder(target) as folder:
        (folder / "new").write_text("unfinished")
        raise OneShotError("stopped")
    assert (target / "old").read_text() == "kept"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(["data", left("partial", os.getpid(), "data"), left("partial", dead, "other")])


def test_two_plannings_at_once_leave_all_cases(tiny_dataset):
    dataset = tiny_dataset(n_cases=4)
    command = [sys.executable, "-m", "nnunet_oneshot.cli", "plan_and_preprocess", "-d", str(dataset.id), "--no_pbar"]
    command += ["-pl", "OneShotCPUPlanner", "-c", "3d_fullres"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(list((dataset.preprocessed / f"{PLANS}_3d_fullres").glob("*.pkl"))) == 4
    assert not [path for path in dataset.preprocessed.iterdir() if path.name.startswith(".") or path.suffix == ".lock"]
