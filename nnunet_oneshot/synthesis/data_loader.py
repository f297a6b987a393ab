"""nnU-Net's data loader for patches made from the atlas."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnunet_oneshot.config import SynthesisConfig
from nnunet_oneshot.data.prepared import PreparedDataset
from nnunet_oneshot.data.preprocessed import open_image
from nnunet_oneshot.registration.dataset.cache import GuidedRegistrations, RegistrationCache
from nnunet_oneshot.registration.pair.quality import draw_weights, is_ambiguous
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.seeding import derive_seed
from nnunet_oneshot.synthesis.sampler import (
    Atlas,
    Deformation,
    Flows,
    apply_appearance,
    case_locations,
    draw_deformation,
    sample_patch,
    with_own_mask,
)
from nnunet_oneshot.synthesis.spatial import patch_places, split_spatial


@dataclass(frozen=True)
class PatchSettings:
    """Settings for the patches of a loader.

    Attributes:
        batch_size: Samples a batch.
        initial_patch_size: Size of the patch before augmentation, from which nnU-Net cuts the final patch; 2 or 3 axes.
        patch_size: Final size.
        transforms: nnU-Net's training or validation transforms.
        synthesis: Settings for the variation of deformation and appearance.
        real_share: Probability that the image is real instead of the warped atlas; the label is warped in both cases.
        augment: Whether to vary deformation and appearance.
        oversample_foreground_percent: Share of samples that must contain foreground, as in nnU-Net.
        masked: For each channel, whether masked normalisation was used (``use_mask_for_norm`` of the plans).
    """

    batch_size: int
    initial_patch_size: Sequence[int]
    patch_size: Sequence[int]
    transforms: BasicTransform
    synthesis: SynthesisConfig
    real_share: float
    augment: bool
    oversample_foreground_percent: float
    masked: Sequence[bool] = ()


class OneShotDataLoader(nnUNetDataLoader):
    """Yields for each sample a synthetic patch, its label and the aligned real patch.

    nnU-Net's own loader chooses the position of a patch, and nnU-Net's transforms augment it. The spatial transforms
    are applied as coordinates (see `nnunet_oneshot.synthesis.spatial`). `build_oneshot_loader` builds this class.
    """

    def __init__(
        self,
        dataset,
        atlases: dict[str, Atlas],
        registrations: dict[tuple[str, str], Registration],
        *,
        label_manager: LabelManager,
        settings: PatchSettings,
        seed: int,
        real_cases: Sequence[str] | None = None,
    ) -> None:
        spatial, remaining = split_spatial(settings.transforms)
        super().__init__(
            dataset,
            settings.batch_size,
            settings.initial_patch_size,
            settings.patch_size,
            label_manager,
            oversample_foreground_percent=settings.oversample_foreground_percent,
            transforms=remaining,
        )
        self.spatial = spatial
        self.atlases = atlases
        self.registrations = registrations
        self.settings = settings
        self.seed = seed
        self.pairs = sorted(registrations)
        self.flows = Flows(list(registrations.values()))
        self.pair_weights = draw_weights([registrations[pair] for pair in self.pairs])
        # A synthetic patch has the right labels wherever the registration led; a real one may have those of a
        # neighbour.
        shown = [
            (real_cases is None or case in real_cases) and not is_ambiguous(registrations[atlas, case].quality)
            for atlas, case in self.pairs
        ]
        # Where none of these pairs may be drawn, any may.
        weights = self.pair_weights * shown
        self.real_weights = weights if weights.any() else self.pair_weights

    def set_thread_id(self, thread_id: int) -> None:
        """Called by batchgenerators in each worker; seeds torch there, which batchgenerators does not."""
        super().set_thread_id(thread_id)
        torch.set_num_threads(1)
        torch.manual_seed(derive_seed(self.seed, thread_id))

    def generate_train_batch(self) -> dict:
        """One batch.

        Returns:
            ``data`` (B, C, *patch) float32, ``target`` in the format of nnU-Net's loader, ``real`` (B, C, *patch)
            float32 aligned with ``data``, ``from_real`` (B,) bool, whether ``data`` shows the real image, ``keys`` (the
            unlabelled cases) and ``atlases``.
        """
        drawn, samples = [], []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for index in range(self.batch_size):
                from_real = self._draw_source()
                weights = self.real_weights if from_real else self.pair_weights
                pair = self.pairs[np.random.choice(len(self.pairs), p=weights / weights.sum())]
                drawn.append(pair)
                samples.append(self._sample(*pair, self.get_do_oversample(index), from_real))
        segs = [sample["segmentation"] for sample in samples]
        return {
            "data": torch.stack([sample["image"].float() for sample in samples]),
            "target": [torch.stack(level) for level in zip(*segs, strict=True)]
            if isinstance(segs[0], list)
            else torch.stack(segs),
            "real": torch.stack([sample["regression_target"].float() for sample in samples]),
            "from_real": torch.tensor([sample["from_real"] for sample in samples]),
            "keys": [case for _, case in drawn],
            "atlases": [atlas for atlas, _ in drawn],
        }

    def _draw_source(self) -> bool:
        """Whether the next sample shows the real image."""
        # Draws only if there is a choice, so that trainers with a single source use the same random numbers.
        real_share = self.settings.real_share
        return np.random.uniform() < real_share if 0 < real_share < 1 else real_share == 1

    def _sample(self, atlas_name: str, case: str, foreground: bool, from_real: bool) -> dict:
        atlas, registration = self.atlases[atlas_name], self.registrations[atlas_name, case]
        augment = self.settings.augment and not from_real
        deformation = draw_deformation(
            registration, lambda: self._other(atlas_name), self.settings.synthesis, augment=augment, flows=self.flows
        )
        locations = self._locations(deformation, atlas) if foreground or self.has_ignore else None
        # If the atlas has no label to centre on, nnU-Net's loader falls back to a random position.
        corner, _ = self.get_bbox(registration.case_shape, foreground, locations)
        places = patch_places(corner, self.patch_size, self.final_patch_size, self.spatial)
        patch = sample_patch(places, deformation, atlas, self._data.load_case(case)[0], synthetic=not from_real)
        if from_real:
            patch = with_own_mask(patch, self.settings.masked)
        elif augment:
            patch = apply_appearance(patch, self.settings.synthesis)
        image = patch.real.clone() if patch.synthetic is None else patch.synthetic
        sample = {"image": image, "segmentation": patch.seg, "regression_target": patch.real}
        if self.patch_size_was_2d:
            sample = {name: volume[:, 0] for name, volume in sample.items()}
        return {**self.transforms(**sample), "from_real": from_real}

    def _other(self, atlas_name: str) -> Registration:
        """The registration of the atlas to a random case."""
        pairs = [index for index, (atlas, _) in enumerate(self.pairs) if atlas == atlas_name]
        weights = self.pair_weights[pairs] + 1e-12
        return self.registrations[self.pairs[np.random.choice(pairs, p=weights / weights.sum())]]

    def _locations(self, deformation: Deformation, atlas: Atlas) -> dict:
        """nnU-Net's class locations with one voxel per class, mapped from the atlas to the case."""
        drawn = {
            name: places[np.random.choice(len(places))][1:]
            for name, places in atlas.class_locations.items()
            if len(places) > 0
        }
        moved: dict[Any, list] = {name: [] for name in atlas.class_locations}
        if drawn:
            found = case_locations(deformation, np.array(list(drawn.values())))
            moved.update({name: [[0, *place]] for name, place in zip(drawn, found, strict=True)})
        return moved


def build_oneshot_loader(
    prepared: PreparedDataset,
    registrations: RegistrationCache | GuidedRegistrations,
    *,
    atlases: Sequence[str],
    cases: Sequence[str],
    settings: PatchSettings,
    seed: int,
    real_cases: Sequence[str] | None = None,
    rejected: Collection[tuple[str, str]] = (),
) -> OneShotDataLoader:
    """Loads atlases and registrations into memory and builds the loader.

    Args:
        prepared: The dataset.
        registrations: Contains the registration of each atlas to each case.
        atlases: Labelled cases.
        cases: Unlabelled cases; only their images are read.
        settings: Settings for the patches.
        seed: Seed of torch in the worker processes.
        real_cases: Those of the cases that are shown as they are; None are all. Pairs that are ambiguous are not.
        rejected: Pairs (atlas, case) that no patch is made from.
    """
    loaded = {
        name: Atlas(
            torch.from_numpy(prepared.image(name)),
            torch.from_numpy(prepared.segmentation(name)),
            prepared.properties(name)["class_locations"],
        )
        for name in atlases
    }
    pairs = {(a, c): registrations.load(a, c) for a in atlases for c in cases if a != c and (a, c) not in rejected}
    return OneShotDataLoader(
        ImagesOnly(str(prepared.folder), cases),
        loaded,
        pairs,
        label_manager=prepared.label_manager,
        settings=settings,
        seed=seed,
        real_cases=real_cases,
    )


class ImagesOnly:
    """Replaces an nnU-Net dataset; opens the image of a case but never its label."""

    def __init__(self, folder: str, identifiers: Sequence[str]) -> None:
        self.identifiers = sorted(identifiers)
        self.folder = folder

    def load_case(self, identifier: str) -> tuple:
        """(image, None, None, {}); slicing the image does not read the whole file."""
        return open_image(self.folder, identifier), None, None, {}


def wrap_workers(loader: OneShotDataLoader, num_processes: int, seed: int, pin_memory: bool):
    """Runs a loader in nnU-Net's worker processes; the order of the batches depends only on the seed.

    Args:
        loader: The loader.
        num_processes: Number of workers; 0 runs in this process, which the caller should then seed.
        seed: Each worker's numpy seed is derived from it.
        pin_memory: Whether to put batches into pinned memory.
    """
    if num_processes == 0:
        return SingleThreadedAugmenter(loader, None)
    return MultiThreadedAugmenter(
        loader,
        None,
        num_processes,
        num_cached_per_queue=2,
        seeds=[derive_seed(seed, worker) for worker in range(num_processes)],
        pin_memory=pin_memory,
        wait_time=0.002,
    )
