"""What of nnU-Net this package overrides; ``python tests/upstream_hooks.py`` accepts what the installed release has.

Their sources are kept as checksums in ``upstream_hooks.json``, several for a hook where releases differ.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nnunet_oneshot

FILE = Path(__file__).with_name("upstream_hooks.json")
# Not overridden, but what overrides and their callers rely on.
RELIED_ON = (
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer.run_training",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer.on_epoch_end",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer.on_validation_epoch_end",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer:nnUNetTrainer._set_batch_size_and_oversample",
    "nnunetv2.training.nnUNetTrainer.variants.optimizer.nnUNetTrainerAdam:nnUNetTrainerAdam.configure_optimizers",
    "nnunetv2.training.loss.compound_losses:DC_and_CE_loss.forward",
    "nnunetv2.training.loss.compound_losses:DC_and_BCE_loss.forward",
    "nnunetv2.training.logging.nnunet_logger:MetaLogger.log",
    "nnunetv2.run.run_training:run_ddp",
    "nnunetv2.run.run_training:maybe_load_checkpoint",
    "nnunetv2.run.load_pretrained_weights:load_pretrained_weights",
)


@dataclass
class Hook:
    """A method of nnU-Net, and the methods of this package in its place."""

    method: Any
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Checksum of the source without comments on lines of their own, blank lines and indentation of the whole."""
        lines = textwrap.dedent(inspect.getsource(self.method)).splitlines()
        kept = [line.rstrip() for line in lines if line.strip() and not line.strip().startswith("#")]
        return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def _plain(attribute: Any) -> Any:
    """The function behind a property or a static method."""
    if isinstance(attribute, property):
        return attribute.fget
    return getattr(attribute, "__func__", attribute)


def _classes() -> set[type]:
    """All classes of this package that derive from one of nnU-Net, and those of the package that they derive from."""
    packages = [
        nnunet_oneshot,
        *(importlib.import_module(f"nnunet_oneshot.{name}") for name in ("trainers", "planners")),
    ]
    names = {module.name for p in packages for module in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")}
    found = set()
    for name in sorted(names):
        if "ext_trainer" in name:
            continue
        for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if any(base.__module__.startswith("nnunetv2.") for base in cls.__mro__):
                found |= {base for base in cls.__mro__ if base.__module__.startswith("nnunet_oneshot.")}
    return found


def hooks() -> dict[str, Hook]:
    """``module:Class.method`` of nnU-Net to what is known of it."""
    found: dict[str, Hook] = {}
    for cls in sorted(_classes(), key=lambda one: one.__qualname__):
        for base in cls.__mro__:
            if not base.__module__.startswith("nnunetv2."):
                continue
            for name in sorted(set(vars(cls)) & set(vars(base))):
                own, theirs = _plain(vars(cls)[name]), _plain(vars(base)[name])
                if inspect.isfunction(own) and inspect.isfunction(theirs):
                    hook = found.setdefault(f"{base.__module__}:{base.__qualname__}.{name}", Hook(theirs))
                    hook.overrides[cls.__qualname__] = own
    for key in RELIED_ON:
        module, _, path = key.partition(":")
        value: Any = importlib.import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
        found.setdefault(key, Hook(value))
    return found


def accepted() -> dict[str, list[str]]:
    """The checksums of the sources that this package is known to work with."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def accept() -> None:
    """Adds what the installed release has, and forgets what is not overridden any more."""
    before = accepted() if FILE.is_file() else {}
    content = {key: sorted({*before.get(key, []), hook.digest}) for key, hook in sorted(hooks().items())}
    FILE.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    accept()
