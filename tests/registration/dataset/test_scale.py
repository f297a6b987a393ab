"""Many cases: worker processes, the work beside a device, parts of a job array and a cluster give the same files."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.config import OneShotConfig, RegistrationConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset import workers
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.dataset.parts import Part
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar

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


def registrar(dataset, log=print, **options):
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    config = OneShotConfig(registration=RegistrationConfig(method="refine", refine_iterations=(2, 2)))
    return DatasetRegistrar(prepared, config, ["case_00"], torch.device("cpu"), log, **options)


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
    monkeypatch.setattr(workers, "run_here", None)
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


def test_a_damaged_image_is_named_by_a_worker_and_the_rest_stops(dataset, capsys):
    register(dataset)
    whole = taken(dataset)
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    pickled = prepared.folder / "case_02.pkl"
    content = pickled.read_bytes()
    # What is known of it is read before; a worker then finds it damaged.
    pairs = registrar(dataset)
    log = []
    pairs = registrar(dataset, log.append, num_processes=2)
    assert content and whole and pairs
