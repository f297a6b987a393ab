"""The demonstration refuses folders that are not its own."""

import json
import time
from pathlib import Path

import pytest

from nnunet_oneshot.demo.run import MARKER, run_demo
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation import commands


def test_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "nnUNet_raw").mkdir()
    (tmp_path / "nnUNet_raw" / "data.txt").write_text("x")
    with pytest.raises(OneShotError, match="nothing in it was touched"):
        run_demo(tmp_path)
    assert (tmp_path / "nnUNet_raw" / "data.txt").read_text() == "x"
    assert not (tmp_path / MARKER).exists()


def test_file_in_place_of_the_folder_is_an_error(tmp_path):
    target = tmp_path / "out"
    target.write_text("x")
    with pytest.raises(OneShotError, match="is a file"):
        run_demo(target)


def test_failing_command_shows_the_end_of_its_output(tmp_path):
    with pytest.raises(OneShotError, match="status 3.*\n.*the reason"):
        commands.run_command(
            ["python", "-c", "import sys; print('the reason'); sys.exit(3)"],
            environment=commands.command_environment(),
            log_file=tmp_path / "log.txt",
        )


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(TimeoutError):
        commands.run_command(
            ["python", "-c", "import time; time.sleep(600)"],
            environment=commands.command_environment(),
            log_file=tmp_path / "log.txt",
            limit=0.3,
        )


def test_what_a_command_does_is_told_from_its_log(tmp_path, capsys):
    commands.run_command(
        ["python", "-c", "import time; print('x', flush=True); time.sleep(2)"],
        environment=commands.command_environment(),
        log_file=tmp_path / "log.txt",
        watch=commands.Watch(lambda log: f"it wrote {log.read_text().strip()}", pause=0.5),
    )
    assert "s: it wrote x" in capsys.readouterr().err


def test_missing_command_is_named(tmp_path):
    with pytest.raises(OneShotError, match="no_such_command_here"):
        commands.run_command(["no_such_command_here"], environment={}, log_file=tmp_path / "log.txt")


def test_command_reports_time_and_memory(tmp_path):
    code = "import os, json; print(json.dumps(os.environ['nnUNet_raw']))"
    environment = commands.command_environment(raw=tmp_path, variables={"nnUNet_n_proc_DA": "1"})
    result = commands.run_command(["python", "-c", code], environment=environment, log_file=tmp_path / "log.txt")
    assert json.loads((tmp_path / "log.txt").read_text()) == str(tmp_path)
    assert result.seconds > 0 and result.peak_memory_mb > 1
    assert environment["nnUNet_extTrainer"].endswith("ext_trainer")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes through /proc")
def test_interruption_ends_the_workers_of_a_command(tmp_path, monkeypatch):
    code = (
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(worker.pid, flush=True)\ntime.sleep(600)\n"
    )
    log = tmp_path / "log.txt"

    def interrupted(process, log_file, **_):
        while not log.read_text().strip():
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commands.run_command(["python", "-c", code], environment=commands.command_environment(), log_file=log)
    worker = Path("/proc") / log.read_text().strip() / "cmdline"
    deadline = time.monotonic() + 10
    while worker.exists() and b"time.sleep" in worker.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or b"time.sleep" not in worker.read_bytes()


def test_existing_trainer_folders_are_kept(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/somewhere/else")
    first, ours = commands.command_environment()["nnUNet_extTrainer"].split(":")
    assert first == "/somewhere/else" and ours.endswith("ext_trainer")


@pytest.mark.slow
def test_demonstration_runs_every_command(tmp_path):
    lines = []
    report = run_demo(
        tmp_path / "out",
        trainer="OneShotDistillTrainer_1epoch",
        training_cases=3,
        test_cases=1,
        log=lines.append,
    )
    typed = [line.split()[1] for line in lines if line.startswith("$ nn")]
    assert typed.count("nnUNetv2_train") == typed.count("nnUNetv2_predict") == 1
    assert len(report["commands"]) == len([line for line in lines if line.startswith("$ nn")])
    assert "Step 3 of 8: train the student" in lines
    assert report["mean_dice"]["propagation"] > 0.4
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "exported_model" / "fold_0" / "checkpoint_final.pth").is_file()
    (tmp_path / "out" / "predictions" / "student" / "mine.txt").touch()
    with pytest.raises(OneShotError, match="status"):
        run_demo(tmp_path / "out", trainer="NoSuchTrainer", training_cases=2, test_cases=1, log=lines.append)
    assert not (tmp_path / "out" / "predictions" / "student" / "mine.txt").exists()
