"""What of the labels in ``dataset.json`` is a structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def structures(content: Mapping[str, Any]) -> dict[str, Any]:
    """Name of each structure to its value, or to those of a region: every label but background and ignore.

    Args:
        content: Content of ``dataset.json``.
    """
    return {name: value for name, value in content["labels"].items() if name not in ("background", "ignore")}
