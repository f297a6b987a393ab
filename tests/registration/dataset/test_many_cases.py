"""Many cases: worker processes, the work beside a device, parts of a job array and a cluster give the same files."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset import register as module
from nnunet_oneshot.registration.dataset import workers
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.dataset.pairs import PairWork, telling_pairs
from nnunet_oneshot.registration.dataset.parts import Part

PLANS = "nnUNetOneShotCPUPlans"
OVERRIDES = json.dumps({"registration": {"refine_iterations": [2, 2]}})


@pytest.fixture
def dataset(prepared_dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", OVERRIDES)
    return prepared_dataset(labelled=("case_00",), n_cases=6)


def command(dataset, *options):
    return ["register", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS, "--device", "cpu", *options]


def register(dataset, *options):
    assert main(command(dataset, *options)) == 0


def cache_of(dataset):
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    return RegistrationCache(prepared.base / FOLDER / prepared.folder.name)


def taken(dataset):
    """All files of the registrations, without what differs between two runs (seconds and checksums); removes them."""
    folder, found = cache_of(dataset).folder, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".json":
            record = json.loads(content)
            record["quality"].pop("seconds"), record.pop("checksum")
            content = record
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                content = {name: arrays[name].tolist() for name in arrays}
        elif path.suffix == ".csv":
            content = [line.rsplit(",", 4)[0] for line in content.decode().splitlines()]
        found[path.relative_to(folder).as_posix()] = content
        path.unlink()
    return found


class Stopped(Exception):
    pass


def work_of(dataset, monkeypatch):
    """What would be done with all pairs of the dataset, and the pairs, one a batch."""

    def stop(work, batches, done):
        raise Stopped(work, [[pair] for batch in batches for pair in batch])

    with monkeypatch.context() as changed:
        changed.setattr(module, "run_here", stop)
        with pytest.raises(Stopped) as stopped:
            main(command(dataset))
    return stopped.value.args


class DyingWork(PairWork):
    """Ends its process at one case."""

    def register(self, batch):
        if batch[0].case == "case_03":
            os._exit(9)
        super().register(batch)


def test_worker_processes_write_the_same_files(dataset, monkeypatch):
    settings = {"refine_iterations": [2, 2], "method": "network+refine", "network_iterations": 2}
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": settings}))
    register(dataset, "-np", "1")
    whole = taken(dataset)
    register(dataset, "-np", "2")
    again = taken(dataset)
    # Bytes of a network's file are not compared: what the network gives is in the pairs.
    assert again.keys() == whole.keys() and any(name.endswith(".pth") for name in again)
    assert {k: v for k, v in again.items() if "case" in k} == {k: v for k, v in whole.items() if "case" in k}


def test_what_is_done_beside_the_device_writes_the_same_files(dataset, monkeypatch):
    register(dataset)
    whole = taken(dataset)
    work, pairs = work_of(dataset, monkeypatch)
    done = []
    workers.run_beside(work, [sum(pairs[:2], []), sum(pairs[2:], [])], done.append, num_processes=2)
    assert sum(done) == 5
    whole.pop("quality_case_00.csv")
    assert taken(dataset) == whole


@pytest.mark.parametrize("run", [workers.run_in_processes, workers.run_beside])
def test_a_damaged_image_is_named_by_a_worker_and_the_rest_stops(dataset, run, monkeypatch, capfd):
    work, pairs = work_of(dataset, monkeypatch)
    (image,) = work.prepared.folder.glob("case_02.b2nd")
    image.write_bytes(image.read_bytes()[:50])
    with pytest.raises(OneShotError, match=r"registration of case_00 to case_02 failed: .*case_02\.b2nd cannot be"):
        run(work, pairs, lambda number: None, num_processes=2)
    assert {path.stem for path in work.cache.folder.rglob("*.npz")} < {"case_01", "case_03", "case_04", "case_05"}


def test_a_worker_that_dies_is_told_with_its_pairs(dataset, monkeypatch):
    work, pairs = work_of(dataset, monkeypatch)
    dying = DyingWork(**{field.name: getattr(work, field.name) for field in dataclasses.fields(work)})
    with pytest.raises(OneShotError, match=r"A worker process ended unexpectedly while it registered .*case_03"):
        workers.run_in_processes(dying, pairs, lambda number: None, num_processes=2)


def children(process):
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends them")
def test_workers_end_with_a_killed_parent(dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [100000]}}))
    arguments = command(dataset, "-np", "2", "--no_figures")
    parent = subprocess.Popen([sys.executable, "-m", "nnunet_oneshot.cli", *arguments], stderr=subprocess.DEVNULL)
    # The third process is the one that watches the resources that the others share.
    wait_until(lambda: len(children(parent.pid)) >= 3)
    started = children(parent.pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(is_running(process) for process in started))


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_register_all_once_and_the_last_writes_the_table(dataset, capsys, monkeypatch):
    register(dataset)
    whole = taken(dataset)
    assert "quality_case_00.csv" in whole and len(whole) == 3 * 5 + 1
    register(dataset, "-num_parts", "2", "-part_id", "1")
    first = {path: path.stat().st_mtime_ns for path in cache_of(dataset).folder.rglob("*.*")}
    assert {path.stem for path in first} == {"case_01", "case_03", "case_05"}
    assert "the part that ends last writes the tables" in capsys.readouterr().out
    register(dataset, "--num_parts", "2", "--part_id", "0")
    assert "The quality of all pairs is in" in capsys.readouterr().out
    table = cache_of(dataset).folder / "quality_case_00.csv"
    written = table.stat().st_mtime_ns
    monkeypatch.setattr(module, "run_here", None)
    register(dataset, "--num_parts", "2", "--part_id", "1")
    assert "3 cases are cached" in capsys.readouterr().out and table.stat().st_mtime_ns == written
    assert all(path.stat().st_mtime_ns == changed for path, changed in first.items())
    assert taken(dataset) == whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num_parts", "3", "--part_id", "3"], "--part_id is 3, but the parts are numbered from 0 to 2"),
        (["--num_parts", "3", "--part_id", "-1"], "--part_id is -1"),
        (["--num_parts", "0"], "--num_parts is 0"),
        (["-np", "0"], "-np is 0"),
    ],
)
def test_numbers_that_cannot_be_are_told(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert main(["register", "-d", "1", "-c", "3d_fullres", "-p", PLANS, *options]) == 1
    assert said in capsys.readouterr().err


def test_a_case_is_in_the_same_part_of_every_fold():
    everything = [f"case_{number}" for number in range(9)]
    parts = [Part(number, 4) for number in range(4)]
    assert sorted(case for part in parts for case in part.of(everything, everything)) == everything
    for part in parts:
        assert set(part.of(everything[3:7], everything)) <= set(part.of(everything, everything))


@pytest.mark.parametrize("failing", ["align", "keep"])
def test_a_pair_that_fails_is_named_and_the_others_are_kept(dataset, failing, monkeypatch, capsys):
    original = getattr(PairWork, failing)

    def fail(self, pair, *arguments):
        with telling_pairs([pair]):
            if pair.case == "case_05":
                raise ValueError("no such thing")
            return original(self, pair, *arguments)

    monkeypatch.setattr(PairWork, failing, fail)
    monkeypatch.setattr(module, "_BATCH_VOXELS", 1)
    assert main(command(dataset)) == 1
    error = capsys.readouterr().err
    assert "error: The registration of case_00 to case_05 failed (ValueError: no such thing)" in error
    assert "Traceback" in error
    assert len(list(cache_of(dataset).folder.rglob("*.json"))) == 4
