"""Registers the atlases of a dataset to its cases and resumes from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.orientation import relative_rotation
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import host_threads
from nnunet_oneshot.errors import listed
from nnunet_oneshot.io import writing
from nnunet_oneshot.locks import waiting_for
from nnunet_oneshot.precision import uses_bfloat16
from nnunet_oneshot.progress import Progress
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.dataset.cluster import cluster_workers
from nnunet_oneshot.registration.dataset.network_store import registration_topology, stored_network
from nnunet_oneshot.registration.dataset.pairs import Pair, PairWork
from nnunet_oneshot.registration.dataset.parts import Part
from nnunet_oneshot.registration.dataset.ratings import rejected_pairs
from nnunet_oneshot.registration.dataset.sources import axes_in, read_sources
from nnunet_oneshot.registration.dataset.summary import write_summary
from nnunet_oneshot.registration.dataset.workers import run_beside, run_by, run_here, run_in_processes
from nnunet_oneshot.registration.pair.quality import is_ambiguous
from nnunet_oneshot.self_training.guide import SegmentingGuide, guided_by

# Voxels of the registration grid in one batch: small grids share the overhead of a step.
_BATCH_VOXELS = 600_000
_LAYOUT = 4
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
        num_processes: Worker processes. On a CPU each registers pairs of its own, with one thread; beside another
            device they do all but the deformable stage. With 1 everything runs in this process.
        scheduler: A dask cluster that registers instead; see `nnunet_oneshot.registration.dataset.cluster`.
    """

    prepared: PreparedDataset
    config: OneShotConfig
    atlases: Sequence[str]
    device: torch.device
    log: Callable[[str], None] = print
    num_processes: int = 1
    scheduler: str | None = None

    def register(
        self, cases: Sequence[str], *, fold: int | str | None = None, figures: bool = True, part: Part | None = None
    ) -> RegistrationCache:
        """Registers the atlases by images and, if the settings name one, by a guide.

        Each guide has its own cache, so that guided and unguided registrations do not overwrite each other.

        Args:
            cases: Cases to warp the atlases to; an atlas is not registered to itself.
            fold: Fold of the guide's model, if the settings name a guide.
            figures: Whether to draw a picture of each new pair.
            part: Registers only the cases of this part; the tables of all pairs are written where none is missing.
                None registers all and writes no table.

        Returns:
            The cache with all pairs, or those of the part.

        Raises:
            OneShotError: The data are missing or damaged, the folder cannot be written to, or a pair failed, which is
                named.
        """
        return self._pass(fold, figures).run(cases, part)

    def outstanding(self, cases: Sequence[str], *, fold: int | str | None = None) -> tuple[int, int]:
        """How many pairs `register` would compute, and of how many. Arguments and errors are its own."""
        return self._pass(fold).outstanding(cases)

    def _pass(self, fold: int | str | None, figures: bool = True) -> _Pass:
        settings = self.config.registration
        guide = guided_by(settings, self.prepared, fold=fold, device=self.device)
        networks = self.prepared.kept / FOLDER / self.prepared.folder.name
        return _Pass(self, self.config, cache_of(self.prepared, guide), networks=networks, guide=guide, figures=figures)

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


def cache_of(prepared: PreparedDataset, guide: SegmentingGuide | None) -> RegistrationCache:
    """The registrations of a dataset, by images alone or with a guide."""
    folder = prepared.kept / FOLDER / prepared.folder.name
    return RegistrationCache(folder if guide is None else guided_folder(folder, guide.digest))


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

    def run(self, cases: Sequence[str], part: Part | None = None) -> RegistrationCache:
        """Registers every atlas to the cases, or to those of a part, and returns the cache."""
        log, atlases = self.registrar.log, self.registrar.atlases
        if self.guide is not None:
            log(self.guide.describe())
        own = cases if part is None else part.of(cases, self.registrar.prepared.identifiers)
        pairs = self._pairs(own)
        missing = self._missing(pairs)
        if missing:
            log(
                f"Registering {', '.join(atlases)}: {len(missing)} of {len(pairs)} pairs are to be computed "
                f"({self.config.registration.method}, on {self.registrar.device}); results go to {self.cache.folder}."
            )
            self._compute(missing, cases)
            _report(self.cache, missing, log, affine=self.config.registration.affine)
        else:
            log(f"Registrations of {', '.join(atlases)} to {len(own)} cases are cached in {self.cache.folder}.")
        if part is not None:
            self._summarise(cases, part)
        return self.cache

    def outstanding(self, cases: Sequence[str]) -> tuple[int, int]:
        """How many pairs the cache lacks, and of how many."""
        pairs = self._pairs(cases)
        return len(self._missing(pairs)), len(pairs)

    def _compute(self, missing: Sequence[Pair], cases: Sequence[str]) -> None:
        """Registers pairs; ``cases`` are all that are registered, also by others, to train a network with."""
        device, workers = self.registrar.device, self.registrar.num_processes
        with writing(self.cache.folder):
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            self.networks.mkdir(parents=True, exist_ok=True)
        here = PairWork(
            self.registrar.prepared,
            self.config,
            device if self.registrar.scheduler is None else torch.device("cpu"),
            self.cache,
            self._parameters,
            guide=self.guide,
            first=self.first,
            figures=self.figures,
        )
        if self._uses_network:
            here = dataclasses.replace(here, network=self._network(here, cases))
        with host_threads(here.device), Progress(len(missing), "Registering") as progress:
            if self.registrar.scheduler is not None:
                batches = list(_batches(missing, here, at_most=1))
                with cluster_workers(self.registrar.scheduler, self.registrar.log) as executor:
                    work = dataclasses.replace(here, device=device)
                    run_by(executor, work, batches, progress.update, at_once=len(batches))
            elif workers > 1 and len(missing) > 1 and device.type != "cpu":
                run_beside(here, list(_batches(missing, here)), progress.update, num_processes=workers)
            # A student in training is not sent to other processes.
            elif workers > 1 and len(missing) > 1 and self.first is None:
                batches = list(_batches(missing, here, at_most=ceil(len(missing) / workers)))
                run_in_processes(here, batches, progress.update, num_processes=workers)
            else:
                run_here(here, list(_batches(missing, here)), progress.update)

    def _network(self, work: PairWork, cases: Sequence[str]) -> Path:
        """The file of the registration network.

        It is trained on all pairs, cached or not, so that it does not depend on the cache's history.
        """
        atlases = sorted({atlas for atlas in self.registrar.atlases if any(case != atlas for case in cases)})
        return stored_network(
            self.networks,
            self.registrar.prepared,
            {atlas: work.registrar(atlas) for atlas in atlases},
            [(atlas, case) for atlas in self.registrar.atlases for case in cases if case != atlas],
            config=self.config,
            parameters=self._network_parameters,
            device=work.device,
            log=self.registrar.log,
        )

    def _summarise(self, cases: Sequence[str], part: Part) -> None:
        """Writes the table of each atlas, unless other parts have pairs left to register."""
        names = {a: [case for case in cases if case != a] for a in self.registrar.atlases}
        with writing(self.cache.folder):
            self.cache.folder.mkdir(parents=True, exist_ok=True)
        with waiting_for(self.cache.folder / "quality.lock", self.registrar.log, "writing of the tables"):
            missing = sum(not self.cache.path(a, c, ".json").is_file() for a, others in names.items() for c in others)
            if not missing and part.count > 1:
                missing = len(self._missing(self._pairs(cases)))
            if missing:
                self.registrar.log(
                    f"Part {part.number} of {part.count} is done. {missing} pairs of other parts are missing: the part "
                    f"that ends last writes the tables of all."
                )
                return
            pairs = [(atlas, case) for atlas, others in names.items() for case in others]
            rejected = rejected_pairs(self.registrar.prepared.kept, self.cache, pairs, self.registrar.log)
            for atlas, others in names.items():
                if others:
                    path = write_summary(self.cache, atlas, others, rejected=rejected)
                    self.registrar.log(f"The quality of all pairs is in {path}.")

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

    def _pairs(self, cases: Sequence[str]) -> list[Pair]:
        """Each atlas with each other case, and the checksum of all inputs and parameters of its registration."""
        atlases = self.registrar.atlases
        named = [(atlas, case) for atlas in atlases for case in cases if case != atlas]
        sources = read_sources(
            self.registrar.prepared,
            sorted({name for pair in named for name in pair}),
            atlases=atlases,
            caches=[self.cache, *([] if self.first is None else [self.first])],
            num_threads=self.registrar.num_processes,
        )
        pairs = []
        for atlas, case in named:
            turned = relative_rotation(axes_in(sources[case]), axes_in(sources[atlas]))
            rotation = [] if turned is None else [turned.round(3).tolist()]
            parts = [self._parameters, sources[atlas]["digest"], sources[case]["digest"], *rotation]
            key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
            pairs.append(Pair(atlas, case, key, sources[case], (sources[atlas]["shape"], sources[case]["shape"])))
        return pairs

    def _missing(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs that the cache lacks."""
        missing = []
        for pair in pairs:
            state = self.cache.state(pair.atlas, pair.case, pair.key, pair.shapes)
            if state == "damaged":
                self.registrar.log(
                    f"The cached registration of {pair.atlas} to {pair.case} is damaged and will be computed again."
                )
            if state != "current":
                missing.append(pair)
            elif (self.cache.record(pair.atlas, pair.case) or {}).get("sources") != pair.source:
                self.cache.note_sources(pair.atlas, pair.case, pair.source)
        return missing


def _batches(missing: Sequence[Pair], work: PairWork, *, at_most: int | None = None) -> Iterator[list[Pair]]:
    """Pairs of one atlas each, as many as fit `_BATCH_VOXELS`, and ``at_most`` so many."""
    for atlas in dict.fromkeys(pair.atlas for pair in missing):
        pairs = [pair for pair in missing if pair.atlas == atlas]
        size = max(1, _BATCH_VOXELS // prod(work.registrar(atlas).grid.shape))
        size = min(size, at_most or size)
        for start in range(0, len(pairs), size):
            yield pairs[start : start + size]


def _report(cache: RegistrationCache, pairs: Sequence[Pair], log: Callable[[str], None], *, affine: bool) -> None:
    qualities = [cache.quality(pair.atlas, pair.case) for pair in pairs]
    before, after, folds = (
        np.array([q[name] for q in qualities]) for name in ("similarity_before", "similarity_after", "folding")
    )
    worst = pairs[int(after.argmin())]
    log(
        f"Registered {len(pairs)} pairs: squared local correlation {before.mean():.3f} -> {after.mean():.3f} "
        f"(lowest {after.min():.3f}, {worst.atlas} to {worst.case}), folding {100 * folds.mean():.4f} % of voxels "
        f"(most {100 * folds.max():.4f} %)."
    )
    unmoved = [pair for pair, quality in zip(pairs, qualities, strict=True) if quality["affine_start"] == "identity"]
    if unmoved and affine:
        log(
            f"Warning: the affine stage found nothing better than the alignment it began with for {len(unmoved)} of "
            f"{len(pairs)} pairs ({listed(pair.case for pair in unmoved)}); look at their pictures."
        )
    ambiguous = [pair.case for pair, quality in zip(pairs, qualities, strict=True) if is_ambiguous(quality)]
    if ambiguous:
        log(
            f"Warning: {len(ambiguous)} of {len(pairs)} pairs are ambiguous ({listed(ambiguous)}): another position, "
            f"for example one vertebra further, makes the images almost as alike. They are drawn less; look at their "
            f"pictures."
        )
