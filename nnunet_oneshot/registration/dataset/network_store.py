"""Trains the registration network once and stores it next to the registrations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor

from nnunet_oneshot.checkpoints import load_data
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, writing
from nnunet_oneshot.locks import waiting_for
from nnunet_oneshot.registration.pair.network import RegistrationNetwork, TrainingPairs, coarse_velocity, fit_network
from nnunet_oneshot.registration.pair.registrar import AtlasRegistrar

# (atlas, fixed) (B, C, *grid) -> velocity (B, D, *velocity grid)
Predictor = Callable[[Tensor, Tensor], Tensor]
# Number of aligned images kept in memory while the network trains.
_CACHED_PAIRS = 256


def registration_topology(prepared: PreparedDataset) -> ConfigurationManager:
    """The configuration whose topology fits the volumes: 3d_fullres for a 2D configuration of 3D volumes."""
    plans = prepared.plans_manager
    is_flat = int(prepared.plans["original_median_shape_after_transp"][0]) == 1
    two_axes = len(prepared.configuration_manager.patch_size) == 2
    if two_axes and not is_flat and "3d_fullres" in plans.available_configurations:
        return plans.get_configuration("3d_fullres")
    return prepared.configuration_manager


def build_network(configuration: ConfigurationManager, num_channels: int) -> RegistrationNetwork:
    """The plan's U-Net as a registration network.

    Args:
        configuration: See `registration_topology`.
        num_channels: Number of image channels.
    """
    dim = len(configuration.patch_size)
    unet = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        num_channels,
        dim,
        allow_init=True,
        deep_supervision=False,
    )
    return RegistrationNetwork(unet, dim)


def stored_network(
    folder: Path,
    prepared: PreparedDataset,
    registrars: dict[str, AtlasRegistrar],
    pairs: Sequence[tuple[str, str]],
    *,
    config: OneShotConfig,
    parameters: dict[str, Any],
    device: torch.device,
    log: Callable[[str], None],
) -> Path:
    """The file of the network trained with these parameters and atlases; where there is none, trains one on ``pairs``.

    Of several processes that ask for the same network at the same time one trains it, and the others wait.

    Args:
        folder: Folder of the networks; it exists.
        prepared: The dataset.
        registrars: Registrar of each atlas.
        pairs: (atlas, case) of all pairs.
        config: Settings.
        parameters: All parameters that the network depends on, as plain JSON types.
        device: Device of the network.
        log: Called with a message.

    Raises:
        OneShotError: The plan's topology does not fit the volumes, or the file cannot be written.
    """
    configuration = registration_topology(prepared)
    first = next(iter(registrars.values()))
    if len(configuration.patch_size) != len(first.grid.shape):
        raise OneShotError(
            "The registration network takes its topology from the plans, which hold no 3D configuration for these "
            '3D volumes: set "method" to "refine" in the "registration" part of the "oneshot" block.'
        )
    digest = hashlib.sha256(json.dumps([parameters, sorted(registrars)], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"network_{digest}.pth"
    with waiting_for(path.with_suffix(".lock"), log, "training of the registration network"):
        if path.is_file():
            log(f"Using the registration network {path}.")
            return path
        torch.manual_seed(config.seed)
        network = build_network(configuration, first.image.shape[1]).to(device)
        _fit(network, prepared, registrars, pairs, config, device)
        with writing(path), atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
    log(f"Trained the registration network on {len(pairs)} pairs and wrote it to {path}.")
    return path


def load_predictor(path: Path, prepared: PreparedDataset, *, config: OneShotConfig, device: torch.device) -> Predictor:
    """A function that predicts the velocity of an atlas and an aligned case, on the velocity grid.

    Args:
        path: See `stored_network`.
        prepared: The dataset.
        config: Settings.
        device: Device of the network.

    Raises:
        OneShotError: The file is damaged.
    """
    network = build_network(registration_topology(prepared), prepared.num_channels).to(device)
    _load(network, path, device)
    network.eval()

    @torch.no_grad()
    def predict(atlas: Tensor, fixed: Tensor) -> Tensor:
        return coarse_velocity(network(atlas, fixed)[0], config.registration)

    return predict


def _load(network: RegistrationNetwork, path: Path, device: torch.device) -> None:
    try:
        network.load_state_dict(load_data(path))
    except Exception as error:
        raise OneShotError(
            f"The registration network {path} cannot be read ({error}): delete it and run again."
        ) from error


def _fit(
    network: RegistrationNetwork,
    prepared: PreparedDataset,
    registrars: dict[str, AtlasRegistrar],
    pairs: Sequence[tuple[str, str]],
    config: OneShotConfig,
    device: torch.device,
) -> None:
    names = list(registrars)

    @lru_cache(maxsize=_CACHED_PAIRS)
    def load_pair(index: int) -> tuple[Tensor, Tensor]:
        atlas, case = pairs[index]
        image = prepared.registration_image(case)
        registrar = registrars[atlas]
        initial = prepared.alignment(case, atlas, image.shape[1:], registrar.atlas_shape)
        aligned = registrar.align(image, prepared.spacing(case), initial=initial)
        return aligned.fixed, aligned.mask

    training = TrainingPairs(
        atlases=[registrars[name].image for name in names],
        spacings=[registrars[name].grid.spacing for name in names],
        atlas_of=[names.index(atlas) for atlas, _ in pairs],
        load=load_pair,
    )
    fit_network(network, training, config.registration, seed=config.seed, device=device, precision=config.precision)
