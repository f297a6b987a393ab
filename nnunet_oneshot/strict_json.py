"""JSON as it is taken from users and files: no entry twice, nothing nested without end."""

from __future__ import annotations

import json
from typing import Any

# Deeper than any file of ours or of nnU-Net, and not so deep that anybody's stack of calls is exhausted.
_DEEPEST = 50
_LONGEST_SHOWN = 120


def parse_json(text: str) -> Any:
    """The content of JSON, in which no object has an entry twice, and nothing is nested too deeply.

    Raises:
        ValueError: The text is no such JSON; a `json.JSONDecodeError` where it is none at all.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [content]
    for _ in range(_DEEPEST):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [one for container in inner for one in container]
    if level:
        raise ValueError("it is nested too deeply")
    return content


def _object(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(entries)
    if len(found) < len(entries):
        names = [name for name, _ in entries]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the entry {json.dumps(twice)[:_LONGEST_SHOWN]} more than once")
    return found
