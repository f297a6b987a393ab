"""Registration methods that are compared, each one registered entry: our own and peers.

A method registers an atlas to a case and gives the places at which the case's voxels are read in the atlas. One
function warps the labels of all methods, so that they are judged alike. A peer added here can be given to
``nnunet_oneshot propagate --method``, ``nnunet_oneshot benchmark --methods`` and
``python -m nnunet_oneshot.benchmarks.registration --methods``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.evaluation import itk_methods as itk
from nnunet_oneshot.evaluation import peer_methods as peers
from nnunet_oneshot.registry import Registry

# An image (C, X, Y, Z) and its 3 voxel edges, mm, array axis order.
Volume = tuple[np.ndarray, Sequence[float]]


_OURS = ("nnunet_oneshot.registration.pair.registrar",)


@dataclass(frozen=True)
class MethodOptions:
    """What every method is given beside the two volumes.

    Attributes:
        config: Settings of our registration; its affine stage is also the start of the methods that say so.
        seed: Of random sampling.
        threads: Of every library.
        device: Where our deformable stage and ConvexAdam run.
    """

    config: RegistrationConfig
    seed: int = 0
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class FoundPlaces:
    """What a method found.

    Attributes:
        places: Gives (3, U, V, W) float32, where every voxel of the case is read in the atlas, voxel coordinates.
        quality: Figures of our own registration; empty for the others.
    """

    places: Callable[[], np.ndarray]
    quality: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RegistrationMethod:
    """An entry of `REGISTRATION_METHODS`.

    Attributes:
        register: Registers (case, atlas, atlas labels (1, X, Y, Z) or None, options).
        libraries: Modules it imports when it runs; they are loaded before its time and memory are measured.
        own: Whether it is a stage of our own registration, which label propagation reaches by other names.
        compared: Whether ``nnunet_oneshot benchmark`` runs it unasked.
        require: Raises an `OneShotError` where something that it needs is not installed.
    """

    register: Callable[[Volume, Volume, np.ndarray | None, MethodOptions], FoundPlaces]
    libraries: tuple[str, ...] = ()
    own: bool = False
    compared: bool = False
    require: Callable[[], Any] = lambda: None

    @property
    def meaning(self) -> str:
        """What the method does, from the docstring of its function."""
        return inspect.getdoc(self.register) or ""


REGISTRATION_METHODS: Registry[RegistrationMethod] = Registry("registration method")


def method(name: str, **attributes: Any) -> Callable[[Callable], Callable]:
    """A decorator that registers a function as a method; ``attributes`` are those of `RegistrationMethod`."""
    return REGISTRATION_METHODS.register(name, RegistrationMethod, **attributes)


@method("affine", own=True, libraries=_OURS)
def affine(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """The affine stage of our registration alone. It is also the start of `ours` and of the peers that say so."""
    return _by_itk(case, atlas, lambda pair: _affine_transform(pair, options))


@method("ours", own=True, libraries=_OURS)
def ours(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """Our registration: affine, then velocity fields optimised for each pair, with the settings of the plans."""
    from nnunet_oneshot.registration.pair.registrar import register_arrays
    from nnunet_oneshot.registration.pair.warp import atlas_coordinates

    registration = register_arrays(
        atlas[0],
        case[0],
        atlas_spacing=atlas[1],
        case_spacing=case[1],
        config=options.config,
        device=options.device,
        atlas_labels=labels,
    )
    return FoundPlaces(lambda: atlas_coordinates(registration).numpy(), registration.quality)


@method("syn", libraries=("ants",), compared=True, require=itk.require_ants)
def syn(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """ANTs' ``SyN`` with the defaults of antspyx: its own affine stage, then the deformation (mutual information)."""
    return _by_ants("SyN", case, atlas, options)


@method("syncc", libraries=("ants",), require=itk.require_ants)
def syncc(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """ANTs' ``SyNCC`` with the defaults of antspyx: as `syn`, by local correlation."""
    return _by_ants("SyNCC", case, atlas, options)


@method("bspline", libraries=_OURS)
def bspline(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """SimpleITK's cubic B-splines on cells of about 8 voxels, three levels, L-BFGS, after our affine stage."""
    from nnunet_oneshot.registration.pair.similarities import SIMILARITIES

    by_information = SIMILARITIES[options.config.similarity].affine_metric == "mutual_information"
    return _by_itk(
        case,
        atlas,
        lambda pair: itk.register_bspline(
            pair.fixed, pair.moving, _affine_transform(pair, options), mutual_information=by_information
        ),
    )


@method("demons", libraries=_OURS)
def demons(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """SimpleITK's fast symmetric forces demons after our affine stage and histogram matching, three levels."""
    return _by_itk(
        case, atlas, lambda pair: itk.register_demons(pair.fixed, pair.moving, _affine_transform(pair, options))
    )


@method("convexadam", libraries=("convexAdam.convex_adam_MIND",), require=peers.require_convexadam)
def convexadam(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """ConvexAdam on MIND features with its defaults, after our affine stage, as it has none of its own; no slices."""
    return _by_itk(
        case,
        atlas,
        lambda pair: peers.register_convexadam(
            pair.fixed, pair.moving, _affine_transform(pair, options), device=options.device
        ),
    )


@method("greedy", libraries=("picsl_greedy",), require=peers.require_greedy)
def greedy(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """Greedy with the settings of its quick start (weighted local correlation) after our affine stage."""
    return _by_greedy(case, atlas, options, own_affine=False)


@method("greedy_own", libraries=("picsl_greedy",), require=peers.require_greedy)
def greedy_own(case: Volume, atlas: Volume, labels: np.ndarray | None, options: MethodOptions) -> FoundPlaces:
    """As `greedy`, after Greedy's own affine stage."""
    return _by_greedy(case, atlas, options, own_affine=True)


@dataclass(frozen=True)
class _ItkPair:
    """A case and an atlas for ITK, in two dimensions where both have one slice.

    Attributes:
        case: Image (C, *shape) and D voxel edges, mm.
        atlas: The same of the atlas.
        fixed: The mean of the case's channels.
        moving: The mean of the atlas's channels.
    """

    case: Volume
    atlas: Volume
    fixed: sitk.Image
    moving: sitk.Image


def _by_itk(case: Volume, atlas: Volume, find: Callable[[_ItkPair], sitk.Transform]) -> FoundPlaces:
    """The places of a SimpleITK transform from mm in the case to mm in the atlas."""
    flat = case[0].shape[1] == 1 and atlas[0].shape[1] == 1
    if flat:
        case, atlas = ((image[:, 0], edges[1:]) for image, edges in (case, atlas))
    pair = _ItkPair(case, atlas, itk.to_image(*case), itk.to_image(*atlas))
    transform = find(pair)

    def places() -> np.ndarray:
        found = itk.read_places(transform, pair.fixed, atlas[1])
        return np.concatenate([np.zeros_like(found[:1]), found])[:, None] if flat else found

    return FoundPlaces(places)


def _by_ants(kind: str, case: Volume, atlas: Volume, options: MethodOptions) -> FoundPlaces:
    return _by_itk(
        case,
        atlas,
        lambda pair: itk.register_syn(
            pair.fixed, pair.moving, kind=kind, seed=options.seed, deterministic=options.threads == 1
        ),
    )


def _by_greedy(case: Volume, atlas: Volume, options: MethodOptions, *, own_affine: bool) -> FoundPlaces:
    return _by_itk(
        case,
        atlas,
        lambda pair: peers.register_greedy(
            pair.fixed,
            pair.moving,
            None if own_affine else _affine_transform(pair, options),
            seed=options.seed,
            threads=options.threads,
        ),
    )


def _affine_transform(pair: _ItkPair, options: MethodOptions) -> sitk.AffineTransform:
    import torch

    from nnunet_oneshot.registration.pair.registrar import AtlasRegistrar

    config = dataclasses.replace(options.config, affine=True)
    registrar = AtlasRegistrar(
        "moving", pair.atlas[0], pair.atlas[1], config=config, device=torch.device(options.device)
    )
    matrix = registrar.align(pair.case[0], pair.case[1]).affine
    return itk.affine_transform(matrix, fixed_spacing=pair.case[1], moving_spacing=pair.atlas[1])
