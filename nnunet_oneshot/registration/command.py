"""What ``nnunet_oneshot register`` does: registers a dataset ahead of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_oneshot.config import OneShotConfig, with_guide
from nnunet_oneshot.data.atlas import resolve_atlases
from nnunet_oneshot.data.labelled import labelled_cases
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.splits import resolve_fold
from nnunet_oneshot.devices import usable_device
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.cache import RegistrationCache
from nnunet_oneshot.registration.dataset import register_dataset


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
        configuration: Such as ``3d_fullres``.
        plans_name: Such as ``nnUNetOneShotPlans``.
        folds: Folds whose atlases are registered; numbers or ``"all"``.
        device: Where the deformable stage runs.
        figures: Whether a picture of each pair is drawn.
        guide: Folder of a trained model whose segmentations guide; None is what the plans say.

    Returns:
        The cache of each fold.

    Raises:
        OneShotError: Something does not exist or is not as expected.
    """
    prepared = PreparedDataset.open(dataset=dataset, plans_name=plans_name, configuration=configuration)
    config = with_guide(OneShotConfig.from_plans(prepared.plans), guide)
    base, identifiers = str(prepared.base), prepared.identifiers
    labelled = labelled_cases(base, prepared.dataset_json, identifiers)
    place = usable_device(device)
    caches = []
    for name in folds:
        if name != "all" and not name.isdigit():
            raise OneShotError(f"Fold {name!r} is neither a number nor 'all': give folds such as -f 0 1.")
        fold = name if name == "all" else int(name)
        train, validation = resolve_fold(base, identifiers, labelled, fold)
        choice = resolve_atlases(base, config, train, validation, labelled, fold, prepared.image)
        print(f"Fold {name}: atlas {', '.join(choice.atlases)} ({choice.how})")
        caches.append(
            register_dataset(
                plans=prepared.plans,
                dataset_json=prepared.dataset_json,
                configuration=configuration,
                atlases=choice.atlases,
                cases=sorted({*train, *validation}),
                preprocessed_dataset_folder_base=base,
                config=config,
                device=place,
                fold=fold,
                figures=figures,
            )
        )
    return caches
