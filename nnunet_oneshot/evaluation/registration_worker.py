"""Registration methods, each in a process of its own, so that its memory is its own: ``python -m ... METHOD``.

The process takes settings and then one pair after another, pickled, from its input, and answers each on its output. It
loads only the libraries its method needs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.errors import OneShotError

SYN = {"syn": "SyN", "syncc": "SyNCC"}
METHODS = ("affine", "ours", *SYN, "bspline", "demons")
# An image (C, X, Y, Z) and its 3 voxel edges, mm, array axis order.
Volume = tuple[np.ndarray, Sequence[float]]
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


class Worker:
    """A method's process, started at once.

    Args:
        method: One of `METHODS`.
        config: Settings of our registration; its affine stage and choice of metric are those of the others too.
        seed: Of ANTs' random sampling.
        threads: Of every library.
        device: Where our deformable stage runs.
    """

    def __init__(self, method: str, *, config: RegistrationConfig, seed: int, threads: int, device: str) -> None:
        self.method = method
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, method],
            env={**os.environ, **{name: str(threads) for name in _THREADS}},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._ask({"config": config, "seed": seed, "device": device})

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def measure(self, case: Volume, atlas: Volume, atlas_labels: np.ndarray | None = None) -> dict[str, Any]:
        """Registers an atlas to a case.

        Args:
            case: Image and voxel edges.
            atlas: Image and voxel edges.
            atlas_labels: (1, X, Y, Z), for the ``quality`` figures of ``"ours"`` alone.

        Returns:
            What the function `measure` gives, and ``start_memory_mb``, resident once the libraries were loaded.

        Raises:
            OneShotError: The method failed on this pair, or its process ended.
        """
        reply = self._ask((case, atlas, atlas_labels))
        if "error" in reply:
            raise OneShotError(reply["error"])
        return reply

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, request: Any) -> dict[str, Any]:
        try:
            pickle.dump(request, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            self._process.kill()
            raise OneShotError(
                f"The process of method {self.method} ended with status {self._process.wait()} and no answer; its "
                f"messages are above, and status -9 often means that memory ran out. Leave the method out with "
                f"--methods, or free memory and run the same command again."
            ) from error


def measure(
    method: str,
    case: Volume,
    atlas: Volume,
    *,
    config: RegistrationConfig,
    seed: int,
    device: str,
    atlas_labels: np.ndarray | None = None,
) -> dict[str, Any]:
    """Registers an atlas to a case in this process.

    Returns:
        ``seconds`` and ``cpu_seconds`` (all threads) from the images in memory to the transform, ``peak_memory_mb`` of
        this process until then (MiB, None where the system does not tell), ``places``: (3, U, V, W) float32, where
        every voxel of the case is read in the atlas, voxel coordinates, and for ``"ours"`` the ``quality`` figures.
    """
    cpu, started = time.process_time(), time.perf_counter()
    places, quality = _register(method, case, atlas, config=config, seed=seed, device=device, atlas_labels=atlas_labels)
    figures = {
        "seconds": round(time.perf_counter() - started, 4),
        "cpu_seconds": round(time.process_time() - cpu, 4),
        "peak_memory_mb": memory_mb()[1],
    }
    return {**figures, **({"quality": quality} if quality else {}), "places": places()}


def memory_mb() -> tuple[float | None, float | None]:
    """Present and peak resident memory of this process, MiB; None where the system does not tell.

    Linux's own record comes first: that of ``getrusage`` begins at the memory of the process that started this one.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            entries = dict(line.split(":", 1) for line in file)
        return tuple(round(int(entries[name].split()[0]) / 2**10, 1) for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None, None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return None, round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _register(
    method: str,
    case: Volume,
    atlas: Volume,
    *,
    config: RegistrationConfig,
    seed: int,
    device: str,
    atlas_labels: np.ndarray | None,
) -> tuple[Callable[[], np.ndarray], dict[str, Any]]:
    """Finds the transform of one method: a function that reads it at every voxel of the case, and quality figures."""
    (case_image, case_spacing), (atlas_image, atlas_spacing) = case, atlas
    if method == "ours":
        from nnunet_oneshot.registration.pairs import register_arrays
        from nnunet_oneshot.registration.warp import atlas_coordinates

        registration = register_arrays(
            atlas_image,
            case_image,
            atlas_spacing=atlas_spacing,
            case_spacing=case_spacing,
            config=config,
            device=device,
            atlas_labels=atlas_labels,
        )
        return lambda: atlas_coordinates(registration).numpy(), registration.quality

    from nnunet_oneshot.evaluation import itk_baselines as itk
    from nnunet_oneshot.registration.affine import register_affine

    flat = case_image.shape[1] == 1 and atlas_image.shape[1] == 1
    if flat:
        case_image, atlas_image, case_spacing, atlas_spacing = (
            case_image[:, 0],
            atlas_image[:, 0],
            case_spacing[1:],
            atlas_spacing[1:],
        )
    fixed, moving = itk.to_image(case_image, case_spacing), itk.to_image(atlas_image, atlas_spacing)
    if method in SYN:
        transform = itk.register_syn(fixed, moving, kind=SYN[method], seed=seed)
    else:
        # As `AtlasRegistrar.align` chooses it.
        multimodal = config.similarity in ("mind", "nmi")
        matrix = register_affine(
            case_image,
            atlas_image,
            fixed_spacing=case_spacing,
            moving_spacing=atlas_spacing,
            metric="mutual_information" if multimodal else "correlation",
        ).matrix
        transform = itk.affine_transform(matrix, fixed_spacing=case_spacing, moving_spacing=atlas_spacing)
        if method == "bspline":
            transform = itk.register_bspline(fixed, moving, transform, mutual_information=multimodal)
        elif method == "demons":
            transform = itk.register_demons(fixed, moving, transform)
        elif method != "affine":
            raise ValueError(f"Method {method!r} is not one of {METHODS}.")

    def places() -> np.ndarray:
        found = itk.read_places(transform, fixed, atlas_spacing)
        return np.concatenate([np.zeros_like(found[:1]), found])[:, None] if flat else found

    return places, {}


def _load_libraries(method: str) -> None:
    """Imports what a method needs, so that neither time nor memory above the start count it."""
    importlib.import_module(
        f"nnunet_oneshot.{'registration.pairs' if method == 'ours' else 'evaluation.itk_baselines'}"
    )
    if method in SYN:
        importlib.import_module("nnunet_oneshot.evaluation.syn").require_ants()


def _serve(method: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answers the requests of a `Worker` until it closes."""

    def answer(content: dict[str, Any]) -> None:
        pickle.dump(content, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()

    settings = pickle.load(requests)
    _load_libraries(method)
    start = memory_mb()[0]
    answer({})
    while True:
        try:
            case, atlas, atlas_labels = pickle.load(requests)
        except EOFError:
            return
        try:
            found = measure(method, case, atlas, atlas_labels=atlas_labels, **settings)
            answer({**found, "start_memory_mb": start})
        except Exception as error:  # whatever a library raises is the method's failure on this pair
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    # What libraries print must not mix with the replies.
    own_output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.argv[1], sys.stdin.buffer, own_output)
