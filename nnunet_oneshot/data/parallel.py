"""Runs one function on many cases in worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.locks import WorkerContext, ending_workers_at_once
from nnunet_oneshot.progress import Progress


def default_processes(upper: int = 8) -> int:
    """``nnUNet_def_n_proc`` where it is set, else ``upper``, and never more than there are cores.

    Raises:
        OneShotError: The variable is no whole number.
    """
    wanted = os.environ.get("nnUNet_def_n_proc", str(upper))
    try:
        number = int(wanted)
    except ValueError as error:
        raise OneShotError(
            f"The environment variable nnUNet_def_n_proc is {wanted!r}: set it to a whole number of processes, such as "
            f"{upper}, or unset it."
        ) from error
    return max(1, min(number, upper, os.cpu_count() or 1))


def run_on_cases(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    *,
    num_processes: int,
    description: str,
    show_progress: bool = True,
) -> list[Any]:
    """Calls ``function(*job)`` for every job, in order of the jobs.

    Args:
        function: A picklable function.
        jobs: Positional arguments, one tuple a case.
        num_processes: Worker processes; with 1 everything runs in this process.
        description: Shown beside the progress bar.
        show_progress: Whether to show a progress bar.

    Raises:
        OneShotError: A worker died (other exceptions of the function are passed on).
    """
    results: list[Any] = [None] * len(jobs)
    num_processes = max(1, min(num_processes, len(jobs)))
    with Progress(len(jobs), description, show=show_progress) as progress:
        if num_processes == 1:
            for index, job in enumerate(jobs):
                results[index] = function(*job)
                progress.update()
            return results
        with ProcessPoolExecutor(num_processes, mp_context=WorkerContext()) as executor:
            try:
                with ending_workers_at_once():
                    futures = {executor.submit(function, *job): index for index, job in enumerate(jobs)}
                    for future in as_completed(futures):
                        results[futures[future]] = future.result()
                        progress.update()
            except BrokenProcessPool as error:
                raise OneShotError(
                    f"A worker process ended unexpectedly during {description.lower()!r}, most often because memory "
                    f"ran out: use fewer processes (now {num_processes}; see -np and -npfp)."
                ) from error
            finally:
                executor.shutdown(wait=True, cancel_futures=True)
    return results
