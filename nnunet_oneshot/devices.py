"""Where networks and registrations run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from nnunet_oneshot.errors import OneShotError


def named_device(name: str) -> torch.device:
    """The device of this name, of which this machine may have none.

    Raises:
        OneShotError: The name is none of a device.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise OneShotError(f"Device {name!r} is not known ({error}): use cpu, cuda or mps.") from error


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Args:
        name: ``cpu``, ``cuda`` or ``mps``, perhaps with an index.

    Raises:
        OneShotError: There is none that can be used.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise OneShotError(f"Device {name!r} is not available ({error}): use cpu, cuda or mps.") from error
    return device


@contextlib.contextmanager
def host_threads(device: torch.device) -> Iterator[None]:
    """Lets torch use all cores of the host for what is computed there beside ``device``.

    nnU-Net leaves torch one thread where it trains on a GPU, whose patches are made by other processes. A registration
    brings volumes onto its grid on the host, and nothing else runs meanwhile. On a processor nothing is changed.
    """
    if device.type == "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """How many cores of this machine the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
