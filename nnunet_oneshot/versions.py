"""Versions of what decides a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in ("nnunet_oneshot", "nnunetv2", "torch", "monai", "antspyx", "convexAdam", "picsl-greedy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
