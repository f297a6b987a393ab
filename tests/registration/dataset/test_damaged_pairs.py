"""Registrations whose arrays are wrong although their checksum is right, and cases that were damaged since."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.registration.dataset.cache import RegistrationCache

PLANS = "nnUNetOneShotCPUPlans"
COMMAND = ["-c", "3d_fullres", "-p", PLANS]


@pytest.fixture
def registered(tiny_dataset, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("nnUNet_oneshot_overrides", '{"registration": {"refine_iterations": [1], "search_reach": 0}}')
    dataset = tiny_dataset(n_cases=3, shape=(10, 11, 12))
    plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    assert main(plan) == 0
    assert main(["register", "-d", str(dataset.id), *COMMAND, "--no_figures"]) == 0
    return dataset, RegistrationCache(dataset.preprocessed / "oneshot_registrations" / f"{PLANS}_3d_fullres")


def change(cache, case, **arrays):
    """Writes other arrays into a pair, with their checksum."""
    path = cache.path("case_00", case, ".npz")
    with np.load(path) as stored:
        content = {**dict(stored), **arrays}
    np.savez_compressed(path, **content)
    record = json.loads(path.with_suffix(".json").read_text())
    record["checksum"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(record))


AFFINES = [np.full((4, 4), np.nan), np.zeros((4, 4)), np.eye(3), np.diag([1, np.inf, 1, 1]), np.eye(4, dtype=int)]
ARRAYS = [{"affine": affine} for affine in AFFINES]
ARRAYS += [{"case_shape": np.array([9, 9, 9])}, {"atlas_shape": np.array([10, 11, 13])}, {"case_shape": np.array(3)}]
ARRAYS += [{"velocity_shape": np.array([3, 1, 1, 1])}, {"velocity_bytes": np.zeros((4, 3))}]


def test_pairs_with_wrong_arrays_are_registered_again(registered, capsys):
    dataset, cache = registered
    whole = {case: cache.path("case_00", case, ".npz").read_bytes() for case in ("case_01", "case_02")}
    for arrays in ARRAYS:
        change(cache, "case_01", **arrays)
        capsys.readouterr()
        out = dataset.preprocessed.parent / "out"
        assert main(["register", "-d", str(dataset.id), *COMMAND, "--no_figures"]) == 0
        printed = capsys.readouterr().out
        assert "registration of case_00 to case_01 is damaged and will be computed again" in printed, arrays
        assert {case: cache.path("case_00", case, ".npz").read_bytes() for case in whole} == whole
    change(cache, "case_01", affine=np.full((4, 4), np.nan))
    fold = json.loads((dataset.preprocessed / "splits_final.json").read_text())[0]
    assert main(["propagate", "-d", str(dataset.id), *COMMAND, "-o", str(out)]) == 0
    assert ("is damaged" in capsys.readouterr().out) == ("case_01" in fold["val"])


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[40] ^= 0xFF
    path.write_bytes(bytes(content))


HARMS = [
    ("case_01.pkl", truncate),
    ("case_01.pkl", Path.unlink),
    ("case_00.pkl", truncate),
    ("case_01.b2nd", truncate),
    ("case_01.b2nd", flip),
    ("case_01.b2nd", Path.unlink),
    ("case_00_seg.b2nd", truncate),
]


def test_damaged_cases_are_named(registered, capsys):
    dataset, cache = registered
    folder = dataset.preprocessed / f"{PLANS}_3d_fullres"
    before = {path: path.read_bytes() for path in cache.folder.rglob("*") if path.is_file()}
    for listed in (True, False):
        if not listed:
            # As in a dataset that stock nnU-Net preprocessed.
            (dataset.preprocessed / "oneshot_preprocessed.json").unlink()
        for name, harm in HARMS:
            shutil.copy2(folder / name, dataset.preprocessed.parent / name)
            harm(folder / name)
            command = ["register", "--no_figures"]
            if "_seg" in name:
                out = dataset.preprocessed.parent / "out"
                command = ["propagate", "-i", str(dataset.raw / "imagesTr"), "-o", str(out)]
            capsys.readouterr()
            assert main([*command, "-d", str(dataset.id), *COMMAND]) == 1
            error = capsys.readouterr().err
            assert error.startswith("error: ") and name.split(".")[0] in error
            assert {path: path.read_bytes() for path in before} == before
            shutil.copy2(dataset.preprocessed.parent / name, folder / name)
    assert main(["register", "-d", str(dataset.id), *COMMAND, "--no_figures"]) == 0
    assert "are cached" in capsys.readouterr().out


def test_other_values_in_a_file_of_the_same_size_and_date_are_noticed(registered, capsys, monkeypatch):
    dataset, cache = registered
    path = dataset.preprocessed / f"{PLANS}_3d_fullres" / "case_01.b2nd"
    whole, times = path.read_bytes(), path.stat()
    for place in range(len(whole) // 2, len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(bytes(content))
        with suppress(Exception):
            if np.isfinite(blosc2.open(str(path))[:]).all():
                break
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    # Other settings, with which every pair is registered again.
    monkeypatch.setenv("nnUNet_oneshot_overrides", '{"registration": {"refine_iterations": [2], "search_reach": 0}}')
    capsys.readouterr()
    assert main(["register", "-d", str(dataset.id), *COMMAND, "--no_figures"]) == 1
    error = capsys.readouterr().err
    assert "case_00 to case_01" in error and "holds other values than when it was first registered" in error
    assert cache.load("case_00", "case_01") is not None
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["register", "-d", str(dataset.id), *COMMAND, "--no_figures"]) == 0
