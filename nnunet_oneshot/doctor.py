"""Implements ``nnunet_oneshot doctor``: whether this machine and a dataset are ready for training, and what is next."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from nnunet_oneshot.errors import OneShotError

if TYPE_CHECKING:
    from nnunet_oneshot.data.prepared import PreparedDataset

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_WORKERS = ("nnUNet_n_proc_DA", "nnUNet_def_n_proc")
_TRAINER = "OneShotDistillTrainer"
# GB: checkpoints of one training, and a dataset that is not small.
_LEAST_SPACE, _LITTLE_SPACE = 1, 10
_MARKS = {"fine": "ok     ", "note": "note   ", "problem": "PROBLEM"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        kind: ``problem`` stands in the way of training, ``note`` is worth knowing.
        text: A sentence.
    """

    kind: Literal["fine", "note", "problem"]
    text: str


def examine(
    *, dataset: str | None, configuration: str | None, plans_name: str | None, log: Callable[[str], None] = print
) -> None:
    """Looks at installation, machine and, where one is given, a dataset; changes nothing.

    Args:
        dataset: Number or name.
        configuration: None for the first of those that are preprocessed.
        plans_name: None for the newest plans that this package wrote.
        log: Called with each line.

    Raises:
        OneShotError: Something stands in the way of training.
    """
    problems = 0

    def told(findings: Iterable[Finding]) -> None:
        nonlocal problems
        for finding in findings:
            log(f"{_MARKS[finding.kind]} {finding.text}")
            problems += finding.kind == "problem"

    for section in (_versions, _folders, _workers):
        told(section())
    # What these import stops where versions or numbers of processes are wrong.
    if not problems:
        told(_trainers())
        told(_machine())
    if not problems:
        next_step = "nnunet_oneshot doctor -d DATASET, which looks at a dataset"
        if dataset is not None:
            findings, next_step = _dataset(dataset, configuration, plans_name)
            told(findings)
        log(f"Next: {next_step}")
    if problems:
        raise OneShotError("Training cannot begin: see what is marked PROBLEM above.")


def _versions() -> Iterator[Finding]:
    from nnunet_oneshot.versions import versions

    yield Finding("fine", ", ".join(f"{package} {number}" for package, number in versions().items()))
    try:
        needed = [Requirement(text) for text in requires("nnunet_oneshot") or []]
    except PackageNotFoundError:
        yield Finding("problem", "nnunet_oneshot is not installed: pip install it into this environment.")
        return
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Finding("problem", f"{requirement.name} {found} is installed: pip install '{wanted}'")


def _folders() -> Iterator[Finding]:
    from nnunet_oneshot.io import require_env

    for name in _FOLDERS:
        try:
            (folder,) = require_env(name)
        except OneShotError as error:
            yield Finding("problem", str(error))
            continue
        if name == "nnUNet_raw":
            if not folder.is_dir():
                yield Finding("problem", f"{name} is {folder}, which is no folder: make it, or correct the variable.")
            else:
                yield Finding("fine", f"{name} is {folder}")
            continue
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield Finding("problem", f"{name} is {folder}: {existing} cannot be written to. Correct its permissions.")
        elif free < _LEAST_SPACE:
            yield Finding("problem", f"{name} is {folder}, where {free:.1f} GB are free: make space.")
        else:
            yield Finding("note" if free < _LITTLE_SPACE else "fine", f"{name} is {folder}, {free:.0f} GB free")


def _workers() -> Iterator[Finding]:
    from nnunet_oneshot.devices import usable_cores

    cores = usable_cores()
    for name in _WORKERS:
        text = os.environ.get(name)
        if text is None:
            yield Finding("fine", f"{name} is not set; nnU-Net's default is used on {cores} cores")
        elif not text.isdecimal() or (name == "nnUNet_def_n_proc" and int(text) == 0):
            yield Finding("problem", f"{name} is {text!r}: set it to a whole number of processes, or unset it.")
        elif int(text) > cores:
            yield Finding("note", f"{name} is {text}, but {cores} cores can be used: more processes only take memory.")
        else:
            yield Finding("fine", f"{name} is {text}, on {cores} cores")


def _trainers() -> Iterator[Finding]:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_oneshot.environment import VARIABLE

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = recursive_find_trainer_class_by_name(_TRAINER)
    except (ImportError, RuntimeError) as error:
        reason = error if isinstance(error, ImportError) else f"{VARIABLE} is {os.environ.get(VARIABLE)!r}"
        yield Finding(
            "problem",
            f"nnU-Net does not find {_TRAINER} ({reason}): install the package again, or type "
            f'eval "$(nnunet_oneshot env)" in this shell.',
        )
        return
    yield Finding("fine", f"nnU-Net finds {_TRAINER} in {found.__module__}")


def _machine() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
            name = torch.cuda.get_device_name(number)
            yield Finding("fine", f"GPU {number}: {name}, {free:.1f} of {total:.1f} GB of memory are free")
    elif torch.backends.mps.is_available():
        yield Finding("fine", "GPU: mps; train with -device mps")
    else:
        yield Finding("note", "torch finds no GPU: plan with -pl OneShotCPUPlanner, and train with -device cpu")


def _dataset(dataset: str, configuration: str | None, plans_name: str | None) -> tuple[list[Finding], str]:
    """Raw files, plans, preprocessed cases and registrations, up to the first that is missing; and what to do next."""
    from nnunet_oneshot.training_time import training_time

    raw = list(_raw(dataset))
    try:
        prepared, next_step = _prepared(dataset, configuration, plans_name)
    except OneShotError as error:
        next_step = f"nnunet_oneshot plan_and_preprocess -d {dataset} -c {configuration or '3d_fullres'}"
        if any(finding.kind == "problem" for finding in raw):
            next_step = "mend the raw dataset, then this command again"
        return [*raw, Finding("problem", f"Not ready for training: {error}")], next_step
    if next_step.startswith(("nnunet_oneshot register", "nnUNetv2_train")) and not next_step.endswith(" --c"):
        chosen = _chosen(dataset, configuration, plans_name)
        prepared.append(Finding("fine", training_time(dataset, *chosen)))
    # Training reads the raw files no more.
    return [replace(one, kind="note") if one.kind == "problem" else one for one in raw] + prepared, next_step


def _raw(dataset: str) -> Iterator[Finding]:
    from nnunet_oneshot.data.raw import find_dataset
    from nnunet_oneshot.data.verify import check_files

    try:
        raw = find_dataset(dataset)
        notes = check_files(raw)
    except OneShotError as error:
        yield Finding("problem", str(error))
        return
    yield Finding("fine", f"{raw.name}: {len(raw.cases)} training cases, {len(raw.labelled)} of them labelled")
    for note in notes:
        yield Finding("note", note)


def _prepared(dataset: str, configuration: str | None, plans_name: str | None) -> tuple[list[Finding], str]:
    """What is found of a dataset that is planned and preprocessed, and what to type next.

    Raises:
        OneShotError: It is not, or not as it must be.
    """
    import torch

    from nnunet_oneshot.config import OneShotConfig
    from nnunet_oneshot.data.atlas import ATLAS_FILE, resolve_atlases
    from nnunet_oneshot.data.prepared import PreparedDataset
    from nnunet_oneshot.registration.dataset.register import DatasetRegistrar

    plans_name, configuration = _chosen(dataset, configuration, plans_name)
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    config = OneShotConfig.from_plans(prepared.plans)
    findings = [Finding("fine", f"{plans_name}, {configuration}: {len(prepared.identifiers)} cases are preprocessed")]
    register = f"nnunet_oneshot register -d {dataset} -c {configuration} -p {plans_name}"
    fold = prepared.fold(0)
    if config.atlases is None and not (prepared.base / ATLAS_FILE).is_file():
        return [*findings, Finding("note", "No atlas is chosen yet: registration, or training, chooses it.")], register
    choice = resolve_atlases(prepared.base, config, fold, prepared.image_in_common_order, kept=prepared.kept)
    findings.append(Finding("fine", f"Fold 0: atlas {', '.join(choice.atlases)} ({choice.how})"))
    registrar = DatasetRegistrar(prepared, config, choice.atlases, torch.device("cpu"))
    missing, pairs = registrar.outstanding(sorted({*fold.train, *fold.validation}), fold=fold.number)
    if missing:
        findings.append(Finding("note", f"{missing} of {pairs} registrations are missing: training would make them."))
        return findings, register
    findings.append(Finding("fine", f"All {pairs} registrations are there, each with a picture to look at."))
    return findings, _after_registration(prepared, dataset)


def _after_registration(prepared: PreparedDataset, dataset: str) -> str:
    """The command that trains, goes on with a training, or predicts."""
    import torch

    from nnunet_oneshot.io import require_env

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    (results,) = require_env("nnUNet_results")
    pattern = f"OneShot*__{prepared.plans_name}__{prepared.configuration}/fold_*/checkpoint_*.pth"
    found = sorted((results / prepared.name).glob(pattern), key=lambda path: path.stat().st_mtime)
    finished = [path for path in found if path.stem == "checkpoint_final"]
    trainer, fold, more = _TRAINER, "0", ""
    if found:
        last = (finished or found)[-1].parent
        trainer, fold, more = last.parent.name.partition("__")[0], last.name.removeprefix("fold_"), " --c"
    if finished:
        return (
            f"nnUNetv2_predict -d {dataset} -c {prepared.configuration} -f {fold} -tr {trainer} "
            f"-p {prepared.plans_name} -device {device} -i IMAGES -o PREDICTIONS"
        )
    return (
        f"nnUNetv2_train {dataset} {prepared.configuration} {fold} -tr {trainer} -p {prepared.plans_name} "
        f"-device {device}{more}"
    )


def _chosen(dataset: str, configuration: str | None, plans_name: str | None) -> tuple[str, str]:
    """Plans and configuration: those that are given, else the newest plans of ours and what is preprocessed of them."""
    from nnunet_oneshot.config import BLOCK
    from nnunet_oneshot.data.plans import check_plans
    from nnunet_oneshot.data.raw import dataset_name
    from nnunet_oneshot.io import load_json_checked, require_env

    (preprocessed,) = require_env("nnUNet_preprocessed")
    base = preprocessed / dataset_name(dataset, preprocessed)
    if plans_name is None:
        files = sorted(base.glob("*Plans*.json"), key=lambda path: path.stat().st_mtime)
        ours = [path for path in files if BLOCK in check_plans(load_json_checked(path, "the plans file", dict), path)]
        plans_name = (ours or files or [Path("nnUNetOneShotPlans.json")])[-1].stem
    path = base / f"{plans_name}.json"
    if configuration is None and path.is_file():
        plans = check_plans(load_json_checked(path, "the plans file", dict), path)
        stages = [name for name in ("3d_fullres", "3d_lowres", "2d") if name in plans["configurations"]]
        done = [name for name in stages if (base / plans["configurations"][name].get("data_identifier", "")).is_dir()]
        configuration = next(iter([*done, *stages, *plans["configurations"]]), None)
    return plans_name, configuration or "3d_fullres"
