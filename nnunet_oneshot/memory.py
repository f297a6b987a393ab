"""Memory of the process that nothing uses any more."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _found() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


# Only the C library of most Linux systems (glibc) has it.
_trim = _found()


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library can; elsewhere it does nothing.

    glibc keeps freed memory for what comes next. Where sizes vary, as those of activations, scores and registrations
    do, gaps remain that nothing fits into, and a training on a processor grows to several times what it holds.
    """
    if _trim is not None:
        _trim(0)
