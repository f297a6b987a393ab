"""The processes of a training on several GPUs: what one of them does for all, and what all of them share."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.seeding import derive_seed

# Registrations of many cases take hours, during which other ranks wait; NCCL's own limit is ten minutes.
_LONGEST_WAIT = timedelta(days=100)

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

_WHY = (
    "its own message says why. Where it has none, it was killed, most often because memory ran out. Go on from the "
    "last checkpoint with --c."
)

_Result = TypeVar("_Result")


class Ranks:
    """The ranks of ``nnUNetv2_train -num_gpus N``, nnU-Net's own process group; one process where there is none.

    All methods but `seed` and `telling_lost` must be called by all ranks, in the same order.

    Attributes:
        own: Number of this process, from 0.
        count: How many there are.
    """

    def __init__(self) -> None:
        is_on = distributed.is_available() and distributed.is_initialized()
        self.own, self.count = (distributed.get_rank(), distributed.get_world_size()) if is_on else (0, 1)
        # On the CPU, so that waiting ranks leave their GPU alone and see at once when another has ended.
        self._group: Any = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT) if self.count > 1 else None
        if self.count > 1:
            _tell_when_ended(self.own, self.count)

    def seed(self, seed: int) -> int:
        """A seed of this rank alone; the first rank keeps the given one."""
        return derive_seed(seed, self.own) if self.own else seed

    def once(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function in the first rank, for which the others wait, and gives its result to all.

        Args:
            function: Returns something that can be pickled.

        Raises:
            OneShotError: The function raised it, or the first rank has ended.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.own == 0:
            try:
                outcome[0] = function()
            except OneShotError as error:
                outcome[1] = str(error)
        with self.telling_lost():
            distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise OneShotError(outcome[1])
        return outcome[0]

    def gathered(self, values: Sequence[_Result]) -> list[_Result]:
        """The values of all ranks one after the other, those of the first rank first."""
        if self.count == 1:
            return list(values)
        found: list[Any] = [None] * self.count
        with self.telling_lost():
            distributed.all_gather_object(found, list(values), group=self._group)
        return [value for part in found for value in part]

    def align(self, module: nn.Module) -> None:
        """Gives a module the weights that it has in the first rank."""
        if self.count > 1:
            for tensor in module.state_dict().values():
                distributed.broadcast(tensor, src=0)

    def average_gradients(self, module: nn.Module) -> None:
        """Puts the mean over all ranks in the place of each gradient, as ``DistributedDataParallel`` does.

        It serves where one backward pass does not reach all parameters. A parameter without a gradient keeps none, and
        must have none in any rank.
        """
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(whole)
        whole /= self.count
        for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    @contextmanager
    def telling_lost(self) -> Iterator[None]:
        """Turns what torch raises when another rank has ended into an `OneShotError`."""
        try:
            yield
        except OneShotError:
            raise
        except RuntimeError as error:
            if self.count == 1 or not _is_about_ranks(error):
                raise
            raise OneShotError(
                f"Another of the {self.count} processes of this training has ended, so that process {self.own} cannot "
                f"go on: {_WHY}"
            ) from error


def _is_about_ranks(error: RuntimeError) -> bool:
    """Whether an error tells of other processes; those of gloo have no class of their own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


@lru_cache(maxsize=1)
def _tell_when_ended(own: int, count: int) -> None:
    """From now on this rank says a sentence when it is ended by SIGTERM, also with the command that started it.

    When one rank has ended, ``nnUNetv2_train`` ends the others so, mostly before they miss it themselves. Python would
    run a handler only where the main thread returns to it, which may wait for the lost rank; a thread is told at once.
    """
    parent = multiprocessing.parent_process()
    is_main = threading.current_thread() is threading.main_thread()
    if os.name != "posix" or parent is None or not is_main:
        return
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    def tell() -> None:
        while signal.SIGTERM not in os.read(reads, 1):
            pass
        print(
            f"error: Process {own} of the {count} processes of this training was ended (SIGTERM). This happens when "
            f"another one, or the command that started them, has ended: {_WHY}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    # A worker that is ended before it has left all this behind would end its rank instead.
    os.register_at_fork(
        before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, {signal.SIGTERM}),
        after_in_parent=_let_end,
        after_in_child=_end_as_usual,
    )
    threading.Thread(target=tell, daemon=True).start()
    if sys.platform == "linux":
        # torch asks for SIGINT when the command is killed, which is ignored in what runs in the background of a script.
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent.pid:
        raise SystemExit(f"error: The command that started process {own} of this training was killed: give it again.")


def _let_end() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_as_usual() -> None:
    """A forked worker ends without a word, as if it had not been started by a rank."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_end()
