"""Where networks and registrations run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

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
    check_operations(device)
    return device


def check_operations(device: torch.device) -> None:
    """Sees to it that a device computes what registration and training need; only of MPS it is in doubt.

    Which operations torch computes there differs between its releases. Those that it lacks are computed on the
    processor if a variable of torch says so, which torch reads as it is loaded.

    Raises:
        OneShotError: The device lacks operations.
    """
    if device.type != "mps":
        return
    missing = [name for name, run in _OPERATIONS.items() if not _runs(run, device)]
    if missing:
        raise OneShotError(
            f"Device {str(device)!r} lacks operations in torch {torch.__version__}: {', '.join(missing)}. Set "
            f"PYTORCH_ENABLE_MPS_FALLBACK=1 before the command, with which torch computes them on the processor, or "
            f"use the device cpu."
        )


def _runs(operation: Callable[[Tensor], Tensor], device: torch.device) -> bool:
    """Whether an operation and its gradient are computed on a device."""
    image = torch.ones((1, 1, 4, 4, 4), device=device, requires_grad=True)
    try:
        result = operation(image)
        if result.requires_grad:
            result.sum().backward()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _convolved(image: Tensor) -> Tensor:
    return F.instance_norm(F.conv_transpose3d(F.conv3d(image, image[..., :2, :2, :2]), image[..., :2, :2, :2]))


# Of a volume (1, 1, 4, 4, 4); those that the package and nnU-Net's networks use and that a device may lack.
_OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "grid_sample": lambda image: F.grid_sample(image, image[0, ..., :3][None] / 4, align_corners=False),
    "interpolate (trilinear)": lambda image: F.interpolate(image, size=(6, 6, 6), mode="trilinear"),
    "adaptive_avg_pool3d": lambda image: F.adaptive_avg_pool3d(image, (2, 2, 2)),
    "avg_pool3d": lambda image: F.avg_pool3d(image, 2),
    "max_pool3d": lambda image: F.max_pool3d(image, 3, stride=1, padding=1),
    "pad (replicate)": lambda image: F.pad(image, [1] * 6, "replicate"),
    "convolutions": _convolved,
    "index_add": lambda image: image.new_zeros(3).index_add(0, image.detach().long().flatten(), image.flatten()),
    "linalg.svdvals": lambda image: torch.linalg.svdvals(image.detach()[0, 0, :3, :3, :3]),
    "unique": lambda image: torch.unique(image.detach()),
    "bincount": lambda image: torch.bincount(image.detach().long().flatten(), minlength=3),
    "searchsorted": lambda image: torch.searchsorted(image.detach().flatten(), image.detach()),
}


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
