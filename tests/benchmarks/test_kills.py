"""What a killed command left, judged against undisturbed runs; and processes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from nnunet_oneshot.benchmarks import kills
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.pair.registration import Registration

QUALITY = {"similarity_before": 0.2, "similarity_after": 0.5, "folding": 0.0, "affine_start": "moments"}


@pytest.fixture
def folders(tmp_path):
    """Three equal folders of results, but for a time that differs between all of them."""
    found = [tmp_path / name for name in ("left", "reference", "again")]
    for number, folder in enumerate(found):
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps({"patch": [8, 8], "seconds": number}))
        (folder / "data.bin").write_bytes(b"abc")
        (folder / "training_log_2026.txt").write_text(str(number))
        velocity = np.full((3, 4, 4, 4), 0.5, np.float32)
        pair = Registration("a", "b", np.eye(4), velocity, (8, 8, 8), (8, 8, 8), QUALITY)
        RegistrationCache(folder / FOLDER / "p").save(pair, key="k", sources={}, parameters={}, versions={})
    return found


def test_equal_results_do_not_deviate_and_times_do_not_count(folders):
    assert not list(kills.deviations(*folders))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("plan.json", '{"patch": [8, 9], "seconds": 0}', "plan.json: /patch/1 of 2 entries"),
        ("data.bin", "abd", "data.bin: bytes of 1 entries"),
        (".partial-1-x", "", ".partial-1-x is left over"),
        ("training.lock", "", "training.lock is left over"),
    ],
)
def test_what_deviates_is_named(folders, name, content, sentence):
    (folders[0] / name).write_text(content)
    assert list(kills.deviations(*folders)) == [sentence]


def test_what_is_missing_is_named(folders):
    (folders[0] / "data.bin").unlink()
    assert list(kills.deviations(*folders)) == ["data.bin is missing"]


@pytest.mark.parametrize(("moved", "deviates"), [(1 / 16, False), (1 / 4, True)])
def test_registrations_may_differ_by_one_step_of_their_file(folders, moved, deviates):
    shutil.rmtree(folders[0] / FOLDER)
    velocity = np.full((3, 4, 4, 4), 0.5 + moved, np.float32)
    pair = Registration("a", "b", np.eye(4), velocity, (8, 8, 8), (8, 8, 8), QUALITY)
    RegistrationCache(folders[0] / FOLDER / "p").save(pair, key="k", sources={}, parameters={}, versions={})
    assert any("velocities" in sentence for sentence in kills.deviations(*folders)) == deviates


@pytest.mark.skipif(sys.platform != "linux", reason="processes are searched for as Linux does it")
def test_a_group_is_killed_and_others_with_its_mark_are_found():
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], env={"kills_test": "1"}, start_new_session=True)
    until = time.monotonic() + 20
    # A child leaves its parent's group some time after it was made.
    while sum(os.getpgid(p) == p for p in kills._marked(b"kills_test=1")) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    kills._kill(process)
    (left,) = kills._marked(b"kills_test=1")
    assert left != process.pid
    subprocess.run(["kill", str(left)], check=True)


def test_steps_come_with_those_they_need():
    assert [step.name for step in kills._with_needed(["export"])] == [
        "preprocessing",
        "registration",
        "training",
        "export",
    ]
