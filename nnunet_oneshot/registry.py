"""Things that are chosen by name, each registered in one place with its meaning."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from nnunet_oneshot.errors import OneShotError

T = TypeVar("T")
# Setting -> the registry that it chooses from, of the modules that are loaded; `nnunet_oneshot.registries` loads all.
CHOSEN_BY_SETTING: dict[str, Registry] = {}
# Names modules of the user that register entries of their own.
MODULES_VARIABLE = "nnUNet_oneshot_modules"


def load_modules() -> None:
    """Imports the modules that ``nnUNet_oneshot_modules`` names, separated by commas, so that their entries are known.

    Commands do so first, and so do the processes that they start.

    Raises:
        OneShotError: A module cannot be imported.
    """
    for name in filter(None, map(str.strip, os.environ.get(MODULES_VARIABLE, "").split(","))):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise OneShotError(
                f"The environment variable {MODULES_VARIABLE} names the module {name!r}, which cannot be imported "
                f"({error}): add its folder to PYTHONPATH, or leave it out."
            ) from error


class Registry(Mapping[str, T]):
    """Entries by name, in the order in which they were added.

    Args:
        what: What an entry is, for errors, such as ``"similarity"``.
        setting: Name of the setting of the ``oneshot`` block that chooses one of the entries, or None.
    """

    def __init__(self, what: str, *, setting: str | None = None) -> None:
        self.what = what
        self._added: dict[str, T] = {}
        if setting is not None:
            CHOSEN_BY_SETTING[setting] = self

    @property
    def _entries(self) -> Mapping[str, T]:
        """All entries, in their order."""
        return self._added

    def add(self, name: str, entry: T) -> T:
        """Adds an entry.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._entries:
            raise ValueError(f"The {self.what} {name!r} is registered already: choose another name.")
        self._added[name] = entry
        return entry

    def register(self, name: str, make: Callable[..., T], **attributes: Any) -> Callable[[Callable], Callable]:
        """A decorator that adds ``make(function, **attributes)`` and leaves the function as it is."""

        def decorate(function: Callable) -> Callable:
            self.add(name, make(function, **attributes))
            return function

        return decorate

    def remove(self, name: str) -> None:
        """Takes an entry out again."""
        del self._added[name]

    def meaning(self, name: str) -> str:
        """The first paragraph of the entry's ``meaning`` or docstring, on one line, for the reference."""
        entry = self[name]
        text = getattr(entry, "meaning", None) or inspect.getdoc(entry) or ""
        return " ".join(text.split("\n\n")[0].split())

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise OneShotError(
                f"The {self.what} {name!r} is not known: known are {', '.join(self._entries)}."
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
