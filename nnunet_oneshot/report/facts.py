"""Plan, settings, versions, times and commands for the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_oneshot.config import OneShotConfig, differences
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.report.registrations import Pair
from nnunet_oneshot.report.training import Training
from nnunet_oneshot.versions import versions


def plan_rows(prepared: PreparedDataset) -> list[tuple[str, str]]:
    """What nnU-Net planned, name and value."""
    configuration = prepared.configuration_manager
    kwargs = dict(configuration.network_arch_init_kwargs)
    rows = [
        ("configuration", prepared.configuration),
        ("plans", f"{prepared.plans_name} ({prepared.plans.get('experiment_planner_used', 'unknown planner')})"),
        ("spacing", f"{_sizes(configuration.spacing)} mm"),
        ("median size", f"{_sizes(configuration.median_image_size_in_voxels)} voxels"),
        ("patch", f"{_sizes(configuration.patch_size)} voxels"),
        ("batch", str(configuration.batch_size)),
        ("normalisation", ", ".join(configuration.normalization_schemes)),
        ("network", str(configuration.network_arch_class_name).rsplit(".", 1)[-1]),
        ("stages", str(kwargs.get("n_stages", ""))),
        ("features", _joined(kwargs.get("features_per_stage"))),
        ("strides", _joined(kwargs.get("strides"))),
    ]
    return [(name, value) for name, value in rows if value]


def changed_settings(config: OneShotConfig, training: Training | None) -> list[str]:
    """Settings of the ``oneshot`` block that differ from their defaults, clauses; those of the training, if any."""
    stored = training.settings.get("settings") if training is not None else None
    now = stored if isinstance(stored, Mapping) else config.to_dict()
    return [
        clause.replace(" was ", ": default ", 1).replace(", is ", ", here ")
        for clause in differences(OneShotConfig().to_dict(), now)
    ]


def version_rows(pairs: Sequence[Pair], training: Training | None) -> list[tuple[str, str]]:
    """Who made what with which versions."""
    found = [("this page", _listed(versions()))]
    made: dict[str, int] = {}
    for pair in pairs:
        text = _listed(pair.record.get("versions", {}))
        made[text] = made.get(text, 0) + 1
    found += [(f"{number} registrations", text) for text, number in made.items() if text]
    stored = training.settings.get("versions") if training is not None else None
    if isinstance(stored, Mapping):
        found.append(("training", _listed(stored)))
    return found


def time_rows(pairs: Sequence[Pair], training: Training | None) -> list[tuple[str, str]]:
    """How long everything took."""
    seconds = [float(pair.quality.get("seconds", 0)) for pair in pairs]
    rows = [("registrations", f"{duration(sum(seconds))} in all, {sum(seconds) / len(seconds):.1f} s a pair")]
    if training is not None and training.seconds:
        rows.append(("training", f"{duration(training.seconds)} for {training.epochs} epochs"))
    return rows


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def commands(prepared: PreparedDataset, fold: str, trainer: str) -> list[str]:
    """The commands that lead to what the page shows."""
    number = str(int(prepared.name[7:10])) if prepared.name[7:10].isdecimal() else prepared.name
    c, p = prepared.configuration, prepared.plans_name
    planner = str(prepared.plans.get("experiment_planner_used", "OneShotPlanner"))
    plan = ["nnunet_oneshot", "plan_and_preprocess", "-d", number, "-c", c, "-pl", planner]
    if p not in ("nnUNetOneShotPlans", "nnUNetOneShotCPUPlans"):
        plan += ["-overwrite_plans_name", p]
    run = ["-d", number, "-c", c, "-p", p, "-f", fold]
    lines = [
        plan,
        ["nnunet_oneshot", "register", *run],
        ["nnUNetv2_train", number, c, fold, "-tr", trainer, "-p", p],
        ["nnunet_oneshot", "report", *run, "-tr", trainer],
    ]
    return [shlex.join(words) for words in lines]


def _sizes(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _joined(values: Any) -> str:
    if values is None:
        return ""
    return ", ".join("x".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in values)


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())
