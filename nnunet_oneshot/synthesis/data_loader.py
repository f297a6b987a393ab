"""nnU-Net's data loader for patches made from the atlas."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
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
from nnunet_oneshot.data.previous_stage import PreviousStage
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset.cache import GuidedRegistrations, RegistrationCache
from nnunet_oneshot.registration.pair.quality import draw_weights, is_ambiguous
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.seeding import derive_seed
from nnunet_oneshot.synthesis.first_stage import roughened
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

_SECONDS_BETWEEN_LOOKS = 0.5


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
        coarseness: In the second stage of a cascade, size of a voxel of the first along three axes, in voxels.
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
    coarseness: Sequence[float] = ()


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
        own_share: float = 0.0,
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
        self.own_share = own_share
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
            float32 aligned with ``data``, ``from_real`` (B,) bool, whether ``data`` shows the real image with a label
            that a registration carried to it, ``keys`` (the unlabelled cases, or the atlas itself where it is shown as
            it is with its own label) and ``atlases``. In the second stage of a cascade ``data`` has one more channel a
            label, and ``previous`` (B, 1, *patch) is the first stage's segmentation of ``real``.
        """
        drawn, samples = [], []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for index in range(self.batch_size):
                pair, from_real = self._draw_pair()
                drawn.append(pair)
                samples.append(self._sample(*pair, self.get_do_oversample(index), from_real))
        segs = [sample["segmentation"] for sample in samples]
        real = torch.stack([sample["regression_target"].float() for sample in samples])
        batch = {
            "data": torch.stack([sample["image"].float() for sample in samples]),
            "target": [torch.stack(level) for level in zip(*segs, strict=True)]
            if isinstance(segs[0], list)
            else torch.stack(segs),
            "real": real,
            "from_real": torch.tensor([sample["from_real"] for sample in samples]),
            "keys": [case for _, case in drawn],
            "atlases": [atlas for atlas, _ in drawn],
        }
        if self.settings.coarseness:
            batch.update(real=real[:, :-1], previous=real[:, -1:])
        return batch

    def _draw_pair(self) -> tuple[tuple[str, str], bool]:
        """Atlas and case of the next sample, and whether it shows the real image with a carried label."""
        # Draws only if there is a choice, so that one atlas leaves all other draws as they are.
        if self.own_share and np.random.uniform() < self.own_share:
            atlas = sorted(self.atlases)[np.random.choice(len(self.atlases))]
            return (atlas, atlas), False
        from_real = self._draw_source()
        weights = self.real_weights if from_real else self.pair_weights
        return self.pairs[np.random.choice(len(self.pairs), p=weights / weights.sum())], from_real

    def _draw_source(self) -> bool:
        """Whether the next sample shows the real image."""
        # Draws only if there is a choice, so that trainers with a single source use the same random numbers.
        real_share = self.settings.real_share
        return np.random.uniform() < real_share if 0 < real_share < 1 else real_share == 1

    def _sample(self, atlas_name: str, case: str, foreground: bool, from_real: bool) -> dict:
        atlas, is_own = self.atlases[atlas_name], case == atlas_name
        registration = _unmoved(atlas_name, atlas) if is_own else self.registrations[atlas_name, case]
        augment = self.settings.augment and not from_real and not is_own
        deformation = draw_deformation(
            registration, lambda: self._other(atlas_name), self.settings.synthesis, augment=augment, flows=self.flows
        )
        locations = self._locations(deformation, atlas) if foreground or self.has_ignore else None
        # If the atlas has no label to centre on, nnU-Net's loader falls back to a random position.
        corner, _ = self.get_bbox(registration.case_shape, foreground, locations)
        places = patch_places(corner, self.patch_size, self.final_patch_size, self.spatial)
        if is_own and not self.settings.coarseness:
            real, previous = atlas.image.numpy(), None
        else:
            real, _, previous, _ = self._data.load_case(case)
        shows_atlas = not from_real and not is_own
        patch = sample_patch(places, deformation, atlas, real, synthetic=shows_atlas, previous=previous)
        if from_real:
            patch = with_own_mask(patch, self.settings.masked)
        elif augment:
            patch = apply_appearance(patch, self.settings.synthesis)
        image = patch.real.clone() if patch.synthetic is None else patch.synthetic
        sample = {"image": image, "segmentation": patch.seg, "regression_target": patch.real}
        if patch.previous is not None:
            shown = patch.previous if from_real else roughened(patch.seg, self.settings.coarseness)
            # Where nnU-Net's transforms look for it; beside the real image it is mirrored with that.
            sample["segmentation"] = torch.cat([patch.seg, shown])
            sample["regression_target"] = torch.cat([patch.real, patch.previous])
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


def share_of_labelled(atlases: Sequence[str], cases: Sequence[str]) -> float:
    """Share of the training samples that show an atlas as it is, with its own label; each atlas has the same part.

    Each image of the training part is shown equally often: an unlabelled one as what an atlas is warped to, a labelled
    one as itself. One atlas alone is only warped.

    Args:
        atlases: The labelled images.
        cases: The unlabelled ones.
    """
    return len(atlases) / (len(atlases) + len(cases)) if len(atlases) > 1 else 0.0


def _unmoved(name: str, atlas: Atlas) -> Registration:
    """The registration of an atlas to itself, which moves nothing."""
    shape = tuple(atlas.seg.shape[1:])
    nothing = np.zeros((3, *(min(2, size) for size in shape)), np.float32)
    return Registration(name, name, np.eye(4), nothing, shape, shape)


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

    Patches for training, that is those that are augmented, also show the atlases as they are; see `share_of_labelled`.

    Args:
        prepared: The dataset.
        registrations: Contains the registration of each atlas to each case.
        atlases: Labelled cases.
        cases: Unlabelled cases; only their images are read. Without any, each patch shows an atlas as it is.
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
        ImagesOnly(str(prepared.folder), cases or atlases, prepared.previous),
        loaded,
        pairs,
        label_manager=prepared.label_manager,
        settings=settings,
        seed=seed,
        real_cases=real_cases,
        own_share=share_of_labelled(atlases, cases) if settings.augment else 0.0,
    )


class ImagesOnly:
    """Replaces an nnU-Net dataset; opens the image of a case but never its label."""

    def __init__(self, folder: str, identifiers: Sequence[str], previous: PreviousStage | None = None) -> None:
        self.identifiers = sorted(identifiers)
        self.folder = folder
        self.previous = previous

    def load_case(self, identifier: str) -> tuple:
        """(image, None, the first stage's segmentation or None, {}); slicing does not read a whole file."""
        previous = None if self.previous is None else self.previous.open(identifier)
        return open_image(self.folder, identifier), None, previous, {}


class PatchError(OneShotError):
    """Patches could not be made, for the reason that the message names."""


class _Telling:
    """A loader that gives the reason for which it fails as its batch, so that it reaches the training.

    Of a worker that ends with an error, batchgenerators tells the training only that it has ended.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> _Telling:
        return self

    def __next__(self) -> dict | PatchError:
        try:
            return next(self._loader)
        except OneShotError as error:
            return PatchError(str(error))
        except Exception as error:
            # The training gets the sentence; whoever looks for the reason needs the place.
            traceback.print_exc(file=sys.stderr)
            return PatchError(f"A patch could not be made ({type(error).__name__}: {error}).")

    def set_thread_id(self, thread_id: int) -> None:
        self._loader.set_thread_id(thread_id)


class _Workers(MultiThreadedAugmenter):
    """nnU-Net's worker processes, whose failures are told."""

    # Of batchgenerators.
    _processes: list[Any]
    pin_memory_queue: Any

    def __next__(self) -> dict:
        if not self.was_initialized:
            self._start()
        try:
            batch = self._next_batch()
        except KeyboardInterrupt:
            self._finish()
            raise
        if isinstance(batch, PatchError):
            self._finish()
            raise batch
        return batch

    def _next_batch(self) -> dict | PatchError:
        # Without a look at the events that workers share: one that was killed may have taken their locks with it.
        while all(process.is_alive() for process in self._processes):
            with suppress(Empty):
                return self.pin_memory_queue.get(timeout=_SECONDS_BETWEEN_LOOKS)
        for process in self._processes:
            process.kill()
        self._processes.clear()
        self.was_initialized = False
        raise PatchError(
            f"A worker process that makes patches ended unexpectedly, most often because memory ran out: use fewer of "
            f"them (now {self.num_processes}; set nnUNet_n_proc_DA), or free memory."
        )


class _InThisProcess(SingleThreadedAugmenter):
    """The same without workers."""

    def __next__(self) -> dict:
        batch = super().__next__()
        if isinstance(batch, PatchError):
            raise batch
        return batch


def wrap_workers(loader: Any, num_processes: int, seed: int, pin_memory: bool) -> _Workers | _InThisProcess:
    """Runs a loader in nnU-Net's worker processes; the order of the batches depends only on the seed.

    The next batch is a `PatchError` where a worker ended, or what it reads has gone or is damaged.

    Args:
        loader: The loader.
        num_processes: Number of workers; 0 runs in this process, which the caller should then seed.
        seed: Each worker's numpy seed is derived from it.
        pin_memory: Whether to put batches into pinned memory.
    """
    if num_processes == 0:
        return _InThisProcess(_Telling(loader), None)
    return _Workers(
        _Telling(loader),
        None,
        num_processes,
        num_cached_per_queue=2,
        seeds=[derive_seed(seed, worker) for worker in range(num_processes)],
        pin_memory=pin_memory,
        wait_time=0.002,
    )
