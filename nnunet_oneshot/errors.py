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
# Exit status of what Ctrl-C ended, as shells have it.
INTERRUPTED = 130
_RESUME = (
    "\nInterrupted. Type the same command to go on: registrations and runs of a benchmark that were finished are kept, "
    "the rest is done anew."
)


class OneShotError(RuntimeError):
    """An error a user can act on.

    The message is a sentence that names the case or file, what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with status 1.
    """


class NotReadyError(OneShotError):
    """What a command needs is not set up: a variable, a dataset, its plans or its preprocessed cases.

    ``nnunet_oneshot doctor`` explains it.
    """


def exit_status(run: Callable[[], object], *, dataset: str | None = None) -> int:
    """Runs a command and tells on standard error why it did not end well.

    Args:
        run: The command.
        dataset: The dataset that it is about, if it is about one.

    Returns:
        0; 1 after an `OneShotError` or a disk's refusal; 130 after an interruption by Ctrl-C.
    """
    try:
        run()
    except OneShotError as error:
        print(told(error, dataset=dataset), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(_RESUME, file=sys.stderr)
        return INTERRUPTED
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


def told(error: OneShotError, *, dataset: str | None = None) -> str:
    """What is printed of an error, with the command that tells more where it does."""
    more = f"\nnnunet_oneshot doctor{f' -d {dataset}' if dataset else ''} tells more."
    return f"error: {error}{more if isinstance(error, NotReadyError) else ''}"


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
