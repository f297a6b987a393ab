"""The command ``nnunet_oneshot``: every subcommand parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnunet_oneshot import __version__
from nnunet_oneshot.errors import OneShotError

# Handlers import what they run, so that `--help`, `--version` and `env` answer without loading torch.


def _demo(options: argparse.Namespace) -> None:
    from nnunet_oneshot.demo.run import run_demo

    run_demo(options.out)


def _add_demo(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="run every step on generated phantoms and write a page with pictures and numbers",
        description="Generates a small dataset of anatomical phantoms of which one is labelled, plans, registers, "
        "trains, predicts and scores it through the commands a user would type (printed as they run), and writes "
        "report.html. Takes at most 6 minutes on two CPU cores.",
    )
    parser.add_argument(
        "--out",
        default="nnunet_oneshot_demo",
        help="a new folder, or that of a previous demo, which is replaced (default: ./nnunet_oneshot_demo)",
    )
    parser.set_defaults(run=_demo)


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


def _export(options: argparse.Namespace) -> None:
    from nnunet_oneshot.export import export_model

    export_model(
        dataset=options.d,
        configuration=options.c,
        plans_name=options.p,
        trainer=options.tr,
        folds=options.f,
        images=options.i,
        out=options.o,
        device=options.device,
    )


def _add_export(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a trained model that stock nnU-Net predicts with",
        description="Writes a trained model under the name of stock nnU-Net's trainer, for use where this package is "
        "not installed, and checks that it predicts what the original predicts.",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset number or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres")
    parser.add_argument("-p", required=True, metavar="PLANS", help="name of the plans")
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="the trainer the model was trained with")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to export (default: every finished one)")
    parser.add_argument(
        "-o",
        required=True,
        metavar="OUT",
        help="the model folder to make, or a .zip for nnUNetv2_install_pretrained_model_from_zip",
    )
    parser.add_argument("-i", metavar="FOLDER", help="images on which both models are compared (default: generated)")
    parser.add_argument("--device", default="cpu", help="where the comparison runs (default: cpu)")
    parser.set_defaults(run=_export)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command, one subparser for each subcommand."""
    parser = argparse.ArgumentParser(
        prog="nnunet_oneshot",
        description="One-shot segmentation for nnU-Net: train from one labelled volume and a folder of unlabelled ones.",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_oneshot {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(subparsers)
    _add_env(subparsers)
    _add_export(subparsers)
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
