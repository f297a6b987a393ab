"""The command ``nnunet_oneshot``: every subcommand parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnunet_oneshot import __version__
from nnunet_oneshot.errors import OneShotError

# Handlers import what they run, so that `--help`, `--version` and `env` answer without loading torch.


def _env(_: argparse.Namespace) -> None:
    from nnunet_oneshot.environment import shell_export

    print(shell_export())


def _add_env(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "env",
        help="print the line that makes nnU-Net find the trainers",
        description='Prints an export of nnUNet_extTrainer for the shell: eval "$(nnunet_oneshot env)". '
        "What the variable already lists is kept.",
    )
    parser.set_defaults(run=_env)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command, one subparser for each subcommand."""
    parser = argparse.ArgumentParser(
        prog="nnunet_oneshot",
        description="One-shot segmentation for nnU-Net: train from one labelled volume and a folder of unlabelled ones.",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_oneshot {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_env(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command line arguments without the program's name, or None: those of the process.

    Returns:
        The exit status: 0, or 1 after an error that the user can mend.
    """
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except OneShotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
