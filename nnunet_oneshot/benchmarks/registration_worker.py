"""Runs each registration method in its own process to measure its memory: ``python -m ... METHOD``.

The process reads pickled settings and then pairs, one after another, from its standard input, and answers each on its
standard output. It loads only the libraries that its method needs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import time
from typing import Any, BinaryIO

import numpy as np

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS, MethodOptions, Volume
from nnunet_oneshot.registry import load_modules

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


class Worker:
    """A method's process, started on construction.

    Args:
        method: One of `REGISTRATION_METHODS`.
        options: Options that are the same for all methods.
    """

    def __init__(self, method: str, options: MethodOptions) -> None:
        self.method = method
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, method],
            env={**os.environ, **{name: str(options.threads) for name in _THREADS}},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._ask(options)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def measure(self, case: Volume, atlas: Volume, atlas_labels: np.ndarray | None = None) -> dict[str, Any]:
        """Registers an atlas to a case.

        Args:
            case: Image and voxel edges.
            atlas: Image and voxel edges.
            atlas_labels: (1, X, Y, Z), only for the ``quality`` figures of ``"ours"``.

        Returns:
            The result of the function `measure`, and ``start_memory_mb``, the resident memory after loading libraries.

        Raises:
            OneShotError: The method failed on this pair, or its process ended.
        """
        reply = self._ask((case, atlas, atlas_labels))
        if "error" in reply:
            raise OneShotError(reply["error"])
        return reply

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._replies.close()
        self._process.wait()

    def _ask(self, request: Any) -> dict[str, Any]:
        try:
            pickle.dump(request, self._requests, protocol=pickle.HIGHEST_PROTOCOL)
            self._requests.flush()
            return pickle.load(self._replies)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            self._process.kill()
            raise OneShotError(
                f"The process of method {self.method} ended with status {self._process.wait()} and no answer; its "
                f"messages are above, and status -9 often means that memory ran out. Leave the method out with "
                f"--methods, or free memory and run the same command again."
            ) from error


def measure(
    method: str, case: Volume, atlas: Volume, options: MethodOptions, *, atlas_labels: np.ndarray | None = None
) -> dict[str, Any]:
    """Registers an atlas to a case in this process.

    Returns:
        ``seconds`` and ``cpu_seconds`` (all threads) from the images in memory to the transform; ``peak_memory_mb`` of
        this process until then (MiB, None if the system does not report it); ``places``: (3, U, V, W) float32, location
        in the atlas of each voxel of the case, voxel coordinates; and for ``"ours"`` the ``quality`` figures.
    """
    register = REGISTRATION_METHODS[method].register
    cpu, started = time.process_time(), time.perf_counter()
    found = register(case, atlas, atlas_labels, options)
    figures = {
        "seconds": round(time.perf_counter() - started, 4),
        "cpu_seconds": round(time.process_time() - cpu, 4),
        "peak_memory_mb": memory_mb()[1],
    }
    return {**figures, **({"quality": found.quality} if found.quality else {}), "places": found.places()}


def memory_mb() -> tuple[float | None, float | None]:
    """Current and peak resident memory of this process, MiB; None if the system does not report it.

    Prefers Linux's own record, because the peak of ``getrusage`` starts at the memory of the parent process.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            entries = dict(line.split(":", 1) for line in file)
        present, peak = (round(int(entries[name].split()[0]) / 2**10, 1) for name in ("VmRSS", "VmHWM"))
        return present, peak
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None, None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return None, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _serve(method: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers the requests of a `Worker` until it closes."""

    def answer(content: dict[str, Any]) -> None:
        pickle.dump(content, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()

    options = pickle.load(requests)
    load_modules()
    # Loaded first, so that neither time nor memory above the start includes them.
    for library in REGISTRATION_METHODS[method].libraries:
        importlib.import_module(library)
    start = memory_mb()[0]
    answer({})
    while True:
        try:
            case, atlas, atlas_labels = pickle.load(requests)
        except EOFError:
            return
        try:
            found = measure(method, case, atlas, options, atlas_labels=atlas_labels)
            answer({**found, "start_memory_mb": start})
        except Exception as error:  # any exception of a library is a failure of the method on this pair
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    # Output of libraries must not mix with the replies.
    own_output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.argv[1], sys.stdin.buffer, own_output)
