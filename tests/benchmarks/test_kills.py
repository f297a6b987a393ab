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


@pytest.mark.parametrize(
    ("status", "text", "fault"),
    [
        (1, "I am local rank 1\nerror: Process 1 of the 2 processes of this training was ended (SIGTERM).", ""),
        (1, "I am local rank 1\nOneShotError: Another of the 2 processes of this training has ended, so", ""),
        (1, "using port 1", ""),
        (1, "I am local rank 1", "rank 1 says nothing"),
        (1, "I am local rank 1\nerror: Process 0 of the 2 processes", "rank 1 says nothing"),
        (0, "I am local rank 1\nerror: Process 1 of the 2 processes", "ends with status 0 without rank 0"),
        (None, "error: Process 1 of the 2 processes", "hangs without rank 0"),
    ],
)
def test_a_training_that_lost_a_rank_must_end_and_say_so(status, text, fault):
    assert kills._fault("rank 0", status, text) == fault


@pytest.mark.skipif(sys.platform != "linux", reason="processes are searched for as Linux does it")
def test_ranks_are_found_among_the_children(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, time\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    for _ in range(2):\n"
        "        context.Process(target=time.sleep, args=(60,), daemon=True).start()\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    until = time.monotonic() + 20
    while len(found := kills._ranks(process)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    kills._kill(process)
    assert len(found) == 2 and found == sorted(found) and process.pid not in found
    assert kills._ranks(process) == []


def test_steps_come_with_those_they_need():
    assert [step.name for step in kills._with_needed(["export"])] == [
        "preprocessing",
        "registration",
        "training",
        "export",
    ]


def test_trials_are_summed_up_by_step():
    rows = [
        {"step": "training", "kills": 2, "survivors": 0, "passed": True},
        {"step": "export", "kills": 1, "survivors": 3, "passed": False},
        {"step": "training", "kills": "1", "survivors": "0", "passed": "True"},
    ]
    assert kills.summarised(rows).splitlines() == [
        "step,trials,kills,as if undisturbed,survivors",
        "training,2,3,2,0",
        "export,1,1,0,3",
        "all,3,4,2,3",
    ]
