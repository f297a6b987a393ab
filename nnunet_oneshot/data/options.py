"""Options of planning and preprocessing, and the checks that need no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_oneshot.config import BLOCK
from nnunet_oneshot.data.atlas import check_labelled
from nnunet_oneshot.data.raw import RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.names import check_name

DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
_NNUNET_CONFIGURATIONS = (*DEFAULT_CONFIGURATIONS, "3d_cascade_fullres")


@dataclass(frozen=True)
class Options:
    """Options of planning and preprocessing; names and defaults follow ``nnUNetv2_plan_and_preprocess``.

    Attributes:
        atlases: Labelled cases to warp; None lets ``oneshot_atlas.json`` or the program decide.
        configurations: Configurations to preprocess; those of nnU-Net's that the plans lack are skipped.
        num_processes: Processes for preprocessing: one number, or one for each configuration; None chooses.
        num_processes_fingerprint: Processes for reading all images; None chooses.
        verify: Also read the labels that are not atlases', to report bad ones.
        clean: Read all images again even if nothing changed.
        no_preprocessing: Stop after planning.
        gpu_memory_target: GB for the whole training; None keeps the planner's.
        plans_name: Name of the plans; None keeps the planner's.
        target_spacing: Spacing (mm) of the full resolution instead of the median.
        verbose: Print what nnU-Net's planner and preprocessor print.
        progress: Show progress bars.
    """

    atlases: Sequence[str] | None = None
    configurations: Sequence[str] = DEFAULT_CONFIGURATIONS
    num_processes: Sequence[int] | None = None
    num_processes_fingerprint: int | None = None
    verify: bool = False
    clean: bool = False
    no_preprocessing: bool = False
    gpu_memory_target: float | None = None
    plans_name: str | None = None
    target_spacing: Sequence[float] | None = None
    verbose: bool = False
    progress: bool = True


def check_plans_name(options: Options) -> None:
    """Raises an `OneShotError` for a name of the plans that is no name of a file."""
    if options.plans_name is not None:
        check_name(options.plans_name, "name of the plans", "-overwrite_plans_name or -plans_name")


def check_options(raw: RawDataset, options: Options, previous: Mapping[str, Any]) -> None:
    """Raises an `OneShotError` for options that cannot be met, before anything is read or written."""
    for name in options.configurations:
        check_name(name, "configuration", "-c")
    known = {*_NNUNET_CONFIGURATIONS, *previous.get("configurations", {})}
    unknown = [name for name in options.configurations if name not in known]
    if unknown:
        raise OneShotError(f"Unknown configuration {', '.join(unknown)}: known are {', '.join(sorted(known))}.")
    count = len(options.num_processes or ())
    if count > 1 and count != len(options.configurations):
        raise OneShotError(
            f"-np has {count} numbers for {len(options.configurations)} configurations: give one, or one for each."
        )
    if any(number < 1 for number in (*(options.num_processes or ()), options.num_processes_fingerprint or 1)):
        raise OneShotError("-np and -npfp need numbers of at least 1.")
    if options.gpu_memory_target is not None and options.gpu_memory_target <= 0:
        raise OneShotError(f"-gpu_memory_target is {options.gpu_memory_target}: give a number of GB above 0.")
    spacing = options.target_spacing
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise OneShotError(f"-overwrite_target_spacing is {list(spacing)}: give three numbers (mm) above 0.")
    if options.atlases is not None:
        check_labelled(options.atlases, raw.cases, raw.labelled, "named by --atlas")
        stored = previous.get(BLOCK, {}).get("atlases")
        if stored is not None and list(stored) != list(options.atlases):
            raise OneShotError(
                f'The plans\' "{BLOCK}" block names the atlases {stored}, which come before --atlas '
                f'{" ".join(options.atlases)}: set "atlases" to null there, or leave --atlas out.'
            )
