"""Implements ``nnunet_oneshot register``, which registers a dataset before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_oneshot.config import OneShotConfig, with_guide
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
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

    Returns:
        The cache of each fold.

    Raises:
        OneShotError: The dataset, plans, fold, device or guide is missing or invalid.
    """
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    config = with_guide(OneShotConfig.from_plans(prepared.plans), guide)
    place = usable_device(device)
    caches = []
    for name in folds:
        fold = prepared.fold(name)
        choice = resolve_atlases(prepared.base, config, fold, prepared.image_in_common_order)
        print(f"Fold {name}: atlas {', '.join(choice.atlases)} ({choice.how})")
        registrar = DatasetRegistrar(prepared, config, choice.atlases, place)
        cases = sorted({*fold.train, *fold.validation})
        caches.append(registrar.register(cases, fold=fold.number, figures=figures))
    return caches
