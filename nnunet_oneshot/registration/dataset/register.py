"""Registers the atlases of a dataset to its cases and resumes from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import nnunet_oneshot
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.orientation import relative_rotation
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import host_threads
from nnunet_oneshot.io import writing
from nnunet_oneshot.precision import uses_bfloat16
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.dataset.network_store import Predictor, load_or_fit_network, registration_topology
from nnunet_oneshot.registration.dataset.pictures import draw_registration
from nnunet_oneshot.registration.pair.registrar import AtlasRegistrar
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.self_training.guide import SegmentingGuide, guided_by

# Voxels of the registration grid in one batch: small grids share the overhead of a step.
_BATCH_VOXELS = 600_000
_LAYOUT = 3
# Settings of the per-pair optimisation; runs that differ only in these share a network.
_PAIRWISE = ("method", "refine_iterations", "refine_learning_rate", "search_reach")


@dataclass(frozen=True)
class DatasetRegistrar:
    """Registers the atlases of a dataset to any of its cases, skipping pairs that are cached and unchanged.

    Reads images, and labels of the atlases only: for the pictures, for the quality around the labels and for a guide.

    Attributes:
        prepared: The dataset.
        config: Settings.
        atlases: Labelled cases.
        device: Where the deformable stage runs.
        log: Called with progress messages.
    """

    prepared: PreparedDataset
    config: OneShotConfig
    atlases: Sequence[str]
    device: torch.device
    log: Callable[[str], None] = print

    def register(
        self, cases: Sequence[str], *, fold: int | str | None = None, figures: bool = True
    ) -> RegistrationCache:
        """Registers the atlases by images and, if the settings name one, by a guide.

        Each guide has its own cache, so that guided and unguided registrations do not overwrite each other.

        Args:
            cases: Cases to warp the atlases to; an atlas is not registered to itself.
            fold: Fold of the guide's model, if the settings name a guide.
            figures: Whether to draw a picture of each new pair.

        Returns:
            The cache with all pairs.

        Raises:
            OneShotError: The data are missing or damaged, or the folder cannot be written to.
        """
        settings = self.config.registration
        guide = guided_by(settings, self.prepared, fold=fold, device=self.device)
        folder = self.prepared.base / FOLDER / self.prepared.folder.name
        cache = RegistrationCache(folder if guide is None else guided_folder(folder, guide.digest))
        return _Pass(self, self.config, cache, networks=folder, guide=guide, figures=figures).run(cases)

    def register_again(
        self, cases: Sequence[str], *, first: RegistrationCache, guide: SegmentingGuide, folder: str | Path
    ) -> RegistrationCache:
        """Registers pairs a second time, pair by pair, guided by the segmentations of a student.

        Reuses the first affine maps. The guide's weight is that of the rounds, ``distillation.guide_weight``.

        Args:
            cases: Cases to warp the atlases to.
            first: The earlier registrations of all pairs.
            guide: Segments the cases with the student.
            folder: Folder for the new registrations; those of another guide in it are overwritten.

        Returns:
            The cache of the new registrations.
        """
        weight = self.config.distillation.guide_weight
        settings = dataclasses.replace(self.config.registration, method="refine", guide_weight=weight)
        config = dataclasses.replace(self.config, registration=settings)
        cache = RegistrationCache(folder)
        return _Pass(self, config, cache, networks=cache.folder, guide=guide, first=first).run(cases)


def guided_folder(folder: Path, digest: str) -> Path:
    """Folder of the guided counterparts of the registrations in ``folder``, for a guide with this checksum."""
    return folder.with_name(f"{folder.name}_guided") / digest[:12]


@dataclass(frozen=True)
class _Pass:
    """One pass over the pairs of a dataset: computes those missing from a cache.

    Attributes:
        registrar: Dataset, atlases, device and log.
        config: Settings of this pass.
        cache: Stores the pairs.
        networks: Folder of the registration networks.
        guide: Guides each pair, or None.
        first: Earlier registrations whose affine maps are reused, or None.
        figures: Whether to draw a picture of each new pair.
    """

    registrar: DatasetRegistrar
    config: OneShotConfig
    cache: RegistrationCache
    networks: Path
    guide: SegmentingGuide | None = None
    first: RegistrationCache | None = None
    figures: bool = True

    def run(self, cases: Sequence[str]) -> RegistrationCache:
        """Registers every atlas to the cases and returns the cache."""
        log, atlases, settings = self.registrar.log, self.registrar.atlases, self.config.registration
        if self.guide is not None:
            log(self.guide.describe())
        keys = self._keys(cases)
        missing = self._missing(keys)
        if not missing:
            log(f"Registrations of {', '.join(atlases)} to {len(cases)} cases are cached in {self.cache.folder}.")
            return self.cache
        log(
            f"Registering {', '.join(atlases)}: {len(missing)} of {len(keys)} pairs are to be computed "
            f"({settings.method}, on {self.registrar.device}); results go to {self.cache.folder}."
        )
        with writing(self.cache.folder):
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            self.networks.mkdir(parents=True, exist_ok=True)
        # Trains on all pairs, cached or not, so that the network does not depend on the cache's history.
        needed = keys if self._uses_network else missing
        registrars = {atlas: self._atlas_registrar(atlas) for atlas in sorted({atlas for atlas, _ in needed})}
        predict = None
        if self._uses_network:
            predict = load_or_fit_network(
                self.networks,
                self.registrar.prepared,
                registrars,
                list(keys),
                config=self.config,
                parameters=self._network_parameters,
                device=self.registrar.device,
                log=log,
            )
        with host_threads(self.registrar.device), tqdm(total=len(missing), desc="Registering") as progress:
            for atlas, batch in _batches(missing, registrars):
                for registration, image in self._register(registrars[atlas], batch, predict):
                    self._keep(registration, image, keys[atlas, registration.case])
                    progress.update()
        _report(self.cache, missing, log, affine=settings.affine)
        return self.cache

    @property
    def _uses_network(self) -> bool:
        return "network" in self.config.registration.method

    @cached_property
    def _image_parameters(self) -> dict[str, Any]:
        """All parameters that an unguided registration depends on, apart from the images."""
        settings = self.config.registration
        parameters = {"layout": _LAYOUT, **json.loads(json.dumps(dataclasses.asdict(settings)))}
        # The checksum of a guide's weights identifies it, not its folder.
        del parameters["guide"], parameters["guide_weight"]
        if self._uses_network:
            parameters["seed"] = self.config.seed
            parameters["bfloat16"] = uses_bfloat16(self.registrar.device, self.config.precision)
            parameters["topology"] = registration_topology(self.registrar.prepared).network_arch_init_kwargs
        return parameters

    @cached_property
    def _parameters(self) -> dict[str, Any]:
        """All parameters that a registration depends on, apart from the images."""
        if self.guide is None:
            return self._image_parameters
        weight = self.config.registration.guide_weight
        return {**self._image_parameters, "guide": self.guide.digest, "guide_weight": weight}

    @property
    def _network_parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self._image_parameters.items() if name not in _PAIRWISE}

    def _keys(self, cases: Sequence[str]) -> dict[tuple[str, str], str]:
        """(atlas, case) -> checksum of all inputs and parameters of the registration."""
        digest = self.registrar.prepared.digest
        keys = {}
        for atlas in self.registrar.atlases:
            others = [case for case in cases if case != atlas]
            atlas_digest = digest(atlas) if others else ""
            for case in others:
                parts = [self._parameters, atlas_digest, digest(case), *self._turned(atlas, case)]
                content = json.dumps(parts, sort_keys=True)
                keys[atlas, case] = hashlib.sha256(content.encode()).hexdigest()
        return keys

    def _turned(self, atlas: str, case: str) -> list[Any]:
        """The headers' part of a pair's checksum: empty if the axes of both images point the same way."""
        rotation = relative_rotation(*(self.registrar.prepared.axes(name) for name in (case, atlas)))
        return [] if rotation is None else [rotation.round(3).tolist()]

    def _missing(self, keys: dict[tuple[str, str], str]) -> list[tuple[str, str]]:
        """The pairs missing from the cache."""
        for atlas, case in keys:
            if self.cache.is_damaged(atlas, case):
                self.registrar.log(
                    f"The cached registration of {atlas} to {case} is damaged and will be computed again."
                )
        return [pair for pair, key in keys.items() if not self.cache.is_current(*pair, key)]

    def _atlas_registrar(self, atlas: str) -> AtlasRegistrar:
        prepared = self.registrar.prepared
        return AtlasRegistrar(
            atlas,
            prepared.registration_image(atlas),
            prepared.spacing(atlas),
            config=self.config.registration,
            device=self.registrar.device,
            foreground=prepared.segmentation(atlas) > 0,
        )

    def _register(
        self, registrar: AtlasRegistrar, cases: Sequence[str], predict: Predictor | None
    ) -> Iterator[tuple[Registration, np.ndarray]]:
        """The registrations of one atlas to a batch of cases, each with the case's image (C, U, V, W)."""
        prepared = self.registrar.prepared
        images = [prepared.registration_image(case) for case in cases]
        known = [None if self.first is None else self.first.load(registrar.name, case) for case in cases]
        aligned = [
            registrar.align(
                image,
                prepared.spacing(case),
                initial=prepared.alignment(case, registrar.name, image.shape[1:], registrar.atlas_shape),
                known=pair,
            )
            for image, case, pair in zip(images, cases, known, strict=True)
        ]
        label_guide = None
        if self.guide is not None:
            probabilities = [self.guide.probabilities(prepared.image(case)) for case in cases]
            maps = self.guide.atlas_maps(prepared.segmentation(registrar.name))
            label_guide = registrar.guide(maps, probabilities, aligned, self.guide.trust)
        shapes = [image.shape[1:] for image in images]
        results = registrar.deform(aligned, cases, shapes, predict=predict, guide=label_guide)
        yield from zip(results, images, strict=True)

    def _keep(self, registration: Registration, image: np.ndarray, key: str) -> None:
        """Draws and saves a pair."""
        if self.figures:
            draw_registration(
                self.cache.path(registration.atlas, registration.case, ".png"),
                registration,
                self.registrar.prepared,
                image,
            )
        versions = {"nnunet_oneshot": nnunet_oneshot.__version__, "torch": str(torch.__version__)}
        self.cache.save(registration, key=key, parameters=self._parameters, versions=versions)


def _batches(
    missing: Sequence[tuple[str, str]], registrars: dict[str, AtlasRegistrar]
) -> Iterator[tuple[str, list[str]]]:
    """(atlas, cases) groups of one atlas, as many pairs as fit `_BATCH_VOXELS`."""
    for atlas, registrar in registrars.items():
        cases = [case for name, case in missing if name == atlas]
        size = max(1, _BATCH_VOXELS // int(np.prod(registrar.grid.shape)))
        for start in range(0, len(cases), size):
            yield atlas, cases[start : start + size]


def _report(
    cache: RegistrationCache, pairs: Sequence[tuple[str, str]], log: Callable[[str], None], *, affine: bool
) -> None:
    qualities = [cache.quality(*pair) for pair in pairs]
    before, after, folds = (
        np.array([q[name] for q in qualities]) for name in ("similarity_before", "similarity_after", "folding")
    )
    worst = pairs[int(after.argmin())]
    log(
        f"Registered {len(pairs)} pairs: squared local correlation {before.mean():.3f} -> {after.mean():.3f} "
        f"(lowest {after.min():.3f}, {worst[0]} to {worst[1]}), folding {100 * folds.mean():.4f} % of voxels "
        f"(most {100 * folds.max():.4f} %)."
    )
    unmoved = [pair for pair, quality in zip(pairs, qualities, strict=True) if quality["affine_start"] == "identity"]
    if unmoved and affine:
        shown = ", ".join(case for _, case in unmoved[:5]) + (", ..." if len(unmoved) > 5 else "")
        log(
            f"Warning: the affine stage found nothing better than the alignment it began with for {len(unmoved)} of "
            f"{len(pairs)} pairs ({shown}); look at their pictures."
        )
