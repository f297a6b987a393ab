"""Kills commands and gives them again: ``python -m nnunet_oneshot.benchmarks.kills -o FOLDER``.

Every command of a one-shot project runs on tiny generated phantoms, first undisturbed and twice, so that what is the
same in both runs is known. Then it is killed at random moments (SIGKILL to its process group, also while files change),
once or twice, and given again. It must end with status 0 and leave what the undisturbed runs left: the same files,
equal where those two were equal, no temporary files, no locks, no processes. Registrations may differ by rounding, at
most by one step of their files, since pairs that are left over are computed in other batches. A training that is
resumed with ``--c`` goes on with other patches, so that of its networks and segmentations only names and shapes are
compared.

Of a training on two ranks (gloo, on processors) not only the group is killed, but also one rank alone or the main
process alone. All others must then end, and a rank that nnU-Net ends because it lost another one must say so.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_oneshot.benchmarks.equality import READERS, Content
from nnunet_oneshot.config import OVERRIDES_VARIABLE
from nnunet_oneshot.demo.phantoms import write_phantom_dataset
from nnunet_oneshot.environment import VARIABLE
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.evaluation.commands import command_environment
from nnunet_oneshot.io import is_occupied
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.tables import csv_table

_NAME, _PLANS, _CONFIGURATION = "Dataset999_Phantoms", "nnUNetOneShotCPUPlans", "3d_fullres"
_DATASET = ["-d", "999", "-c", _CONFIGURATION]
_PLANNED = [*_DATASET, "-p", _PLANS]
_TRAIN = ["nnUNetv2_train", "999", _CONFIGURATION, "0", "-p", _PLANS, "-device", "cpu", "-tr"]
_RANKS = ["python", "-m", "nnunet_oneshot.benchmarks.processor_ranks", *_TRAIN[1:-3], "-num_gpus", "2", "-tr"]
# Without the affine stage, which writes nothing and takes most of the time.
_REGISTRATION = {"refine_iterations": [4, 4, 2], "affine": False}
_SHORT: dict[str, Any] = {"registration": _REGISTRATION}
_NETWORK = {"registration": {**_REGISTRATION, "method": "network+refine", "network_iterations": 12}}
_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
# Found before the package's own: trainers of the same names with short epochs.
_TRAINERS = """
from nnunet_oneshot.trainers import OneShotDistillTrainer, OneShotSynthesisTrainer


def short(trainer, length):
    class Short(trainer):
        epochs = length

        def initialize(self):
            self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 2, 1, 1
            super().initialize()

    return Short


class OneShotDistillTrainer_5epochs(short(OneShotDistillTrainer, 3)):
    pass


class OneShotSynthesisTrainer_1epoch(short(OneShotSynthesisTrainer, 1)):
    pass
"""
# Marks the processes of a command, whichever group they are in.
_MARK = "nnunet_oneshot_kills"
_PAUSE, _LONGEST, _GRACE = 0.01, 900.0, 10.0
# A rank that is left alone sees it once it has imported torch; nnU-Net gives one half a minute to end.
_LONGER_GRACE = 90.0
_GROUP, _MAIN, _ONE = "group", "main process", ("rank 0", "rank 1")
# Pairs that are registered together differ by rounding from those that are registered alone; a step of a file is 1/16.
_ROUNDED = 0.0626
# Names and content of these tell the time, or are written by nnU-Net for people to look at.
_LOGS = re.compile(r"training_log_.*\.txt|log\.txt|progress\.png|debug\.json")


@dataclass(frozen=True)
class Step:
    """A command that is killed.

    Attributes:
        name: What it does.
        command: The command.
        after: Name of the step on whose results it works; None is the raw data set.
        overrides: Settings of the ``oneshot`` block.
        resumes: Whether it goes on from checkpoints, with other patches than an undisturbed one.
        several: Whether it starts ranks, which are killed one by one too.
    """

    name: str
    command: Sequence[str]
    after: str | None
    overrides: Mapping[str, Any]
    resumes: bool = False
    several: bool = False


_EXPORT = ["nnunet_oneshot", "export", *_PLANNED, "-tr", "OneShotDistillTrainer_5epochs", "-o", "exported"]
_BENCHMARK = ["nnunet_oneshot", "benchmark", *_PLANNED, "-o", "benchmark", "--epochs", "1", "--methods"]
_PLAN = ["nnunet_oneshot", "plan_and_preprocess", *_DATASET, "-pl", "OneShotCPUPlanner", "-npfp", "1"]
STEPS = (
    Step("planning", [*_PLAN, "--no_pp"], None, _SHORT),
    Step("preprocessing", [*_PLAN, "-np", "1", "--no_estimate"], None, _SHORT),
    Step("registration", ["nnunet_oneshot", "register", *_PLANNED, "-np", "2"], "preprocessing", _SHORT),
    Step("registration network", ["nnunet_oneshot", "register", *_PLANNED, "-np", "1"], "preprocessing", _NETWORK),
    Step("training", [*_TRAIN, "OneShotDistillTrainer_5epochs"], "registration", _SHORT),
    Step("resumed training", [*_TRAIN, "OneShotDistillTrainer_5epochs", "--c"], "registration", _SHORT, resumes=True),
    Step(
        "training on two ranks",
        [*_RANKS, "OneShotDistillTrainer_5epochs", "--c"],
        "registration",
        _SHORT,
        resumes=True,
        several=True,
    ),
    Step("export", _EXPORT, "training", _SHORT),
    Step("propagation", ["nnunet_oneshot", "propagate", *_PLANNED, "-o", "propagated"], "preprocessing", _SHORT),
    Step("benchmark", [*_BENCHMARK, "affine", "registration", "synthesis"], "registration", _SHORT, resumes=True),
)


@dataclass(frozen=True)
class Kill:
    """What was killed.

    Attributes:
        seconds: From the start of the command.
        victim: See `Ground.disturb`.
        fault: What the rest of the command did wrong then; empty if nothing.
    """

    seconds: float
    victim: str
    fault: str = ""


class Ground:
    """The folder in which commands run, and copies of what they left when they were undisturbed.

    Args:
        folder: A new folder.
    """

    def __init__(self, folder: Path) -> None:
        self.work, self._states, self._log = folder / "work", folder / "states", folder / "logs"
        trainers = folder / "trainers"
        for new in (self._states / "raw", self._log, trainers):
            new.mkdir(parents=True)
        for name in _FOLDERS:
            (self._states / "raw" / name).mkdir()
        write_phantom_dataset(self._states / "raw" / "nnUNet_raw" / _NAME, training_cases=4, test_cases=0, labelled=4)
        (trainers / "kills_trainers.py").write_text(_TRAINERS)
        self._environment = command_environment(
            **{name[7:]: self.work / name for name in _FOLDERS},
            variables={
                "nnUNet_n_proc_DA": "0",
                "nnUNet_def_n_proc": "1",
                "nnUNet_compile": "f",
                "OMP_NUM_THREADS": "1",
            },
        )
        self._environment[VARIABLE] = os.pathsep.join([str(trainers), self._environment[VARIABLE]])

    def prepare(self, step: Step) -> None:
        """Brings the folder into the state in which the step begins."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self._states / (step.after or "raw"), self.work)

    def keep(self, step: Step, number: int) -> Path:
        """Keeps a copy of the folder after an undisturbed run; later steps begin from the first."""
        state = self._states / (step.name if number == 0 else f"{step.name} again")
        shutil.copytree(self.work, state)
        return state

    def start(self, step: Step) -> subprocess.Popen:
        """Starts the command in a process group of its own."""
        overrides = {OVERRIDES_VARIABLE: json.dumps(step.overrides)}
        executable = str(Path(sys.executable).parent / step.command[0])
        with open(self._log / f"{step.name}.txt", "ab") as log:
            return subprocess.Popen(
                [executable, *step.command[1:]],
                env={**self._environment, **overrides, _MARK: str(self.work)},
                cwd=self.work,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, step: Step, *, timeout: float = _LONGEST) -> tuple[int | None, float, list[float]]:
        """Runs the command to its end: its status (None if it hangs), seconds, and when files changed."""
        process, watch = self.start(step), _Watch(self.work)
        while process.poll() is None and watch.seconds < timeout:
            time.sleep(_PAUSE)
            watch.look()
        status = process.poll()
        if status is None:
            _kill(process)
        return status, watch.seconds, watch.changes

    def disturb(
        self, step: Step, *, seconds: float | None, change: int | None, delay: float, victim: str = _GROUP
    ) -> Kill | None:
        """Runs the command and kills it.

        Args:
            step: The step.
            seconds: When to kill it, from its start; None counts changes.
            change: The change of files after which to kill it.
            delay: Seconds from that change.
            victim: ``"group"``, ``"main process"``, ``"rank 0"`` or ``"rank 1"``; where there are no ranks, the group.

        Returns:
            What was killed; None if it ended before.
        """
        log = self._log / f"{step.name}.txt"
        said = log.stat().st_size if log.exists() else 0
        process, watch = self.start(step), _Watch(self.work)
        while process.poll() is None:
            time.sleep(_PAUSE if delay > _PAUSE else _PAUSE / 5)
            watch.look()
            if watch.seconds > (_LONGEST if seconds is None else seconds):
                break
            if change is not None and len(watch.changes) >= change:
                time.sleep(delay)
                break
        if process.poll() is not None:
            return None
        found, ranks = watch.seconds, _ranks(process)
        if victim == _GROUP or len(ranks) < len(_ONE):
            _kill(process)
            return Kill(found, _GROUP)
        os.kill(process.pid if victim == _MAIN else ranks[_ONE.index(victim)], signal.SIGKILL)
        status = _waited(process)
        with open(log, "rb") as file:
            file.seek(said)
            text = file.read().decode(errors="replace")
        return Kill(found, victim, "" if victim == _MAIN else _fault(victim, status, text))

    def survivors(self, grace: float = _GRACE) -> list[int]:
        """Processes of a killed command that are still there after some seconds; they are ended."""
        mark, until = f"{_MARK}={self.work}".encode(), time.monotonic() + grace
        while (found := _marked(mark)) and time.monotonic() < until:
            time.sleep(0.1)
        for process in found:
            os.kill(process, signal.SIGKILL)
        return found


class _Watch:
    """Notes when anything changes in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, time.monotonic()
        self._seen = _listing(folder)
        self.changes: list[float] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def look(self) -> None:
        now = _listing(self._folder)
        if now != self._seen:
            self._seen = now
            self.changes.append(self.seconds)


def _listing(folder: Path) -> set[tuple[str, int]]:
    """Paths of files and folders with their sizes."""
    found = set()
    for parent, _, names in os.walk(folder):
        found.add((parent, 0))
        for name in names:
            path = os.path.join(parent, name)
            try:
                found.add((path, os.stat(path).st_size))
            except OSError:
                continue
    return found


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _waited(process: subprocess.Popen) -> int | None:
    """The status with which a command ends by itself; None if it does not, which is killed."""
    try:
        return process.wait(_LONGER_GRACE)
    except subprocess.TimeoutExpired:
        _kill(process)
        return None


def _ranks(process: subprocess.Popen) -> list[int]:
    """The ranks that a training has started, in their order."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []


def _fault(victim: str, status: int | None, text: str) -> str:
    """What is wrong with the end of a training that lost one rank.

    Args:
        victim: The rank that was killed.
        status: Exit status of the command; None if it hung.
        text: What it has printed.
    """
    other = 1 - _ONE.index(victim)
    if status is None:
        return f"hangs without {victim}"
    if status == 0:
        return f"ends with status 0 without {victim}"
    sentences = (f"error: Process {other} of the 2 processes", "Another of the 2 processes of this training has ended")
    # Before its trainer is made, none of our code runs in a rank.
    if f"I am local rank {other}" in text and not any(sentence in text for sentence in sentences):
        return f"rank {other} says nothing"
    return ""


def _marked(mark: bytes) -> list[int]:
    """Processes whose environment holds the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def deviations(left: Path, reference: Path, again: Path, *, resumed: bool = False) -> Iterator[str]:
    """What a disturbed run left otherwise than undisturbed ones; yields a sentence for each file.

    Args:
        left: Folder of the disturbed run.
        reference: Folder of an undisturbed run.
        again: Folder of a second undisturbed run; what differs between the two need not be equal.
        resumed: Whether a training was resumed, of which only names and shapes are compared.
    """
    files, expected, others = (_files(folder) for folder in (left, reference, again))
    expected &= others
    yield from (f"{name} is missing" for name in sorted(expected - files))
    yield from (f"{name} is left over" for name in sorted(files - expected))
    for name in sorted(files & expected):
        first, second, third = (_content(folder / name) for folder in (left, reference, again))
        steady = {key for key in second if key in third and _equal(second[key], third[key])}
        kept = {key: first[key] for key in first if key in steady or key not in second}
        wanted = {key: second[key] for key in steady}
        if FOLDER in Path(name).parts:
            if name.endswith(".npz") and (gap := _apart(left / name, reference / name)) > _ROUNDED:
                yield f"{name}: velocities differ by {gap:.3g} voxels"
            kept, wanted = (_outline(content) for content in (kept, wanted))
            kept, wanted = {key: kept[key] for key in kept if key in wanted}, wanted
        elif resumed and _of_training(name):
            kept, wanted = (_outline(content) for content in (kept, wanted))
        differing = [key for key in {**kept, **wanted} if not _equal(kept.get(key), wanted.get(key))]
        if differing:
            yield f"{name}: {', '.join(differing[:3])} of {len(wanted)} entries"


def _files(folder: Path) -> set[str]:
    """Relative paths of all files and empty folders, logs aside."""
    found = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {str(path.relative_to(folder)) for path in found if not _LOGS.fullmatch(path.name)}


def _content(path: Path) -> Content:
    """Names and arrays in a file; the entries of JSON, else its bytes."""
    if path.is_dir():
        return {}
    for pattern, read in READERS.items():
        if path.match(pattern):
            return read(path)
    if path.suffix == ".json":
        return {key: np.array(json.dumps(value)) for key, value in _leaves(json.loads(path.read_text()))}
    if path.suffix in (".png", ".csv", ".md", ".html", ".pdf", ".svg"):
        # For people, and with times in them.
        return {}
    return {"bytes": np.frombuffer(path.read_bytes(), np.uint8)}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not children:
        yield name, value
    for key, child in children:
        yield from _leaves(child, f"{name}/{key}")


def _equal(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and first.dtype == second.dtype and first.tobytes() == second.tobytes()


def _apart(first: Path, second: Path) -> float:
    """Largest difference between the velocities of two files of one pair, atlas voxels."""
    pairs = [RegistrationCache(path.parents[1]).load(path.parent.name, path.stem).velocity for path in (first, second)]
    return float(np.abs(pairs[0] - pairs[1]).max()) if pairs[0].shape == pairs[1].shape else np.inf


def _of_training(name: str) -> bool:
    return "nnUNet_results" in name or "Trainer" in name or name.startswith("benchmark")


def _outline(content: Content) -> Content:
    return {key: np.array(value.shape) for key, value in content.items() if value.dtype.kind not in "USu"}


class Campaign:
    """Runs all steps undisturbed, then kills them at random and keeps a log.

    Args:
        ground: Where.
        steps: Which.
        log: CSV file that gets a line for each trial as soon as it has ended.
        seed: Of the random moments.
    """

    def __init__(self, ground: Ground, steps: Sequence[Step], log: Path, seed: int) -> None:
        self._ground, self._steps, self._file = ground, steps, log
        self._random = np.random.default_rng(seed)
        self._states: dict[str, tuple[Path, Path]] = {}
        self._times: dict[str, tuple[float, list[float]]] = {}
        self.rows: list[dict[str, Any]] = []

    def reference(self) -> None:
        """Runs every step twice without a disturbance.

        Raises:
            OneShotError: A command does not end well even so.
        """
        for step in self._steps:
            states = []
            for number in range(2):
                self._ground.prepare(step)
                status, seconds, changes = self._ground.finish(step)
                if status != 0:
                    raise OneShotError(f"`{' '.join(step.command)}` ended with status {status}: see logs/.")
                states.append(self._ground.keep(step, number))
            self._states[step.name], self._times[step.name] = (states[0], states[1]), (seconds, changes)
            print(f"{step.name}: {seconds:.1f} s, files changed {len(changes)} times", flush=True)

    def trial(self, step: Step) -> int:
        """Kills a step once or twice and lets it end; returns the number of kills."""
        self._ground.prepare(step)
        moments, faults, survivors = [], [], 0
        for _ in range(1 + int(self._random.random() < 0.3)):
            moment, killed = self._disturbed(step)
            if killed is not None:
                moments.append(f"{killed.victim}, {moment}, {killed.seconds:.2f} s")
                survivors += len(self._ground.survivors(_LONGER_GRACE if step.several else _GRACE))
                if killed.fault:
                    faults.append(killed.fault)
        if not moments:
            return 0
        status, seconds, _ = self._ground.finish(step)
        found = []
        if status == 0:
            found = list(deviations(self._ground.work, *self._states[step.name], resumed=step.resumes))
        self._note(
            {
                "step": step.name,
                "killed": " | ".join(moments),
                "kills": len(moments),
                "survivors": survivors,
                "faults": " | ".join(faults),
                "status": "hangs" if status is None else status,
                "seconds": round(seconds, 1),
                "deviations": len(found),
                "first": "; ".join(found[:3]),
                "passed": status == 0 and not found and not survivors and not faults,
            }
        )
        return len(moments)

    def _disturbed(self, step: Step) -> tuple[str, Kill | None]:
        seconds, changes = self._times[step.name]
        victims = (_GROUP, _MAIN, *_ONE) if step.several else (_GROUP,)
        victim = victims[self._random.integers(len(victims))]
        disturb = partial(self._ground.disturb, step, victim=victim)
        if changes and self._random.random() < 0.6:
            number, delay = int(self._random.integers(1, len(changes) + 1)), float(self._random.uniform(0, 0.02))
            return f"change {number}", disturb(seconds=None, change=number, delay=delay)
        moment = float(self._random.uniform(0.8 * changes[0] if changes else 0, seconds))
        return "time", disturb(seconds=moment, change=None, delay=1.0)

    def _note(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with open(self._file, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the trials; returns the exit status, which is 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m nnunet_oneshot.benchmarks.kills",
        description="Kills every command at random moments and checks that it then ends as if undisturbed.",
    )
    names = [step.name for step in STEPS]
    parser.add_argument("-o", required=True, metavar="FOLDER", help="a new folder; kills.csv and table.csv go there")
    parser.add_argument("--kills", type=int, default=60, metavar="N", help="at least (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)")
    options = parser.parse_args(arguments)
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    out = Path(options.o).absolute()
    if sys.platform != "linux":
        raise OneShotError("Processes are killed and searched for as Linux does it: run this on Linux.")
    if is_occupied(out):
        raise OneShotError(f"{out} is not empty: give -o a new folder.")
    needed = _with_needed(options.steps)
    campaign = Campaign(Ground(out), needed, out / "kills.csv", options.seed)
    campaign.reference()
    steps, kills, turn = [step for step in needed if step.name in options.steps], 0, 0
    while kills < options.kills:
        kills += campaign.trial(steps[turn % len(steps)])
        turn += 1
    with open(out / "table.csv", "w", encoding="utf-8") as file:
        file.write(summarised(campaign.rows))
    failed = Counter(row["step"] for row in campaign.rows if not row["passed"])
    print(f"{kills} kills in {len(campaign.rows)} trials, {failed.total()} failed")
    if failed:
        raise OneShotError(f"Not as if undisturbed: {dict(failed)}; see {out / 'kills.csv'}.")


def summarised(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, as CSV, of the trials of each step.

    Args:
        rows: The lines of ``kills.csv``.
    """
    header = ["step", "trials", "kills", "as if undisturbed", "survivors"]
    found: list[list[Any]] = []
    for step in dict.fromkeys(str(row["step"]) for row in rows):
        own = [row for row in rows if row["step"] == step]
        kills, survivors = (sum(int(row[name]) for row in own) for name in ("kills", "survivors"))
        found.append([step, len(own), kills, sum(str(row["passed"]) == "True" for row in own), survivors])
    totals = [sum(row[place] for row in found) for place in range(1, len(header))]
    return csv_table(header, [*found, ["all", *totals]])


def _with_needed(names: Sequence[str]) -> list[Step]:
    """The steps of these names and those on whose results they work, in order."""
    known, wanted = {step.name: step for step in STEPS}, set(names)
    for step in reversed(STEPS):
        if step.name in wanted and step.after is not None:
            wanted.add(known[step.after].name)
    return [step for step in STEPS if step.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
