"""The one exception for what a user can cause and mend."""


class OneShotError(RuntimeError):
    """An error a user can act on.

    The message is a sentence that names the case or file, what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with status 1.
    """
