"""The steps of the command line as typed functions, under its names: each command calls that of its name here.

``import_scans`` is ``nnunet_oneshot import``, since ``import`` is a word of Python. Arguments are the commands' options
in full; errors are `nnunet_oneshot.errors.OneShotError`. A step is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_oneshot.data.import_scans import import_scans
    from nnunet_oneshot.data.options import Options
    from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess
    from nnunet_oneshot.demo.run import run_demo as demo
    from nnunet_oneshot.doctor import examine as doctor
    from nnunet_oneshot.environment import shell_export as env
    from nnunet_oneshot.evaluation.benchmark import run_benchmark as benchmark
    from nnunet_oneshot.evaluation.dicom_export import write_dicom_segmentations as to_dicom
    from nnunet_oneshot.evaluation.propagation import propagate
    from nnunet_oneshot.evaluation.volumes import write_statistics as statistics
    from nnunet_oneshot.export import export_model as export
    from nnunet_oneshot.registration.dataset.command import register
    from nnunet_oneshot.registration.dataset.suggestion import suggest_atlas, suggest_next
    from nnunet_oneshot.registration.files.register_pair import register_pair
    from nnunet_oneshot.report.command import report

__all__ = [
    "Options",
    "benchmark",
    "demo",
    "doctor",
    "env",
    "export",
    "import_scans",
    "plan_and_preprocess",
    "propagate",
    "register",
    "register_pair",
    "report",
    "statistics",
    "suggest_atlas",
    "suggest_next",
    "to_dicom",
]

_PLACES = {
    "Options": ("data.options", "Options"),
    "benchmark": ("evaluation.benchmark", "run_benchmark"),
    "demo": ("demo.run", "run_demo"),
    "doctor": ("doctor", "examine"),
    "env": ("environment", "shell_export"),
    "export": ("export", "export_model"),
    "import_scans": ("data.import_scans", "import_scans"),
    "plan_and_preprocess": ("data.plan_and_preprocess", "plan_and_preprocess"),
    "propagate": ("evaluation.propagation", "propagate"),
    "register": ("registration.dataset.command", "register"),
    "register_pair": ("registration.files.register_pair", "register_pair"),
    "report": ("report.command", "report"),
    "statistics": ("evaluation.volumes", "write_statistics"),
    "suggest_atlas": ("registration.dataset.suggestion", "suggest_atlas"),
    "suggest_next": ("registration.dataset.suggestion", "suggest_next"),
    "to_dicom": ("evaluation.dicom_export", "write_dicom_segmentations"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Settings are checked against all that is registered.
    import_module("nnunet_oneshot.registries")
    module, function = _PLACES[name]
    return getattr(import_module(f"nnunet_oneshot.{module}"), function)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
