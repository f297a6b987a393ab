"""Names that become parts of paths: one check at the door.

Cases, configurations, plans and data identifiers come from files that anybody may have written. A name such as
``../../x`` would otherwise lead to a path outside the dataset's folders.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

from nnunet_oneshot.errors import OneShotError

# Most file systems allow 255 bytes; suffixes and the prefixes of temporary files need room.
MAX_BYTES = 180
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}


def check_name(name: Any, what: str, where: str | os.PathLike) -> str:
    """Makes sure that a name can be the name of a file or folder, and nothing else than that.

    Args:
        name: The name.
        what: What it names, for the error, such as ``"case"``.
        where: The file or option it comes from, for the error.

    Returns:
        The name.

    Raises:
        OneShotError: It is no text, empty, ``.`` or ``..``, starts with a dot or a hyphen, ends in a dot or a space,
            holds a separator of paths, a control character or another character that some file system refuses, is
            longer than 180 bytes, or is reserved by an operating system.
    """
    reason = _objection(name)
    if reason:
        shown = repr(name) if len(repr(name)) <= 120 else f"{repr(name)[:117]}..."
        raise OneShotError(
            f"The {what} {shown} of {where} cannot be used as the name of a file: it {reason}. Rename it; letters, "
            f"digits, hyphens and underscores are safe everywhere."
        )
    return name


def inside(folder: str | os.PathLike, name: str, what: str, where: str | os.PathLike) -> Path:
    """The path of a checked name in a folder; see `check_name`."""
    return Path(folder) / check_name(name, what, where)


def is_list_of_names(value: Any) -> bool:
    """Whether what a file holds is a list of text, which may be empty."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _objection(name: Any) -> str | None:
    """Why a name is refused, a clause; None where it is fine."""
    if not isinstance(name, str):
        return f"is no text but {type(name).__name__}"
    if not name.strip():
        return "is empty"
    if name in (".", ".."):
        return "means a folder"
    if name[0] in ".-":
        return f"starts with {name[0]!r}"
    if name[-1] in ". ":
        return f"ends in {name[-1]!r}"
    refused = sorted({character for character in name if character in '/\\:*?"<>|' or _is_control(character)})
    if refused:
        return f"holds {', '.join(map(repr, refused))}"
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "holds characters that are no valid Unicode"
    if length > MAX_BYTES:
        return f"is {length} bytes long, more than {MAX_BYTES}"
    if name.split(".")[0].upper() in _RESERVED:
        return "is reserved by Windows"
    return None


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")
