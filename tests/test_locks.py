"""Who may write while another does."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess

import pytest

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.locks import WorkerContext, free, take, take_or_refuse, waiting_for

HOLD = """
import sys, time
from nnunet_oneshot.locks import take
assert take(sys.argv[1])
print("held", flush=True)
{fork}
time.sleep(60)
"""
FORK = "import os\nif os.fork() == 0:\n    time.sleep(60)"


def holder(path, fork=""):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(fork=fork), str(path)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_another_process_is_refused_until_the_first_is_killed(tmp_path):
    path = tmp_path / "training.lock"
    process = holder(path)
    assert not take(path)
    with pytest.raises(OneShotError, match="Another training is at work in .* and holds training.lock"):
        take_or_refuse(path, "training")
    process.kill()
    process.wait()
    take_or_refuse(path, "training")
    free(path)
    assert not path.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks there")
def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    path = tmp_path / "training.lock"
    process = holder(path, FORK)
    time.sleep(0.3)
    process.kill()
    process.wait()
    try:
        assert take(path)
    finally:
        free(path)
        os.killpg(process.pid, 9)


def test_a_process_does_not_stand_in_its_own_way(tmp_path):
    path = tmp_path / "a.lock"
    assert take(path) and take(path)
    free(path)


def test_waiting_says_for_what_and_goes_on_when_the_other_ends(tmp_path):
    path, said = tmp_path / "plan.lock", []
    process = holder(path)

    def log(sentence):
        said.append(sentence)
        process.kill()

    with waiting_for(path, log, "planning of Dataset004"):
        assert "Waiting for another planning of Dataset004" in said[0]
    process.wait()
    assert not path.exists()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_while_a_worker_starts_is_not_lost(monkeypatch):
    monkeypatch.setattr(SpawnProcess, "start", lambda self: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        WorkerContext().Process(target=print).start()
        time.sleep(1)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


POOL = """
import multiprocessing, sys, time
from nnunet_oneshot.locks import end_spawned_workers_with_this_process

if __name__ == "__main__":
    end_spawned_workers_with_this_process()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(abs, range(2))
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_pool_of_others_ends_with_its_process(number, tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    process.send_signal(number)
    process.wait()
    until = time.monotonic() + 20
    while (left := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left
