"""Trains the registration network once and keeps it beside the registrations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import atomic_path, writing
from nnunet_oneshot.registration.network import RegistrationNetwork, coarse_velocity, fit_network
from nnunet_oneshot.registration.pairs import AtlasRegistrar

if TYPE_CHECKING:
    from nnunet_oneshot.registration.dataset import PreparedImages

# Aligned images kept in memory while the network trains.
_CACHED_PAIRS = 256


def load_or_fit_network(
    folder: Path,
    dataset: PreparedImages,
    registrars: dict[str, AtlasRegistrar],
    pairs: Sequence[tuple[str, str]],
    *,
    config: OneShotConfig,
    parameters: dict,
    device: torch.device,
    log: Callable[[str], None],
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A function (atlas, fixed) -> velocity on the velocity grid, or None where the method uses no network.

    A network trained with the same parameters and atlases is read from ``folder``; otherwise one is trained on
    ``pairs`` and written there.

    Raises:
        OneShotError: The plan's topology does not fit the volumes.
    """
    settings = config.registration
    if "network" not in settings.method:
        return None
    configuration = dataset.registration_configuration()
    first = next(iter(registrars.values()))
    if len(configuration.patch_size) != len(first.grid.shape):
        raise OneShotError(
            "The registration network takes its topology from the plans, which hold no 3D configuration for these "
            '3D volumes: set "method" to "refine" in the "registration" part of the "oneshot" block.'
        )
    torch.manual_seed(config.seed)
    network = RegistrationNetwork(configuration, first.image.shape[1]).to(device)
    digest = hashlib.sha256(json.dumps([parameters, sorted(registrars)], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"network_{digest}.pth"
    if path.is_file():
        try:
            network.load_state_dict(torch.load(path, map_location=device, weights_only=True))
            log(f"Using the registration network {path}.")
        except Exception as error:
            raise OneShotError(
                f"The registration network {path} cannot be read ({error}): delete it and run again."
            ) from error
    else:
        _fit(network, dataset, registrars, pairs, config, device)
        with writing(path), atomic_path(path) as temporary:
            torch.save(network.state_dict(), temporary)
        log(f"Trained the registration network on {len(pairs)} pairs and wrote it to {path}.")
    network.eval()

    @torch.no_grad()
    def predict(atlas: Tensor, fixed: Tensor) -> Tensor:
        return coarse_velocity(network(atlas, fixed)[0], settings)

    return predict


def _fit(
    network: RegistrationNetwork,
    dataset: PreparedImages,
    registrars: dict[str, AtlasRegistrar],
    pairs: Sequence[tuple[str, str]],
    config: OneShotConfig,
    device: torch.device,
) -> None:
    names = list(registrars)

    @lru_cache(maxsize=_CACHED_PAIRS)
    def load_pair(index: int) -> tuple[Tensor, Tensor]:
        atlas, case = pairs[index]
        aligned = registrars[atlas].align(dataset.image(case), dataset.spacing(case))
        return aligned.fixed, aligned.mask

    fit_network(
        network,
        [registrars[name].image for name in names],
        load_pair,
        [names.index(atlas) for atlas, _ in pairs],
        spacings=[registrars[name].grid.spacing for name in names],
        config=config.registration,
        seed=config.seed,
        device=device,
        precision=config.precision,
    )
