"""The one exception for what a user can cause and mend, and how a command ends with it."""

from __future__ import annotations

import sys
from collections.abc import Callable


class OneShotError(RuntimeError):
    """An error a user can act on.

    The message is a sentence that names the case or file, what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with status 1.
    """


def exit_status(run: Callable[[], object]) -> int:
    """Runs a command: 0, or 1 after an `OneShotError`, whose message goes to standard error."""
    try:
        run()
    except OneShotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
