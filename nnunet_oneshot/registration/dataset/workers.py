"""Runs batches of pairs here, in worker processes, or on a cluster."""

from __future__ import annotations

import dataclasses
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.locks import WorkerContext, ending_workers_at_once
from nnunet_oneshot.registration.dataset.pairs import Pair, PairWork, described
from nnunet_oneshot.registration.pair.registrar import Aligned
from nnunet_oneshot.registration.pair.registration import Registration

Batch = Sequence[Pair]


def run_here(work: PairWork, batches: Sequence[Batch], done: Callable[[int], object]) -> None:
    """One batch after another, in this process.

    Args:
        work: What is done with them.
        batches: Each holds pairs of one atlas.
        done: Called with the number of pairs that have been written since the last call.

    Raises:
        OneShotError: A pair failed; it is named.
    """
    for batch in batches:
        work.register(batch)
        done(len(batch))


def run_in_processes(
    work: PairWork, batches: Sequence[Batch], done: Callable[[int], object], *, num_processes: int
) -> None:
    """Whole batches in worker processes with one thread each. Arguments and errors are those of `run_here`."""
    with worker_processes(min(num_processes, len(batches))) as executor:
        run_by(executor, work, batches, done, at_once=num_processes)


def run_by(
    executor: Executor, work: PairWork, batches: Sequence[Batch], done: Callable[[int], object], *, at_once: int
) -> None:
    """Whole batches by the workers of an executor. After an error no further batch is begun.

    Args:
        executor: Has the workers.
        work: See `run_here`.
        batches: See `run_here`.
        done: See `run_here`.
        at_once: How many batches are given to the workers at a time.

    Raises:
        OneShotError: A pair failed or a worker died; the pairs are named.
    """
    waiting = deque(batches)
    running: dict[Future, Batch] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                batch = waiting.popleft()
                running[executor.submit(_register, work, batch)] = batch
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                with _telling_lost_workers(running[future], list(running.values())):
                    future.result()
                done(len(running.pop(future)))
    finally:
        for future in running:
            future.cancel()


def run_beside(work: PairWork, batches: Sequence[Batch], done: Callable[[int], object], *, num_processes: int) -> None:
    """The deformable stage in this process, on its device; all else in worker processes beside it.

    While a batch is on the device, the workers align the next pairs, and draw and write those before. Arguments and
    errors are those of `run_here`.
    """
    with worker_processes(num_processes) as executor:
        helper = dataclasses.replace(work, device=torch.device("cpu"), network=None, guide=None)
        ahead: deque[tuple[Batch, list[Future]]] = deque()
        written: dict[Future, Pair] = {}
        waiting = deque(batches)
        try:
            while waiting or ahead:
                # One batch for the device, and pairs enough that no worker waits for it.
                while waiting and (len(ahead) < 2 or sum(len(batch) for batch, _ in ahead) < 2 * num_processes):
                    batch = waiting.popleft()
                    ahead.append((batch, [executor.submit(_align, helper, pair) for pair in batch]))
                batch, futures = ahead.popleft()
                with _telling_lost_workers(batch, [batch]):
                    aligned, shapes = zip(*(pickle.loads(future.result()) for future in futures), strict=True)
                for pair, registration in zip(batch, work.deform(batch, aligned, shapes), strict=True):
                    written[executor.submit(_keep, helper, pair, registration)] = pair
                _take_written(written, done, at_most=max(len(batch), 2 * num_processes))
            _take_written(written, done, at_most=0)
        finally:
            for future in [*written, *(future for _, futures in ahead for future in futures)]:
                future.cancel()


def _take_written(written: dict[Future, Pair], done: Callable[[int], object], *, at_most: int) -> None:
    """Notes the pairs that have been written; waits until no more than ``at_most`` are still to be."""
    while written:
        finished = [future for future in written if future.done()]
        if not finished:
            if len(written) <= at_most:
                return
            wait(written, return_when=FIRST_COMPLETED)
            continue
        for future in finished:
            with _telling_lost_workers([written[future]], [[pair] for pair in written.values()]):
                future.result()
            del written[future]
        done(len(finished))


@contextmanager
def worker_processes(number: int) -> Iterator[Executor]:
    """Processes that compute with one thread each and end with this one, even where it is killed."""
    executor = ProcessPoolExecutor(number, mp_context=WorkerContext(), initializer=_begin)
    try:
        with ending_workers_at_once():
            yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _telling_lost_workers(own: Batch, running: Sequence[Batch]) -> Iterator[None]:
    """Turns the end of a worker, and what a cluster says of its own, into an `OneShotError` that names the pairs.

    Args:
        own: What was asked for.
        running: Everything that workers may have been at.
    """
    try:
        yield
    except OneShotError:
        raise
    except BrokenProcessPool as error:
        raise OneShotError(
            f"A worker process ended unexpectedly while it registered {' or '.join(map(described, running))}, most "
            f"often because memory ran out: use fewer processes (-np). Pairs that were finished are kept."
        ) from error
    except Exception as error:
        raise OneShotError(
            f"The registration of {described(own)} failed on its worker ({type(error).__name__}: {error}). Pairs that "
            f"were finished are kept. Workers need the same nnunet_oneshot, and the dataset under the same path."
        ) from error


# What a worker keeps between batches: the work whose atlases and networks it has loaded.
_KEPT: dict[bytes, PairWork] = {}


def _own(work: PairWork) -> PairWork:
    """The work as this process has it already, with all that was loaded for it."""
    name = pickle.dumps(work)
    if name not in _KEPT:
        _KEPT.clear()
        _KEPT[name] = work
    return _KEPT.get(name, work)


def _begin() -> None:
    torch.set_num_threads(1)
    threadpool_limits(1)


def _register(work: PairWork, batch: Batch) -> None:
    _own(work).register(batch)


def _align(work: PairWork, pair: Pair) -> bytes:
    """Result of the affine stage and shape of the case; pickled here, since torch would send it as shared memory."""
    own = _own(work)
    image = own.image(pair)
    aligned: Aligned = own.align(pair, image)
    return pickle.dumps((aligned, image.shape[1:]))


def _keep(work: PairWork, pair: Pair, registration: Registration) -> None:
    own = _own(work)
    own.keep(pair, registration, own.image(pair))
