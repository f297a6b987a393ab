"""Implements ``nnunet_oneshot register``, which registers a dataset before training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from nnunet_oneshot.config import OneShotConfig, with_guide
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.parallel import default_processes
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import named_device, usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.locks import waiting_for
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.parts import Part
from nnunet_oneshot.registration.dataset.register import DatasetRegistrar


def register(
    *,
    dataset: str,
    configuration: str,
    plans_name: str,
    folds: Sequence[str] = ("0",),
    device: str = "cpu",
    figures: bool = True,
    guide: str | Path | None = None,
    num_processes: int | None = None,
    num_parts: int = 1,
    part_id: int = 0,
    scheduler: str | None = None,
) -> list[RegistrationCache]:
    """Registers the atlases of each fold to its training and validation cases, from images alone.

    Args:
        dataset: Name or number of the dataset.
        configuration: For example ``3d_fullres``.
        plans_name: For example ``nnUNetOneShotPlans``.
        folds: Folds whose atlases are registered; numbers or ``"all"``.
        device: Where the deformable stage runs.
        figures: Whether to draw a picture of each pair.
        guide: Folder of a trained model whose segmentations guide the registrations; None uses the plans' setting.
        num_processes: Worker processes; None for the default, see `nnunet_oneshot.data.parallel.default_processes`.
        num_parts: Into how many parts the cases are divided.
        part_id: Which part is registered, from 0.
        scheduler: A dask cluster that registers; see `nnunet_oneshot.registration.dataset.cluster`.

    Returns:
        The cache of each fold.

    Raises:
        OneShotError: The dataset, plans, fold, device, guide, part or cluster is missing or invalid, or a pair failed.
    """
    part = Part(part_id, num_parts)
    if num_processes is not None and num_processes < 1:
        raise OneShotError(f"-np is {num_processes}: give a number of processes, 1 or more.")
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    config = with_guide(OneShotConfig.from_plans(prepared.plans), guide)
    # Those of a cluster's workers may be others than this machine's.
    place = usable_device(device) if scheduler is None else named_device(device)
    caches = []
    for name in folds:
        fold = prepared.fold(name)
        with _alone(prepared, part):
            choice = resolve_atlases(prepared.base, config, fold, prepared.image_in_common_order, kept=prepared.kept)
        print(f"Fold {name}: atlas {', '.join(choice.atlases)} ({choice.how})")
        registrar = DatasetRegistrar(
            prepared,
            config,
            choice.atlases,
            place,
            num_processes=num_processes or default_processes(),
            scheduler=scheduler,
        )
        cases = sorted({*fold.train, *fold.validation})
        caches.append(registrar.register(cases, fold=fold.number, figures=figures, part=part))
    return caches


def _alone(prepared: PreparedDataset, part: Part) -> AbstractContextManager[None]:
    """Of parts that begin at the same time one chooses the atlas, and the others find its choice."""
    if part.count == 1:
        return nullcontext()
    return waiting_for(prepared.kept / "oneshot_atlas.lock", print, f"choice of the atlas of {prepared.name}")
