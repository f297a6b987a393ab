"""Registers on the workers of a dask cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

from nnunet_oneshot.errors import OneShotError

_SECONDS_TO_ANSWER = 20


@contextmanager
def cluster_workers(scheduler: str, log: Callable[[str], None]) -> Iterator[Executor]:
    """The workers of a running dask cluster.

    Args:
        scheduler: Address of its scheduler, such as ``tcp://node01:8786``, or the file that
            ``dask scheduler --scheduler-file`` wrote.
        log: Receives how many workers there are.

    Raises:
        OneShotError: The package ``distributed`` is missing, or no scheduler answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise OneShotError(
            f"--scheduler needs the package distributed, which cannot be imported ({error}): install it with "
            f'`pip install "nnunet_oneshot[cluster]"`.'
        ) from error
    place = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        client = Client(**place, timeout=_SECONDS_TO_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise OneShotError(
            f"No dask scheduler answers at {scheduler!r} ({type(error).__name__}: {error}): expected the address that "
            f"`dask scheduler` prints, such as tcp://node01:8786, or the file that it writes with --scheduler-file."
        ) from error
    with client:
        threads = sum(worker["nthreads"] for worker in client.scheduler_info(n_workers=-1)["workers"].values())
        log(
            f"The cluster of {scheduler} has {threads} worker threads" + ("." if threads else " yet: waiting for them.")
        )
        yield client.get_executor(pure=False)
