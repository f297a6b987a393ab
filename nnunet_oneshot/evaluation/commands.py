"""Runs nnU-Net's commands and our own as a user would type them, in an environment with its own folders."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_oneshot.environment import VARIABLE, ext_trainer_value
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.locks import ending_with_parent, held_descriptors
from nnunet_oneshot.progress import Status, duration

_TAIL_LINES = 25
_TAIL_BYTES = 2000


@dataclass(frozen=True)
class CommandResult:
    """What a finished command cost.

    Attributes:
        line: The command as typed.
        seconds: Wall-clock time.
        peak_memory_mb: Largest resident memory of any of its processes, MiB; None where the system does not tell.
    """

    line: str
    seconds: float
    peak_memory_mb: float | None


@dataclass(frozen=True)
class Watch:
    """What is shown while a command runs.

    Attributes:
        describe: Says what the command does, from its log.
        pause: Seconds between lines where there is no terminal.
    """

    describe: Callable[[Path], str] = field(default_factory=lambda: last_line)
    pause: float = 60.0


def command_environment(
    *,
    raw: str | Path | None = None,
    preprocessed: str | Path | None = None,
    results: str | Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of the commands: this process's, with nnU-Net's folders set and our trainers made findable.

    Args:
        raw: ``nnUNet_raw``; None keeps the present one. Likewise the two others.
        preprocessed: ``nnUNet_preprocessed``.
        results: ``nnUNet_results``.
        variables: Further variables.
    """
    environment = dict(os.environ)
    for name, folder in (("nnUNet_raw", raw), ("nnUNet_preprocessed", preprocessed), ("nnUNet_results", results)):
        if folder is not None:
            environment[name] = str(Path(folder).absolute())
    environment[VARIABLE] = ext_trainer_value(environment.get(VARIABLE))
    environment["PYTHONUNBUFFERED"] = "1"
    environment.update(variables or {})
    return environment


def run_command(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    log_file: str | Path,
    cwd: str | Path | None = None,
    limit: float | None = None,
    watch: Watch | None = None,
) -> CommandResult:
    """Runs one command, its output going to a log file.

    Args:
        arguments: The command's name (found beside this interpreter, else on the path) and its arguments.
        environment: See `command_environment`.
        log_file: Overwritten.
        cwd: Working folder.
        limit: Seconds after which the command is ended; None for none.
        watch: Tells what is shown meanwhile; None shows the last line of the log.

    Raises:
        TimeoutError: The command took longer than ``limit``.
        OneShotError: The command does not exist or ends with a status other than 0; the message holds the log's end.
    """
    line = shlex.join(arguments)
    executable = _find_executable(arguments[0])
    log_file = Path(log_file)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [executable, *arguments[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=ending_with_parent(),
            # Where a command can outlive this process, it keeps what this process has locked.
            pass_fds=() if ending_with_parent() else held_descriptors(),
        )
        try:
            status, peak = _wait(process, log_file, limit=limit, watch=watch or Watch())
        except BaseException:
            _stop(process)
            raise
    if status != 0:
        tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        raise OneShotError(f"`{line}` ended with status {status}. The end of its output ({log_file}):\n{tail}")
    return CommandResult(line=line, seconds=time.monotonic() - start, peak_memory_mb=peak)


def _stop(process: subprocess.Popen) -> None:
    """Ends a command with the worker processes it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()
    process.wait()


def _wait(process: subprocess.Popen, log_file: Path, *, limit: float | None, watch: Watch) -> tuple[int, float | None]:
    """Exit status of a process and its peak memory in MiB; meanwhile it is told what the process does."""
    start, shown = time.monotonic(), Status(pause=watch.pause)
    try:
        while True:
            if not hasattr(os, "wait4"):
                if process.poll() is not None:
                    return process.returncode, None
            else:
                found, raw_status, usage = os.wait4(process.pid, os.WNOHANG)
                if found:
                    break
            waited = time.monotonic() - start
            # Short commands are not made longer.
            time.sleep(min(1.0, 0.01 + waited / 20))
            if limit is not None and waited > limit:
                raise TimeoutError
            if waited > 1:
                shown.tell(f"  {duration(waited)}: {watch.describe(log_file)}")
    finally:
        shown.clear()
    process.returncode = os.waitstatus_to_exitcode(raw_status)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return process.returncode, usage.ru_maxrss / unit


def last_line(log_file: Path) -> str:
    """The last line of a log that is not empty."""
    with open(log_file, "rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
        lines = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _find_executable(name: str) -> str:
    beside = Path(sys.executable).parent
    for candidate in (beside / name, beside / f"{name}.exe"):
        if candidate.is_file():
            return str(candidate)
    found = shutil.which(name)
    if found is None:
        raise OneShotError(
            f"The command {name!r} is neither in {beside} nor on the path: install nnunetv2 and nnunet_oneshot into "
            f"the Python environment that runs this program."
        )
    return found
