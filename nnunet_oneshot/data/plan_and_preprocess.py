"""From a raw data set to plans and preprocessed cases: the command ``nnunet_oneshot plan_and_preprocess``."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nnunet_oneshot.config import BLOCK, OneShotConfig
from nnunet_oneshot.data.atlas import AtlasChoice, forget_outdated_choice, resolve_atlases, save_choice
from nnunet_oneshot.data.fingerprint import (
    CaseSurvey,
    fingerprint_unchanged,
    images_unchanged,
    make_fingerprint,
    read_labelled_case,
    save_fingerprint,
    survey_images,
)
from nnunet_oneshot.data.options import Options, check_options, check_plans_name
from nnunet_oneshot.data.orientation import mixed_orders_note
from nnunet_oneshot.data.parallel import default_processes, run_on_cases
from nnunet_oneshot.data.plans import FOR_OUR_TRAINERS, check_plans
from nnunet_oneshot.data.preprocessing import preprocess_configuration
from nnunet_oneshot.data.raw import RawDataset, find_dataset
from nnunet_oneshot.data.splits import SPLITS_FILE, check_splits, read_splits, resolve_fold
from nnunet_oneshot.data.verify import check_files
from nnunet_oneshot.errors import OneShotError, listed
from nnunet_oneshot.io import atomic_path, load_json_checked, require_env, writing
from nnunet_oneshot.locks import waiting_for

_DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}


class Planner(Protocol):
    """What is asked of the classes of ``nnunet_oneshot.planners``.

    Attributes:
        default_plans_name: Name of the plans where the user gives none.
        kept_block: Whether the existing plans' ``oneshot`` block was kept.
        notes: What was planned otherwise than nnU-Net would, for the user.
    """

    default_plans_name: ClassVar[str]
    kept_block: bool
    notes: list[str]

    def __init__(self, dataset_name_or_id: str, **options: Any) -> None: ...

    @property
    def plans_file(self) -> Path:
        """The plans that this planner writes."""

    def plan_experiment(self) -> Any:
        """Plans, and writes the plans."""


def plan_and_preprocess(
    dataset: int | str, planner_class: type[Planner] | None, options: Options, *, log: Callable[[str], None] = print
) -> Path:
    """Checks a raw data set, extracts its fingerprint, plans and preprocesses.

    Args:
        dataset: Number or name of the data set below ``nnUNet_raw``.
        planner_class: A class of ``nnunet_oneshot.planners``; None preprocesses with the plans that
            ``options.plans_name`` names, such as plans of another data set that were moved here.
        options: See `Options`.
        log: Receives each line that is shown.

    Returns:
        The plans file.

    Raises:
        OneShotError: Anything is wrong with the data, the options or the folders; what was there before is kept.
    """
    _, preprocessed = require_env("nnUNet_raw", "nnUNet_preprocessed")
    check_plans_name(options)
    raw = find_dataset(dataset)
    log(f"{raw.name}: {len(raw.cases)} training cases, {len(raw.labelled)} of them labelled")
    for note in check_files(raw):
        log(f"Note: {note}")
    if mixed := mixed_orders_note(raw.reoriented, reoriented=True):
        log(f"Note: {mixed}")
    folder = preprocessed / raw.name
    default_name = planner_class.default_plans_name if planner_class else ""
    plans_file = folder / f"{options.plans_name or default_name}.json"
    previous: dict[str, Any] = {}
    if plans_file.is_file() or planner_class is None:
        previous = check_plans(load_json_checked(plans_file, "the plans file", dict), plans_file)
    check_options(raw, options, previous)
    config = OneShotConfig.from_plans({BLOCK: previous.get(BLOCK, {}), "plans_name": plans_file.stem})

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), waiting_for(folder / "planning.lock", log, f"planning of {raw.name}"):
        surveys = _Surveys(raw, options, log)
        if options.clean or options.verify or not images_unchanged(raw, folder):
            surveys.get()
        if options.verify:
            _verify_other_labels(raw, options, log)
        choice = _choose_atlases(raw, folder, options, config, surveys, log)
        if options.clean or not fingerprint_unchanged(raw, folder, choice.atlases):
            _extract_fingerprint(raw, folder, surveys, choice, log)
        if options.atlases is not None:
            save_choice(folder, choice.atlases, by_user=True, how=choice.how)
        if planner_class is None:
            _copy_description(raw, folder)
            plans = previous
        else:
            plans = _plan(raw, planner_class, options, log)
        _copy_labels(raw, folder, log)
        if not options.no_preprocessing:
            _preprocess(raw, folder, plans, choice, options, log)
        if len(raw.labelled) < len(raw.cases):
            log(f"Note: {FOR_OUR_TRAINERS}")
        if raw.hidden_labels:
            log(
                f"Note: the labels of {listed(sorted(raw.hidden_labels))} show some structures only. nnU-Net's own "
                f"trainers would learn the others as background there."
            )
    return plans_file


def _preprocess(
    raw: RawDataset,
    folder: Path,
    plans: dict[str, Any],
    choice: AtlasChoice,
    options: Options,
    log: Callable[[str], None],
) -> None:
    for configuration, processes in _configurations(plans, options, log):
        target = preprocess_configuration(
            raw,
            plans,
            configuration,
            folder,
            atlases=choice.atlases,
            num_processes=processes,
            verbose=options.verbose,
            show_progress=options.progress,
        )
        log(f"Preprocessed {len(raw.cases)} cases for {configuration}: {target}")


def _extract_fingerprint(
    raw: RawDataset, folder: Path, surveys: _Surveys, choice: AtlasChoice, log: Callable[[str], None]
) -> None:
    fingerprint, warnings = make_fingerprint(raw, surveys.get(), choice.atlases)
    for warning in warnings:
        log(f"Warning: {warning}")
    save_fingerprint(fingerprint, folder)
    log(f"Fingerprint: geometry of {len(raw.cases)} images, intensities of {', '.join(choice.atlases)} only")


class _Surveys:
    """The survey of all images, made when it is first asked for."""

    def __init__(self, raw: RawDataset, options: Options, log: Callable[[str], None]) -> None:
        self._raw, self._options, self._log = raw, options, log
        self._surveys: dict[str, CaseSurvey] | None = None

    def get(self) -> dict[str, CaseSurvey]:
        if self._surveys is None:
            self._surveys = survey_images(
                self._raw,
                num_processes=self._options.num_processes_fingerprint or default_processes(),
                show_progress=self._options.progress,
            )
            for survey in self._surveys.values():
                for warning in survey.warnings:
                    self._log(f"Warning: {warning}")
            orders = {case: survey.order for case, survey in self._surveys.items()}
            if note := mixed_orders_note(orders, reoriented=False):
                self._log(f"Note: {note}")
        return self._surveys


def _choose_atlases(
    raw: RawDataset,
    folder: Path,
    options: Options,
    config: OneShotConfig,
    surveys: _Surveys,
    log: Callable[[str], None],
) -> AtlasChoice:
    """Atlases whose labels the fingerprint may use: the user's, or those of fold 0's training part."""
    _copy_splits(raw, folder)
    fold = resolve_fold(folder, raw.cases, raw.labelled, 0, partial=sorted(raw.hidden_labels))
    if options.atlases is not None:
        choice = AtlasChoice(list(dict.fromkeys(options.atlases)), "named by --atlas")
        _report_folds(raw, folder, choice.atlases, log)
    else:
        if new := forget_outdated_choice(folder, raw.cases, raw.labelled):
            log(f"Note: {listed(new)} got labels since the atlas was chosen, which is done again.")
        # Which fold will be trained is not known yet: refusing an atlas that a fold holds out is left to its trainer.
        if config.atlases is not None:
            fold = replace(fold, train=raw.cases, validation=[])
        choice = resolve_atlases(folder, config, fold, lambda case: surveys.get()[case].thumbnail)
    log(f"Atlas: {', '.join(choice.atlases)} ({choice.how})")
    return choice


def _report_folds(raw: RawDataset, folder: Path, atlases: Sequence[str], log: Callable[[str], None]) -> None:
    """Tells which folds hold a named atlas out."""
    splits = read_splits(folder / SPLITS_FILE)
    barred = [str(number) for number, fold in enumerate(splits) if set(atlases) & set(fold["val"])]
    if barred:
        usable = [str(number) for number in range(len(splits)) if str(number) not in barred] + ["all"]
        log(
            f"Note: {', '.join(atlases)} is in the validation part of fold {', '.join(barred)}, which therefore cannot "
            f"be trained with it: train fold {', '.join(usable)}, or edit {folder / SPLITS_FILE}."
        )


def _copy_splits(raw: RawDataset, folder: Path) -> None:
    """Takes over ``splits_final.json`` from the raw data set, as nnU-Net's planner does."""
    source, target = raw.folder / SPLITS_FILE, folder / SPLITS_FILE
    if not source.is_file():
        return
    splits = check_splits(source, raw.cases)
    if not target.is_file():
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
        return
    stored = read_splits(target)
    for number, fold in enumerate(splits):
        same = number < len(stored) and all(set(fold[part]) == set(stored[number][part]) for part in ("train", "val"))
        if not same:
            raise OneShotError(f"Fold {number} of {source} differs from that of {target}: delete one of the two files.")


def _verify_other_labels(raw: RawDataset, options: Options, log: Callable[[str], None]) -> None:
    """Reads every label; what is found serves this check and nothing else."""
    results = run_on_cases(
        _label_warnings,
        [(str(raw.folder), case) for case in raw.labelled],
        num_processes=options.num_processes_fingerprint or default_processes(),
        description="Checking labels",
        show_progress=options.progress,
    )
    for warning in [warning for warnings in results for warning in warnings if "no voxel of" not in warning]:
        log(f"Warning: {warning}")


def _label_warnings(folder: str, case: str) -> list[str]:
    return read_labelled_case(RawDataset(folder), case)[2]


def _plan(
    raw: RawDataset, planner_class: type[Planner], options: Options, log: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the planner and tells its result in a line a configuration."""
    arguments: dict[str, Any] = {"overwrite_target_spacing": None}
    if options.target_spacing is not None:
        arguments["overwrite_target_spacing"] = [float(value) for value in options.target_spacing]
    if options.gpu_memory_target is not None:
        arguments["gpu_memory_target_in_gb"] = options.gpu_memory_target
    if options.plans_name is not None:
        arguments["plans_name"] = options.plans_name
    copied = Path(os.environ["nnUNet_preprocessed"]) / raw.name / "dataset.json"
    if copied.is_file():
        # nnU-Net's planner copies permissions too, and then cannot replace the copy of a read-only file.
        copied.chmod(copied.stat().st_mode | stat.S_IWUSR)
    with contextlib.nullcontext() if options.verbose else contextlib.redirect_stdout(io.StringIO()):
        planner = planner_class(raw.name, **arguments)
        planner.plan_experiment()
    log(f"Plans: {planner.plans_file}")
    if planner.kept_block:
        log(f'Note: the "{BLOCK}" block of the existing plans was kept.')
    for note in planner.notes:
        log(f"Note: {note}")
    plans = load_json_checked(planner.plans_file, "the plans file", dict)
    for line in _described(plans):
        log(line)
    return plans


def _described(plans: Mapping[str, Any]) -> Iterator[str]:
    """A line for each configuration with a patch of its own; what it leaves out is inherited."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(dict(plans))
    for name, configuration in plans["configurations"].items():
        if "patch_size" in configuration:
            full = manager.get_configuration(name)
            spacing = [round(value, 3) for value in full.spacing]
            yield f"  {name}: patch {list(full.patch_size)}, batch {full.batch_size}, spacing {spacing} mm"


def _configurations(plans: Mapping[str, Any], options: Options, log: Callable[[str], None]) -> list[tuple[str, int]]:
    """The configurations to preprocess, each with its number of processes."""
    numbers = list(options.num_processes or [])
    if not numbers:
        numbers = [default_processes(_DEFAULT_PROCESSES.get(name, 4)) for name in options.configurations]
    elif len(numbers) == 1:
        numbers *= len(options.configurations)
    available = plans["configurations"]
    chosen = []
    for name, number in zip(options.configurations, numbers, strict=True):
        if name not in available:
            log(f"Note: the plans have no configuration {name}, it is skipped.")
        elif "data_identifier" in available[name]:
            chosen.append((name, number))
        else:
            log(f"Note: {name} uses the data of {available[name].get('inherits_from')}.")
    if not chosen and not set(options.configurations) & set(available):
        raise OneShotError(
            f"The plans have none of the configurations {', '.join(options.configurations)}: available are "
            f"{', '.join(available)}."
        )
    return chosen


def _copy_description(raw: RawDataset, folder: Path) -> None:
    """Copies ``dataset.json``, as nnU-Net's planner does."""
    with atomic_path(folder / "dataset.json") as temporary:
        shutil.copyfile(raw.folder / "dataset.json", temporary)


def _copy_labels(raw: RawDataset, folder: Path, log: Callable[[str], None]) -> None:
    """Makes ``gt_segmentations`` hold the labels that exist, and only those: it tells which cases are labelled."""
    target_folder = folder / "gt_segmentations"
    target_folder.mkdir(exist_ok=True)
    expected = {f"{case}{raw.file_ending}": label for case in raw.labelled if (label := raw.label(case))}
    for path in target_folder.iterdir():
        if path.name.endswith(raw.file_ending) and path.name not in expected:
            path.unlink()
            log(f"Note: {path} was removed, since the raw data set has no such label any more.")
    for name, source in expected.items():
        target = target_folder / name
        if target.is_file() and os.stat(source).st_mtime <= target.stat().st_mtime:
            continue
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
