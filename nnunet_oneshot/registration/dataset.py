"""Registers the atlases of a dataset to its cases, resuming from the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

import nnunet_oneshot
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.preprocessed import check_preprocessed, load_image, load_segmentation
from nnunet_oneshot.devices import host_threads
from nnunet_oneshot.io import atomic_path, writing
from nnunet_oneshot.precision import uses_bfloat16
from nnunet_oneshot.registration.cache import FOLDER, Registration, RegistrationCache
from nnunet_oneshot.registration.figure import registration_figure
from nnunet_oneshot.registration.network_store import load_or_fit_network
from nnunet_oneshot.registration.outline import restore_outline
from nnunet_oneshot.registration.pairs import AtlasRegistrar
from nnunet_oneshot.registration.student import SegmentingGuide, guided_by
from nnunet_oneshot.registration.warp import atlas_coordinates, warp_atlas_to_case

# Voxels of the registration grid optimised together: small grids share the overhead of a step.
_BATCH_VOXELS = 600_000
_LAYOUT = 3
# Settings of the per-pair optimisation: methods that differ in them share a network.
_PAIRWISE = ("method", "refine_iterations", "refine_learning_rate", "search_reach")


def register_dataset(
    *,
    plans: dict,
    dataset_json: dict,
    configuration: str,
    atlases: Sequence[str],
    cases: Sequence[str],
    preprocessed_dataset_folder_base: str,
    config: OneShotConfig,
    device: torch.device,
    fold: int | str | None = None,
    log: Callable[[str], None] = print,
    figures: bool = True,
) -> RegistrationCache:
    """Registers every atlas to every case, skipping pairs that are cached and unchanged.

    Only images are read, and of labels only the atlases', for the pictures, for the quality around them and for a
    guide. Guided registrations have a cache of their own for each guide, so that neither kind takes the other's place.

    Args:
        plans: The plans.
        dataset_json: The dataset's description.
        configuration: Name of the configuration whose preprocessed images are registered.
        atlases: Labelled cases.
        cases: Cases to warp them to; an atlas is not registered to itself.
        preprocessed_dataset_folder_base: The dataset's folder under ``nnUNet_preprocessed``.
        config: Settings.
        device: Where the deformable stage runs.
        fold: Whose model guides, where the settings name a guide.
        log: Called with sentences about what is done.
        figures: Whether to draw a picture of each new pair.

    Returns:
        The cache that holds all the pairs.

    Raises:
        OneShotError: The data are missing or damaged, or the folder cannot be written to.
    """
    dataset = PreparedImages(plans, configuration, preprocessed_dataset_folder_base)
    guide = guided_by(
        config.registration.guide,
        fold=fold,
        plans=plans,
        dataset_json=dataset_json,
        configuration=configuration,
        device=device,
        method=config.registration.method,
    )
    folder = Path(preprocessed_dataset_folder_base) / FOLDER / dataset.configuration.data_identifier
    return _register(
        dataset,
        RegistrationCache(folder if guide is None else guided_folder(folder, guide.digest)),
        networks=folder,
        atlases=atlases,
        cases=cases,
        config=config,
        guide=guide,
        device=device,
        log=log,
        figures=figures,
    )


def register_again(
    first: RegistrationCache,
    guide: SegmentingGuide,
    folder: str | Path,
    *,
    plans: dict,
    configuration: str,
    atlases: Sequence[str],
    cases: Sequence[str],
    preprocessed_dataset_folder_base: str,
    config: OneShotConfig,
    device: torch.device,
    log: Callable[[str], None] = print,
) -> RegistrationCache:
    """Registers pairs a second time, pair by pair, guided by the segmentations of a student.

    The affine maps are those of the first time, and the guide's weight is that of the rounds.

    Args:
        first: Holds all the pairs as they were registered before.
        guide: Whose segmentations of the cases guide.
        folder: Where the new registrations go; those of another guide that lie there are overwritten.
        plans: See `register_dataset`, as the other arguments.

    Returns:
        The cache of the new registrations.
    """
    weight = config.distillation.guide_weight
    settings = dataclasses.replace(config.registration, method="refine", guide_weight=weight)
    return _register(
        PreparedImages(plans, configuration, preprocessed_dataset_folder_base),
        RegistrationCache(folder),
        networks=Path(folder),
        atlases=atlases,
        cases=cases,
        config=dataclasses.replace(config, registration=settings),
        guide=guide,
        first=first,
        device=device,
        log=log,
        figures=True,
    )


def _register(
    dataset: PreparedImages,
    cache: RegistrationCache,
    *,
    networks: Path,
    atlases: Sequence[str],
    cases: Sequence[str],
    config: OneShotConfig,
    guide: SegmentingGuide | None,
    device: torch.device,
    log: Callable[[str], None],
    figures: bool,
    first: RegistrationCache | None = None,
) -> RegistrationCache:
    """Computes what the cache lacks; networks are looked for, and kept, in the folder ``networks``."""
    settings = config.registration
    parameters = {
        "layout": _LAYOUT,
        **json.loads(json.dumps(dataclasses.asdict(settings))),
    }
    # Not among the parameters of what no guide takes part in; and a guide is known by its weights, not by its place.
    del parameters["guide"], parameters["guide_weight"]
    if "network" in settings.method:
        parameters["seed"], parameters["bfloat16"] = config.seed, uses_bfloat16(device, config.precision)
        parameters["topology"] = dataset.registration_configuration().network_arch_init_kwargs
    network_parameters = {name: value for name, value in parameters.items() if name not in _PAIRWISE}
    if guide is not None:
        log(guide.describe())
        parameters = {**parameters, "guide": guide.digest, "guide_weight": settings.guide_weight}
    keys, registrars, missing = {}, {}, []
    for atlas in atlases:
        atlas_digest = None
        for case in cases:
            if case == atlas:
                continue
            atlas_digest = atlas_digest or dataset.digest(atlas)
            keys[atlas, case] = _digest(json.dumps([parameters, atlas_digest, dataset.digest(case)], sort_keys=True))
            if cache.is_damaged(atlas, case):
                log(f"The cached registration of {atlas} to {case} is damaged and will be computed again.")
            if not cache.is_current(atlas, case, keys[atlas, case]):
                missing.append((atlas, case))
    if not missing:
        log(f"Registrations of {', '.join(atlases)} to {len(cases)} cases are cached in {cache.folder}.")
        return cache
    log(
        f"Registering {', '.join(atlases)}: {len(missing)} of {len(keys)} pairs are to be computed "
        f"({settings.method}, on {device}); results go to {cache.folder}."
    )
    # The network is trained on all pairs, whatever is cached, so that it does not depend on the cache's history.
    needed = keys if "network" in settings.method else missing
    for atlas in sorted({atlas for atlas, _ in needed}):
        registrars[atlas] = AtlasRegistrar(
            atlas,
            dataset.image(atlas),
            dataset.spacing(atlas),
            config=settings,
            device=device,
            foreground=dataset.segmentation(atlas) > 0,
        )
    with writing(cache.folder):
        cache.folder.mkdir(parents=True, exist_ok=True)
        networks.mkdir(parents=True, exist_ok=True)
    predict = load_or_fit_network(
        networks, dataset, registrars, list(keys), config=config, parameters=network_parameters, device=device, log=log
    )
    with host_threads(device), tqdm(total=len(missing), desc="Registering") as progress:
        for atlas, batch in _batches(missing, registrars):
            registrar = registrars[atlas]
            images = [dataset.image(case) for case in batch]
            known = [None if first is None else first.load(atlas, case) for case in batch]
            aligned = [
                registrar.align(image, dataset.spacing(case), known=pair)
                for image, case, pair in zip(images, batch, known, strict=True)
            ]
            label_guide = None
            if guide is not None:
                probabilities = [guide.probabilities(dataset.preprocessed(case)) for case in batch]
                maps = guide.atlas_maps(dataset.segmentation(atlas))
                label_guide = registrar.guide(maps, probabilities, aligned, guide.trust)
            shapes = [image.shape[1:] for image in images]
            results = registrar.deform(aligned, batch, shapes, predict=predict, guide=label_guide)
            for registration, image in zip(results, images, strict=True):
                if figures:
                    _draw(cache, registration, dataset, image)
                cache.save(
                    registration, key=keys[atlas, registration.case], parameters=parameters, versions=_versions()
                )
                progress.update()
    _report(cache, missing, log, affine=settings.affine)
    return cache


def guided_folder(folder: Path, digest: str) -> Path:
    """Where the guided counterparts of the registrations in ``folder`` lie, for a guide of this checksum."""
    return folder.with_name(f"{folder.name}_guided") / digest[:12]


class PreparedImages:
    """The preprocessed images of one configuration, with their spacing; labels stay closed but on request."""

    def __init__(self, plans: dict, configuration: str, preprocessed_dataset_folder_base: str) -> None:
        self.plans = PlansManager(plans)
        self.configuration = self.plans.get_configuration(configuration)
        self.folder = str(Path(preprocessed_dataset_folder_base) / self.configuration.data_identifier)
        check_preprocessed(self.folder, configuration)

    def registration_configuration(self):
        """The configuration whose topology fits the volumes: 3d_fullres for a 2D configuration of 3D volumes."""
        names = self.plans.available_configurations
        is_flat = int(self.plans.plans["original_median_shape_after_transp"][0]) == 1
        if len(self.configuration.patch_size) == 2 and not is_flat and "3d_fullres" in names:
            return self.plans.get_configuration("3d_fullres")
        return self.configuration

    def image(self, case: str) -> np.ndarray:
        """(C, X, Y, Z), as it is registered: with the outline that masked normalisation hides."""
        return restore_outline(self.preprocessed(case), self.configuration.use_mask_for_norm)

    def preprocessed(self, case: str) -> np.ndarray:
        """(C, X, Y, Z), as a network of nnU-Net sees it."""
        return np.asarray(load_image(self.folder, case), np.float32)

    def segmentation(self, atlas: str) -> np.ndarray:
        """(1, X, Y, Z); for atlases only."""
        return np.asarray(load_segmentation(self.folder, atlas), np.int16)

    def spacing(self, case: str) -> tuple[float, ...]:
        """3 voxel edges of the preprocessed image, mm. A 2D configuration keeps the original distance of slices."""
        target = [float(s) for s in self.configuration.spacing]
        if len(target) == 3:
            return tuple(target)
        properties = load_pickle(str(Path(self.folder) / f"{case}.pkl"))
        return (float(properties["spacing"][self.plans.transpose_forward[0]]), *target)

    def digest(self, case: str) -> str:
        """Checksum of the preprocessed image."""
        image = self.preprocessed(case)
        return _digest(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())


def _batches(missing: Sequence[tuple[str, str]], registrars: dict[str, AtlasRegistrar]):
    """(atlas, cases) groups of one atlas, as many pairs as fit `_BATCH_VOXELS`."""
    for atlas, registrar in registrars.items():
        cases = [case for name, case in missing if name == atlas]
        size = max(1, _BATCH_VOXELS // int(np.prod(registrar.grid.shape)))
        for start in range(0, len(cases), size):
            yield atlas, cases[start : start + size]


def _draw(cache: RegistrationCache, registration: Registration, dataset: PreparedImages, image: np.ndarray) -> None:
    atlas = dataset.image(registration.atlas)
    seg = dataset.segmentation(registration.atlas)
    warped, warped_seg = warp_atlas_to_case(registration, atlas, seg)
    target = cache.path(registration.atlas, registration.case, ".png")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            registration_figure(
                temporary,
                atlas=atlas[0],
                atlas_seg=seg[0],
                case=image[0],
                warped=warped[0],
                warped_seg=warped_seg[0],
                displacement=atlas_coordinates(registration).numpy(),
            )


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


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _versions() -> dict[str, str]:
    return {"nnunet_oneshot": nnunet_oneshot.__version__, "torch": str(torch.__version__)}
