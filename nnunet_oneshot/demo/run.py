"""Runs the demonstration: all steps on generated phantoms, with the commands a user would type."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_oneshot.demo.phantoms import write_phantom_dataset
from nnunet_oneshot.demo.report import write_report
from nnunet_oneshot.demo.watching import what_registration_does, what_training_does
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.commands import CommandResult, Watch, command_environment, run_command

DATASET = "Dataset999_Phantoms"
PLANS = "nnUNetOneShotCPUPlans"
PLANNER = "OneShotCPUPlanner"
CONFIGURATION = "3d_fullres"
MARKER = "demo.json"
# Between lines of a log that tell how far a step is.
_PAUSE_SECONDS = 10.0
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "exported_model", "logs")
_FILES = ("report.html", "report.md", "report.json", MARKER)


def run_demo(
    out: str | Path,
    *,
    trainer: str = "OneShotDistillTrainer_5epochs",
    training_cases: int = 14,
    test_cases: int = 5,
    seed: int = 2024,
    log: Callable[[str], None] = print,
) -> dict:
    """Generates phantoms, runs every step and writes ``report.html``, ``report.md`` and ``report.json`` into ``out``.

    Args:
        out: A new or empty folder, or the folder of a previous demonstration, which is replaced.
        trainer: Name of the trainer for ``nnUNetv2_train``.
        training_cases: Number of training phantoms, one of them labelled.
        test_cases: Number of labelled test phantoms.
        seed: Seed of the phantoms.
        log: Called with each message.

    Returns:
        The numbers of ``report.json``.

    Raises:
        OneShotError: ``out`` contains something else, or a command failed.
    """
    out = Path(out).absolute()
    _claim(out)
    start = time.monotonic()
    log(f"Writing {training_cases} training phantoms (1 labelled) and {test_cases} test phantoms to {out}")
    raw = out / "nnUNet_raw" / DATASET
    write_phantom_dataset(raw, training_cases=training_cases, test_cases=test_cases, seed=seed)
    environment = command_environment(
        raw=out / "nnUNet_raw",
        preprocessed=out / "nnUNet_preprocessed",
        results=out / "nnUNet_results",
        # Threads that spin while they wait would take their core from the process that makes patches.
        variables={"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        log(f'$ export {name}="{environment[name]}"')

    done = _run(_steps(trainer), out, environment, log)
    report = write_report(
        out,
        raw=raw,
        preprocessed=out / "nnUNet_preprocessed" / DATASET,
        model=out / "nnUNet_results" / DATASET / f"{trainer}__{PLANS}__{CONFIGURATION}" / "fold_0",
        trainer=trainer,
        commands=done,
        seconds=time.monotonic() - start,
    )
    mean = report["mean_dice"]
    log(f"Mean Dice on the test phantoms: student {mean['student']:.3f}, label propagation {mean['propagation']:.3f}")
    log(f"Scores and pictures, for a browser: {out / 'report.html'}")
    return report


def _run(
    steps: Sequence[_Step], out: Path, environment: Mapping[str, str], log: Callable[[str], None]
) -> list[CommandResult]:
    """Runs the steps one after the other, and tells what each is for and does."""
    done = []
    for number, step in enumerate(steps, start=1):
        log(f"Step {number} of {len(steps)}: {step.what}")
        log("$ " + " ".join(step.arguments))
        result = run_command(
            step.arguments,
            environment=environment,
            log_file=out / "logs" / f"{number}_{step.arguments[0]}.txt",
            cwd=out,
            watch=Watch(step.describe, pause=_PAUSE_SECONDS),
        )
        log(f"  done in {result.seconds:.0f} s")
        done.append(result)
    return done


@dataclass(frozen=True)
class _Step:
    """A command, what it is for, and what it is said to do while it runs."""

    what: str
    arguments: list[str]
    describe: Callable[[Path], str]


def _steps(trainer: str) -> list[_Step]:
    """All steps, with paths relative to the demonstration's folder."""
    raw, preprocessed = f"nnUNet_raw/{DATASET}", f"nnUNet_preprocessed/{DATASET}"
    run = ["-d", "999", "-c", CONFIGURATION, "-p", PLANS]
    evaluate = ["-djfile", f"{raw}/dataset.json", "-pfile", f"{preprocessed}/{PLANS}.json", "-np", "1"]
    student, propagation = "predictions/student", "predictions/propagation"
    plan = ["plan_and_preprocess", "-d", "999", "-c", CONFIGURATION, "-pl", PLANNER, "-np", "1", "--verify"]
    register = ["register", *run, "-f", "0", "--device", "cpu"]
    train = ["nnUNetv2_train", "999", CONFIGURATION, "0", "-tr", trainer, "-p", PLANS, "-device", "cpu"]
    # Without processes of their own for reading and writing, which would take longer to start than to run.
    predict = ["nnUNetv2_predict", "-i", f"{raw}/imagesTs", "-o", student, *run, "-tr", trainer, "-f", "0"]
    predict += ["-device", "cpu", "-npp", "0", "-nps", "0"]
    propagate = ["propagate", *run, "-f", "0", "-i", f"{raw}/imagesTs", "-o", propagation, "--device", "cpu"]
    score = ["nnUNetv2_evaluate_folder", f"{raw}/labelsTs"]
    export = ["export", *run, "-tr", trainer, "-f", "0", "-o", "exported_model"]

    def step(what: str, arguments: list[str], describe: Callable[[Path], str] | None = None) -> _Step:
        return _Step(what, arguments, describe or (lambda _: what))

    own = ["nnunet_oneshot"]
    return [
        step("check, plan and preprocess", [*own, *plan, "--no_estimate"]),
        step("register the labelled phantom to the others", [*own, *register], what_registration_does),
        step("train the student", train, what_training_does),
        step("segment the test phantoms with the student", predict),
        step("score the student", [*score, student, *evaluate]),
        step("segment the test phantoms by registration alone, to compare", [*own, *propagate]),
        step("score label propagation", [*score, propagation, *evaluate]),
        step("export the student for stock nnU-Net", [*own, *export]),
    ]


def _claim(out: Path) -> None:
    """Creates the folder or empties it of a previous demonstration, and marks it as ours."""
    if out.exists() and not out.is_dir():
        raise OneShotError(f"{out} is a file: give --out a folder that does not exist yet.")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise OneShotError(
                f"{out} is not empty and was not written by `nnunet_oneshot demo`: nothing in it was touched. "
                f"Give --out a new folder."
            )
        for name in _FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text(json.dumps({"program": "nnunet_oneshot demo", "process": os.getpid()}) + "\n")
    except OSError as error:
        raise OneShotError(f"{out} cannot be written ({error.strerror}): give --out another folder.") from error
