"""Nothing is written or removed outside the folders of a dataset, whatever its files say."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_oneshot.cli import main
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import _machine, atomic_folder, save_json_atomic
from nnunet_oneshot.locks import free, take

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
    "identifier",
    [".", "..", "../Dataset902_Other", "precious", "gt_segmentations", "oneshot_x", "/tmp", "", 3, "a/b", ".hidden"],
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
    return f".{kind}-{_machine()}-{process}-abcdefgh-{name}"


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked there")
def test_what_killed_processes_left_is_removed_and_what_they_put_aside_is_restored(tmp_path):
    target, dead = tmp_path / "data", dead_process()
    running, elsewhere = left("partial", os.getpid(), "data"), f".partial-00000000-{dead}-abcdefgh-data"
    for name in (left("partial", dead, "data"), running, elsewhere, left("partial", dead, "other")):
        (tmp_path / name).mkdir()
    (tmp_path / left("partial", dead, "checkpoint_best.pth")).write_text("unfinished")
    put_aside = tmp_path / left("previous", dead, "data")
    put_aside.mkdir()
    (put_aside / "old").write_text("kept")
    with pytest.raises(OneShotError), atomic_folder(target) as folder:
        (folder / "new").write_text("unfinished")
        raise OneShotError("stopped")
    assert (target / "old").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"data", running, elsewhere}
    (tmp_path / left("partial", dead, "checkpoint_best.pth")).write_text("unfinished")
    save_json_atomic({}, tmp_path / "other.json")
    assert {path.name for path in tmp_path.iterdir()} == {"data", running, elsewhere, "other.json"}


@pytest.mark.skipif(os.name == "nt", reason="processes are not asked there")
def test_a_killed_planning_leaves_nothing_after_the_next(tiny_dataset):
    dataset = tiny_dataset(n_cases=3)
    process = subprocess.Popen(planning(dataset), stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: list(dataset.preprocessed.glob(".partial-*_3d_fullres")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert plan(dataset) == 0
    names = {path.name for path in dataset.preprocessed.iterdir()}
    assert not [name for name in names if name.startswith((".partial", ".previous"))] and "planning.lock" not in names
    assert len(list((dataset.preprocessed / f"{PLANS}_3d_fullres").glob("*.pkl"))) == 3


def planning(dataset):
    command = [sys.executable, "-m", "nnunet_oneshot.cli", "plan_and_preprocess", "-d", str(dataset.id), "--no_pbar"]
    return [*command, "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_estimate"]


def wait_for(found, seconds=60.0):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_plannings_at_once_leave_all_cases(tiny_dataset):
    dataset = tiny_dataset(n_cases=4)
    command = planning(dataset)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(list((dataset.preprocessed / f"{PLANS}_3d_fullres").glob("*.pkl"))) == 4
    assert not [path for path in dataset.preprocessed.iterdir() if path.name.startswith(".") or path.suffix == ".lock"]


TRAIN = """
import sys, time, torch
from nnunet_oneshot.trainers.base import OneShotTrainer
from nnunetv2.run.run_training import run_training

initialize = OneShotTrainer.initialize
def few(self):
    self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 1, 1, 1
    initialize(self)
end = OneShotTrainer.on_train_epoch_end
def slow(self, outputs):
    print("training", flush=True)
    time.sleep(float(sys.argv[2]))
    end(self, outputs)
OneShotTrainer.initialize, OneShotTrainer.on_train_epoch_end = few, slow
torch.set_num_threads(1)
run_training(
    sys.argv[1], "3d_fullres", 0, "OneShotAtlasTrainer_5epochs", PLANS, device=torch.device("cpu"),
    continue_training="--c" in sys.argv, only_run_validation="--val" in sys.argv,
)
"""


def test_two_trainings_of_one_fold_at_once_and_one_after_a_kill(prepared_dataset, monkeypatch):
    from nnunet_oneshot.environment import TRAINER_FOLDER

    monkeypatch.setenv("nnUNet_extTrainer", str(TRAINER_FOLDER))
    dataset = prepared_dataset(n_cases=5)
    command = [sys.executable, "-c", TRAIN.replace("PLANS", repr(PLANS)), str(dataset.id)]
    environment = {**os.environ, "nnUNet_n_proc_DA": "2"}
    first = subprocess.Popen([*command, "300"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    try:
        assert any(line == b"training\n" for line in first.stdout)
        second = subprocess.run([*command, "0"], capture_output=True, text=True)
        assert second.returncode != 0 and "Another training is at work in" in second.stderr.splitlines()[-1]
        assert first.poll() is None
        workers = children_of(first.pid)
    finally:
        first.kill()
        first.wait()
    if sys.platform == "linux":
        assert len(workers) >= 2
        wait_for(lambda: not any(map(is_running, workers)), 10)
    for further in ("--c", "--val"):
        done = subprocess.run([*command, "0", further], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (folder,) = dataset.results.glob("*/fold_0")
    assert (folder / "checkpoint_final.pth").is_file() and (folder / "validation" / "summary.json").is_file()
    assert not list(folder.glob("*.lock")) + list(folder.glob(".*"))


COMMAND = """
import sys
from nnunet_oneshot.evaluation import commands
from nnunet_oneshot.locks import take

if sys.argv[3] == "other system":
    commands.ending_with_parent = lambda: None
assert take(sys.argv[2])
child = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
commands.run_command([sys.executable, "-c", child], environment={}, log_file=sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("system", ["linux", "other system"])
def test_a_command_ends_with_its_parent_or_keeps_its_lock(tmp_path, system):
    if system == "linux" and sys.platform != "linux":
        pytest.skip("Linux only")
    log, lock = tmp_path / "log.txt", tmp_path / "run.lock"
    parent = subprocess.Popen([sys.executable, "-c", COMMAND, str(log), str(lock), system])
    wait_for(lambda: log.is_file() and log.read_text().endswith("\n"))
    child = int(log.read_text())
    parent.kill()
    parent.wait()
    if system == "linux":
        wait_for(lambda: not is_running(child), 10)
        assert take(lock)
    else:
        assert is_running(child) and not take(lock)
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: take(lock), 10)
    free(lock)


def children_of(process):
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in found.read_text().split()] if found.is_file() else []


def is_running(process):
    """Whether a process is there and no zombie, which nobody waits for in some containers."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    try:
        return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_killed_benchmark_is_started_again(prepared_dataset, tmp_path):
    dataset, out = prepared_dataset(n_cases=5), tmp_path / "out"
    arguments = ["benchmark", "-d", str(dataset.id), "-p", PLANS, "-o", str(out), "--methods", "registration"]
    benchmark = subprocess.Popen([sys.executable, "-m", "nnunet_oneshot.cli", *arguments], stdout=subprocess.DEVNULL)
    wait_for(lambda: list(out.rglob("log.txt")))
    wait_for(lambda: children_of(benchmark.pid))
    commands = children_of(benchmark.pid)
    benchmark.kill()
    benchmark.wait()
    wait_for(lambda: not any(map(is_running, commands)), 10)
    assert main(arguments) == 0
    assert len(list(out.rglob("run.json"))) == 1 and not list(out.rglob("*.lock"))
