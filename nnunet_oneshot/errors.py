"""The one exception for what a user can cause and mend, and how a command ends with it."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

_LONGEST_SHOWN = 120
# Not every system knows a quota or a stale file of a network.
_OF_THE_DISK = {
    getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "ESTALE")
}
_OF_THE_DISK -= {None}
_LONGEST_NAME, _LISTED = 400, 5


class OneShotError(RuntimeError):
    """An error a user can act on.

    The message is a sentence that names the case or file, what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with status 1.
    """


def exit_status(run: Callable[[], object]) -> int:
    """Runs a command: 0, or 1 after an `OneShotError` or a disk's refusal, which is told on standard error."""
    try:
        run()
    except OneShotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        place = error.filename or "a file"
        print(
            f"error: The disk refuses {place} ({error.strerror}): its folder must be there, be writable and have space "
            f"left. What was finished is kept: mend it and give the same command again.",
            file=sys.stderr,
        )
        return 1
    return 0


def shown(value: Any) -> str:
    """A value from a file for an error: JSON on one line, in ASCII, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=repr)
    except (RecursionError, ValueError):
        return "something too large to be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def listed(names: Iterable[object]) -> str:
    """Names or paths from a file for an error: the first five, those that are not plain text as JSON."""
    texts = [str(name) for name in names]
    plain = [text if _is_plain(text) else shown(text) for text in texts[:_LISTED]]
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(plain) + more


def _is_plain(text: str) -> bool:
    return text.isprintable() and text == text.strip() and 0 < len(text) <= _LONGEST_NAME
