"""What a registry gives, refuses and tells."""

import sys
from dataclasses import dataclass

import pytest

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registry import MODULES_VARIABLE, Registry, load_modules


@dataclass(frozen=True)
class Entry:
    function: object
    loud: bool = False

    @property
    def meaning(self):
        return self.function.__doc__


@pytest.fixture
def registry():
    registry = Registry("sound")

    @registry.register("moo", Entry)
    def moo():
        """What a cow
        says.

        More of it.
        """

    @registry.register("baa", Entry, loud=True)
    def baa():
        """What a sheep says."""

    return registry


def test_entries_come_in_the_order_of_registration(registry):
    assert list(registry) == ["moo", "baa"] and len(registry) == 2
    assert registry["baa"].loud and not registry["moo"].loud
    assert "moo" in registry and "oink" not in registry


def test_the_meaning_is_the_first_paragraph(registry):
    assert registry.meaning("moo") == "What a cow says."
    assert Registry("x").what == "x"


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(registry):
    with pytest.raises(OneShotError, match="The sound 'oink' is not known: known are moo, baa."):
        registry["oink"]


def test_a_name_is_taken_once(registry):
    with pytest.raises(ValueError, match="'moo' is registered already"):
        registry.add("moo", Entry)
    registry.remove("moo")
    registry.add("moo", Entry)
    assert list(registry) == ["baa", "moo"]


def test_modules_of_the_user_are_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_sounds_a", "own_sounds_b"):
        (tmp_path / f"{name}.py").write_text("loud = True\n")
    monkeypatch.setenv(MODULES_VARIABLE, "own_sounds_a, own_sounds_b,")
    load_modules()
    assert {"own_sounds_a", "own_sounds_b"} <= set(sys.modules)
    for name in ("own_sounds_a", "own_sounds_b"):
        del sys.modules[name]


def test_no_modules_are_nothing(monkeypatch):
    monkeypatch.delenv(MODULES_VARIABLE, raising=False)
    load_modules()
    monkeypatch.setenv(MODULES_VARIABLE, "")
    load_modules()


def test_a_module_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setenv(MODULES_VARIABLE, "no_such_sounds")
    with pytest.raises(OneShotError, match="names the module 'no_such_sounds', which cannot be imported.*PYTHONPATH"):
        load_modules()
