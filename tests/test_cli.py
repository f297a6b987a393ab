"""The command line: fast, free of torch until it is needed, and clear about errors."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import nnunet_oneshot
from nnunet_oneshot.cli import build_parser, main
from nnunet_oneshot.environment import TRAINER_FOLDER, ext_trainer_value
from nnunet_oneshot.errors import OneShotError


def run(*arguments, **variables):
    environment = {key: value for key, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-m", "nnunet_oneshot.cli", *arguments], capture_output=True, text=True, env=environment
    )


def test_importing_package_and_command_line_does_not_load_torch():
    code = "import sys, nnunet_oneshot, nnunet_oneshot.cli as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_answers_within_a_third_of_a_second():
    def seconds():
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    # The best of several: other work on the machine must not fail this test.
    assert min(seconds() for _ in range(7)) < 0.3


@pytest.mark.parametrize("command", build_parser()._subparsers._group_actions[0].choices)
def test_help_of_a_command_does_not_load_torch(command):
    code = "import sys, nnunet_oneshot.cli as c\ntry: c.main(sys.argv[1:])\nfinally: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (
            ["register-pair", "a.nii.gz", "b.nii.gz", "-o", "out", "--similarity", "loud"],
            "'lncc', 'mse', 'mind', 'nmi'",
        ),
        (
            ["propagate", "-d", "1", "-c", "2d", "-o", "out", "--method", "loud"],
            "'registration', 'corrected', 'affine', 'syn'",
        ),
    ],
    ids=["similarity", "method"],
)
def test_a_name_that_is_not_registered_is_a_usage_error_that_lists_those_that_are(arguments, known, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    message = capsys.readouterr().err
    assert f"argument {arguments[-2]}: invalid choice: 'loud' (choose from" in message and known in message


# In a process of its own: here, other tests have loaded the registries.
@pytest.mark.parametrize(
    ("arguments", "block", "setting"),
    [
        (["benchmark", "--methods", "affine", "--set", "distillation.hint=loud"], {}, "hint"),
        (["benchmark", "--methods", "affine", "--set", "registration.similarity=loud"], {}, "similarity"),
        (["propagate"], {"distillation": {"hint": "loud"}}, "hint"),
        (["register"], {"distillation": {"hint": "loud"}}, "hint"),
    ],
)
def test_names_in_settings_are_checked_before_anything_runs(prepared_dataset, tmp_path, arguments, block, setting):
    dataset = prepared_dataset(n_cases=5)
    out = [] if arguments[0] == "register" else ["-o", str(tmp_path / "out")]
    common = ["-d", str(dataset.id), "-c", "3d_fullres", "-p", "nnUNetOneShotCPUPlans", *out]
    result = run(arguments[0], *common, *arguments[1:], nnUNet_oneshot_overrides=json.dumps(block) if block else None)
    assert result.returncode == 1, result.stderr
    assert f'"{setting}"' in result.stderr and "loud" in result.stderr
    assert not (tmp_path / "out").exists()


def test_version():
    assert run("--version").stdout.strip() == f"nnunet_oneshot {nnunet_oneshot.__version__}"


def test_no_command_is_a_usage_error():
    result = run()
    assert result.returncode == 2
    assert "usage" in result.stderr


def test_commands_are_listed_in_alphabetical_order():
    (action,) = build_parser()._subparsers._group_actions
    assert list(action.choices) == sorted(action.choices)


def test_errors_a_user_can_mend_are_printed_without_traceback(monkeypatch, capsys):
    def fail():
        raise OneShotError("case_7 is broken: mend it.")

    monkeypatch.setattr("nnunet_oneshot.environment.shell_export", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "error: case_7 is broken: mend it.\n"


def test_an_error_that_doctor_explains_points_to_it(tiny_dataset, capsys):
    tiny_dataset()
    assert main(["register", "-d", "7", "-c", "3d_fullres"]) == 1
    assert capsys.readouterr().err.endswith("\nnnunet_oneshot doctor -d 7 tells more.\n")
    assert main(["plan_and_preprocess", "-d", "8", "9"]) == 1
    assert capsys.readouterr().err.endswith("\nnnunet_oneshot doctor -d 8 tells more.\n")


def test_an_interruption_ends_with_a_sentence(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_oneshot.environment.shell_export", interrupt)
    assert main(["env"]) == 130
    assert "Type the same command to go on" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="sends the signal of Ctrl-C to a group of processes")
def test_an_interruption_ends_workers_at_once_and_without_traceback(tmp_path):
    (tmp_path / "work.py").write_text(
        "import sys, time\n"
        "from nnunet_oneshot.data.parallel import run_on_cases\n"
        "from nnunet_oneshot.errors import exit_status\n"
        "def work(number):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    jobs = [(1,), (2,), (3,)]\n"
        "    sys.exit(exit_status(lambda: run_on_cases(work, jobs, num_processes=2, description='Sleeping')))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "work.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted." in errors and "Traceback" not in errors


def test_other_errors_are_not_hidden(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr("nnunet_oneshot.environment.shell_export", fail)
    with pytest.raises(ZeroDivisionError):
        main(["env"])


@pytest.mark.parametrize("current", [None, ""])
def test_env_sets_the_trainer_folder(current):
    result = run("env", nnUNet_extTrainer=current)
    assert result.stdout == f"export nnUNet_extTrainer={shlex.quote(str(TRAINER_FOLDER))}\n"


def test_env_keeps_what_is_listed_and_adds_nothing_twice():
    once = ext_trainer_value("/other place")
    assert once.split(os.pathsep) == ["/other place", str(TRAINER_FOLDER)]
    assert ext_trainer_value(once) == once


def test_env_is_quoted_for_the_shell():
    folder = "/it's; echo $HOME"
    line = run("env", nnUNet_extTrainer=folder).stdout
    shell = subprocess.run(["sh", "-c", f'{line}printf %s "$nnUNet_extTrainer"'], capture_output=True, text=True)
    assert shell.stdout == f"{folder}{os.pathsep}{TRAINER_FOLDER}"


def test_trainer_folder_holds_one_module():
    assert [path.name for path in Path(TRAINER_FOLDER).glob("*.py")] == ["nnunet_oneshot_trainers.py"]
