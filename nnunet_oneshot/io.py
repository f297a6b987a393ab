"""Files that are either complete or absent, and errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from nnunet_oneshot.errors import NotReadyError, OneShotError, shown
from nnunet_oneshot.strict_json import parse_json

CACHE_VARIABLE = "nnUNet_oneshot_cache"
# A folder of more entries than this is not searched for leftovers again before so many seconds have passed: else the
# cost of writing many files into one folder would grow with the square of their number.
_MANY_ENTRIES, _PAUSE_SECONDS = 500, 10.0
_SEARCH_AGAIN: dict[Path, float] = {}


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: The file to write. Its folder must exist.

    Yields:
        The path to write to. It has the suffixes of ``target``, since many writers choose a format by them.
    """
    target = Path(target)
    _clear_leftovers(target.parent)
    handle, name = tempfile.mkstemp(prefix=_prefix("partial"), suffix=f"-{target.name}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a shared dataset folder needs the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _prefix(kind: str) -> str:
    """Beginning of a temporary name: its machine and process, so that what killed processes left is known."""
    return f".{kind}-{_machine()}-{os.getpid()}-"


@lru_cache(maxsize=1)
def _machine() -> str:
    """Where the number of a process means one process: a host, and in it a container."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:
        container = ""
    return hashlib.sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def _clear_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left in a folder; restores the folders that they had put aside."""
    if time.monotonic() < _SEARCH_AGAIN.get(folder, 0.0):
        return
    pattern = re.compile(rf"\.(partial|previous)-{_machine()}-(\d+)-[a-z0-9_]{{8}}-(.+)")
    try:
        names = os.listdir(folder)
    except OSError:
        # Whoever writes there tells it better.
        return
    if len(names) > _MANY_ENTRIES:
        _SEARCH_AGAIN[folder] = time.monotonic() + _PAUSE_SECONDS
    found = [match for name in names if name.startswith(".p") and (match := pattern.fullmatch(name))]
    for match in found:
        kind, process, name = match.groups()
        if _is_alive(int(process)):
            continue
        left = folder / match[0]
        if kind == "previous" and not (folder / name).exists():
            with suppress(OSError):
                os.replace(left, folder / name)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        # There the signal 0 would interrupt it.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def is_occupied(path: str | os.PathLike) -> bool:
    """Whether a new folder at this path would stand in the way of something: a file, or a folder that holds any."""
    path = Path(path)
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@contextmanager
def temporary_folder(parent: str | os.PathLike, name: str) -> Iterator[Path]:
    """An empty folder that is gone when the block ends; one that a killed process left is removed by the next.

    Args:
        parent: The folder in which it lies; made where it does not exist.
        name: What it is for, the end of its own name.
    """
    parent = Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(parent)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix("partial"), suffix=f"-{name}", dir=parent))
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_folder(target: str | os.PathLike) -> Iterator[Path]:
    """An empty temporary folder beside ``target`` that takes its place when the block ends without an error.

    Args:
        target: The folder to write; an existing one is replaced as a whole, and kept when the block fails.

    Yields:
        The folder to write to.
    """
    target = Path(target)
    with temporary_folder(target.parent, target.name) as temporary:
        yield temporary
        previous = temporary.with_name(temporary.name.replace("partial", "previous", 1))
        if target.exists():
            os.replace(target, previous)
        try:
            os.replace(temporary, target)
        except OSError:
            if previous.exists() and not target.exists():
                os.replace(previous, target)
            raise
        shutil.rmtree(previous, ignore_errors=True)


def save_json_atomic(content: Any, target: str | os.PathLike, *, sort_keys: bool = False) -> None:
    """Writes ``content`` as indented JSON; ``target`` is never seen half-written.

    Raises:
        OneShotError: The folder cannot be written to.
    """
    save_text_atomic(json.dumps(content, indent=4, sort_keys=sort_keys) + "\n", target)


def save_text_atomic(text: str, target: str | os.PathLike) -> None:
    """Writes ``text`` as UTF-8; ``target`` is never seen half-written.

    Raises:
        OneShotError: The folder cannot be written to.
    """
    with writing(target), atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Maybe:
    """A shape, or null; see `load_json_checked`."""

    shape: Shape


@dataclass(frozen=True)
class Each:
    """An object of any names whose values have a shape; see `load_json_checked`."""

    shape: Shape


# `float` is a finite number, whole or not, `object` anything; a list holds the shape of its items; an object names
# those of its entries, a name that ends in a question mark may be missing, and others may be there.
Shape: TypeAlias = "type | Maybe | Each | list[Shape] | dict[str, Shape]"

_KINDS: dict[type, str] = {
    dict: "a JSON object {...}",
    list: "a list [...]",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}


def load_json_checked(path: str | os.PathLike, what: str, shape: Shape) -> Any:
    """Reads a JSON file and checks at the door that it holds what is read of it.

    Args:
        path: The file.
        what: What the file is, for the error, such as ``"the plans file"``.
        shape: What it must hold: a type (`float` is any finite number), `Maybe` or `Each` of a shape, ``[shape]`` for
            a list of such items, ``{"name": shape, "other?": shape}`` for an object with these entries and any others,
            of which ``other`` may be missing.

    Raises:
        OneShotError: The file is missing, unreadable, not JSON, or holds something else.
    """
    remedy = "mend it in an editor, or delete it if a command of this package wrote it, and run that command again."
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OneShotError(f"{_sentence(what)} {path} does not exist.") from error
    except OSError as error:
        raise OneShotError(f"{_sentence(what)} {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise OneShotError(f"{_sentence(what)} {path} is not valid JSON ({error}): {remedy}") from error
    if fault := _fault(content, shape, ""):
        raise OneShotError(f"{_sentence(what)} {path} {fault}: {remedy}")
    return content


def _fault(value: Any, shape: Shape, place: str) -> str | None:
    """What of a JSON content does not fit a shape, the end of a sentence; None where all does."""
    if isinstance(shape, Maybe):
        return None if value is None else _fault(value, shape.shape, place)
    kind = dict if isinstance(shape, (dict, Each)) else list if isinstance(shape, list) else shape
    if not _is_a(value, kind):
        return f"must hold {_KINDS[kind]}{f' as {place}' if place else ''}, found {shown(value)}"
    if isinstance(shape, dict):
        parts: list[tuple[Any, Shape, str | int]] = []
        for entry, inner in shape.items():
            key = entry.removesuffix("?")
            if key in value:
                parts.append((value[key], inner, key))
            elif key == entry:
                return f"lacks {shown(key)}{f' in {place}' if place else ''}"
    elif isinstance(shape, Each):
        parts = [(inner, shape.shape, name) for name, inner in value.items()]
    elif isinstance(shape, list):
        parts = [(inner, shape[0], number) for number, inner in enumerate(value)]
    else:
        return None
    for inner_value, inner_shape, name in parts:
        here = shown(name) if isinstance(name, str) and not place else f"{place}[{shown(name)}]"
        if fault := _fault(inner_value, inner_shape, here):
            return fault
    return None


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        # A whole number of JSON may be too large to be converted.
        return (_is_a(value, int) or isinstance(value, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


@contextmanager
def writing(target: str | os.PathLike) -> Iterator[None]:
    """Turns an operating system's refusal to write into an `OneShotError` that names the path.

    Args:
        target: The file or folder being written, named when the error itself names none.
    """
    try:
        yield
    except OSError as error:
        path = error.filename or target
        raise OneShotError(
            f"Cannot write {path} ({error.strerror or error}): the folder must exist, be writable and have space left. "
            f"Free space, change its permissions, or point nnU-Net's environment variables at another folder."
            f"{_advice_for_shared_data(path)}"
        ) from error


def _advice_for_shared_data(path: str | os.PathLike) -> str:
    """What to do about a path in preprocessed data that cannot be written; empty for any other."""
    shared = os.environ.get("nnUNet_preprocessed")
    if not shared or Path(shared).absolute() not in Path(path).absolute().parents:
        return ""
    return f" A folder named by {CACHE_VARIABLE} takes what registration and training add to preprocessed data."


def kept_folder(dataset_folder: str | os.PathLike) -> Path:
    """Where registration and training keep what belongs to a preprocessed dataset.

    That is the folder itself, or one of its name in the folder that ``nnUNet_oneshot_cache`` names, which is made.

    Args:
        dataset_folder: ``nnUNet_preprocessed/DatasetXXX_Name``.

    Raises:
        OneShotError: It cannot be made.
    """
    named, folder = os.environ.get(CACHE_VARIABLE), Path(dataset_folder)
    if not named:
        return folder
    kept = Path(named).expanduser().absolute() / folder.name
    with writing(kept):
        kept.mkdir(parents=True, exist_ok=True)
    return kept


_EXPLANATIONS = {
    "nnUNet_raw": "the folder that holds the raw datasets (DatasetXXX_Name)",
    "nnUNet_preprocessed": "the folder for preprocessed data",
    "nnUNet_results": "the folder for trained models",
}


def require_env(*names: str) -> tuple[Path, ...]:
    """The folders that nnU-Net's environment variables name.

    Args:
        *names: Variables such as ``"nnUNet_raw"``.

    Returns:
        One path for each name.

    Raises:
        OneShotError: A variable is unset or empty.
    """
    unset = [name for name in names if not os.environ.get(name)]
    if unset:
        listed = "; ".join(f"{name} ({_EXPLANATIONS[name]})" if name in _EXPLANATIONS else name for name in unset)
        example = f"export {unset[0]}=/path/to/{unset[0]}"
        raise NotReadyError(f"Environment variables are not set: {listed}. Set them first, for example: {example}")
    return tuple(Path(os.environ[name]) for name in names)


def _sentence(what: str) -> str:
    return what[:1].upper() + what[1:]
