"""Keeps two processes from writing to one place at the same time."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path

from filelock import FileLock, Timeout

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import writing

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
# Locks that this process holds: it does not stand in its own way.
_HELD: dict[Path, FileLock] = {}


def take(path: str | os.PathLike, *, again: bool = True) -> bool:
    """Takes a lock for this process; its end frees it, however it ends. Where a file system has no locks, it is free.

    Args:
        path: The lock's file; its folder must exist.
        again: Whether one that this process holds already counts as free.

    Returns:
        Whether it was free.

    Raises:
        OneShotError: The file cannot be written.
    """
    path = Path(path).absolute()
    if path in _HELD:
        return again
    lock = FileLock(path)
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except NotImplementedError:
            return True
    _HELD[path] = lock
    return True


def free(path: str | os.PathLike) -> None:
    """Gives a lock back and removes its file."""
    lock = _HELD.pop(Path(path).absolute(), None)
    if lock is not None:
        # Before the release, so that nobody else's file is removed; where an open file cannot be, it stays.
        with contextlib.suppress(OSError):
            Path(path).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def waiting_for(path: str | os.PathLike, log: Callable[[str], None], what: str) -> Iterator[None]:
    """Holds a lock for as long as the block lasts; waits for another process that has it, and says so.

    Args:
        path: The lock's file.
        log: Receives the sentence.
        what: What the other process does, such as ``"planning of Dataset004"``.
    """
    if not take(path):
        log(f"Waiting for another {what}, which holds {path}.")
        lock = FileLock(path)
        with writing(path):
            lock.acquire()
        _HELD[Path(path).absolute()] = lock
    try:
        yield
    finally:
        free(path)


def take_or_refuse(path: str | os.PathLike, what: str) -> None:
    """Takes a lock; see `take`.

    Args:
        path: The lock's file.
        what: What another process that has it does, such as ``"training"``.

    Raises:
        OneShotError: Another process has it.
    """
    if not take(path):
        raise OneShotError(
            f"Another {what} is at work in {Path(path).parent} and holds {Path(path).name}: wait until it ends, or "
            f"stop it. Its end frees the lock."
        )


def held_descriptors() -> tuple[int, ...]:
    """The open files of all locks that this process holds: a command that is given them holds the locks too."""
    descriptors = (getattr(lock._context, "lock_file_fd", None) for lock in _HELD.values())
    return tuple(descriptor for descriptor in descriptors if descriptor is not None) if os.name == "posix" else ()


def _forget_in_child() -> None:
    """A forked worker keeps no lock of its parent, which would outlive it."""
    for lock in _HELD.values():
        descriptor = getattr(lock._context, "lock_file_fd", None)
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            lock._context.lock_file_fd = None
    _HELD.clear()


def ending_with_parent() -> Callable[[], None] | None:
    """What a new child of this process calls to be ended with it, even where it is killed; None where nothing does."""
    if sys.platform != "linux":
        return None
    # Loaded here, since a forked process should load nothing.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _end_with(parent: int) -> None:
    """Called in a process that was started, not forked: it is ended with its parent, even where that one is killed.

    Only Linux does it; elsewhere nothing changes.

    Args:
        parent: Number of the process that started this one.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


class _SpawnedWorker(SpawnProcess):
    """Ends with its parent, and leaves Ctrl-C, which would end it with a traceback, to it."""

    _parent_pid: int  # Python's.

    def run(self) -> None:
        _end_with(self._parent_pid)
        super().run()

    def start(self) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or not hasattr(signal, "pthread_sigmask"):
            super().start()
            return
        # Its start, which the first worker's would bring about, lifts the block.
        resource_tracker.ensure_running()
        # What is blocked when a process is started is blocked in it; here it waits until the worker is there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ending_workers_at_once() -> Iterator[None]:
    """Ctrl-C in the block ends all worker processes, which leave it to this one, instead of waiting for their work."""
    try:
        yield
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


class WorkerContext(SpawnContext):
    """Starts worker processes anew: forking a process that has started threads (torch, SimpleITK) can hang.

    They end with the process that started them, even where it is killed.
    """

    Process = _SpawnedWorker


def end_spawned_workers_with_this_process() -> None:
    """From now on workers that others start anew, such as those of nnU-Net's validation, are those of `WorkerContext`.

    They would wait for ever for a process that was killed.
    """
    SpawnContext.Process = _SpawnedWorker


@lru_cache(maxsize=1)
def end_workers_with_this_process() -> None:
    """From now on forked workers end when this process is killed; they would wait for it for ever.

    They leave Ctrl-C to this process; see `ending_workers_at_once`.
    """
    if ask := ending_with_parent():
        own = os.getpid()

        def begin() -> None:
            if os.getppid() == own:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                ask()

        os.register_at_fork(after_in_child=begin)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
