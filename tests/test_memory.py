"""Memory that was freed goes back to the system, in the gaps between what is still used too."""

import pytest
import torch

from nnunet_oneshot import memory
from nnunet_oneshot.memory import release_freed_memory


def resident():
    """Bytes of this process that are in memory and in no file."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(memory._trim is None, reason="the C library keeps what is freed")
def test_gaps_are_given_back():
    # Below the size from which the C library asks the system for each block alone.
    blocks = [torch.ones(25_000) for _ in range(2_000)]
    kept = blocks[::20]
    del blocks
    release_freed_memory()
    before = resident()
    blocks = [torch.ones(25_000) for _ in range(2_000)]
    kept += blocks[::20]
    del blocks
    grown = resident() - before
    release_freed_memory()
    assert resident() - before < max(40e6, 0.5 * grown)
    assert all(block[0] == 1 for block in kept)


def test_without_such_a_library_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory, "_trim", None)
    release_freed_memory()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory._found() is None
