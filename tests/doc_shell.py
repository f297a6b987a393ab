"""Runs bash blocks of the documentation as they stand, in one shell.

Commands of nnU-Net and of this package that the shell starts run in this process, which spares each of them the seconds
that Python needs to load torch, and lets a test shorten trainings. ``pip`` does nothing; all else is what it is.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import distribution
from multiprocessing.connection import Client, Listener
from pathlib import Path
from unittest import mock

_VARIABLE, _KEY = "NNUNET_ONESHOT_TEST_SHELL", b"documentation"
# Fewer processes than by default: starting one takes as long as all that it does here.
_SPARING = {"nnUNetv2_predict": ["-npp", "0", "-nps", "0"], "nnUNetv2_evaluate_folder": ["-np", "1"]}
_CLIENT = f"""
import os, sys
from multiprocessing.connection import Client
with Client(os.environ["{_VARIABLE}"], authkey={_KEY!r}) as runner:
    runner.send(([os.path.basename(sys.argv[1]), *sys.argv[2:]], os.getcwd(), dict(os.environ)))
    sys.exit(runner.recv())
"""
_BLOCK = re.compile(r"^([^\n]*)\n\n```bash\n(.*?)```$", re.DOTALL | re.MULTILINE)


def bash_blocks(text: str, *, without: str | None = None) -> list[str]:
    """The bash blocks of a page, except those whose introducing line is ``without``."""
    found = _BLOCK.findall(text)
    assert len(found) == text.count("```bash\n"), "a block without an introducing line and a blank line before it"
    return [block for line, block in found if line != without]


def console_scripts() -> dict:
    """Name to entry point of the commands of nnU-Net and of this package."""
    packages = ("nnunetv2", "nnunet_oneshot")
    return {entry.name: entry for package in packages for entry in distribution(package).entry_points}


def run_blocks(blocks: Sequence[str], folder: Path, tools: Path) -> list[list[str]]:
    """Runs the blocks in one bash, which ends at the first command that fails.

    Args:
        blocks: The blocks.
        folder: Where they run.
        tools: A new folder, for what the shell finds in place of the commands.

    Returns:
        The commands that ran in this process, with their arguments.

    Raises:
        AssertionError: A command failed; the message holds the shell's output.
    """
    tools.mkdir()
    (tools / "client.py").write_text(_CLIENT, encoding="utf-8")
    for name in (*console_scripts(), "pip"):
        line = "exit 0" if name == "pip" else f'exec "{sys.executable}" -ISE "{tools / "client.py"}" "$0" "$@"'
        (tools / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    ran = []
    with Listener(authkey=_KEY) as listener, open(tools / "output.txt", "w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
            cwd=folder,
            env={**os.environ, "PATH": path, _VARIABLE: listener.address},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

        def say_when_it_ends() -> None:
            process.wait()
            with contextlib.suppress(OSError), Client(listener.address, authkey=_KEY) as runner:
                runner.send(None)

        threading.Thread(target=say_when_it_ends).start()
        try:
            while True:
                with listener.accept() as shell:
                    if (request := shell.recv()) is None:
                        break
                    ran.append(request[0])
                    shell.send(_run(*request))
        finally:
            process.kill()
        output.seek(0)
        assert process.returncode == 0, f"the last command of {ran[-1:]} or after it\n{output.read()}"
    return ran


def _run(command: Sequence[str], folder: str, environment: Mapping[str, str]) -> int:
    """Runs a command in this process, in another folder and with other variables; its exit status."""
    name, here = command[0], os.getcwd()
    arguments = [*command, *_SPARING.get(name, ())]
    with mock.patch.dict(os.environ, environment, clear=True), mock.patch.object(sys, "argv", arguments):
        os.chdir(folder)
        try:
            with contextlib.redirect_stderr(sys.stdout):
                return console_scripts()[name].load()() or 0
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            os.chdir(here)
