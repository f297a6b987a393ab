"""The work on one batch of pairs: the same in this process, in others and on other machines."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nnunet_oneshot
from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.prepared import PreparedDataset, image_digest
from nnunet_oneshot.errors import OneShotError, listed
from nnunet_oneshot.registration.dataset.cache import RegistrationCache
from nnunet_oneshot.registration.dataset.network_store import Predictor, load_predictor
from nnunet_oneshot.registration.dataset.pictures import draw_registration
from nnunet_oneshot.registration.dataset.sources import Source
from nnunet_oneshot.registration.pair.quality import is_ambiguous
from nnunet_oneshot.registration.pair.registrar import Aligned, AtlasRegistrar
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.self_training.guide import SegmentingGuide


@dataclass(frozen=True)
class Pair:
    """A pair that is to be registered.

    Attributes:
        atlas: Name of the labelled case.
        case: Name of the case that it is warped to.
        key: Checksum of all inputs and parameters.
        source: What is known of the case.
        shapes: Voxels (X, Y, Z) of the preprocessed atlas and of the case.
    """

    atlas: str
    case: str
    key: str
    source: Source
    shapes: tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class PairWork:
    """Registers batches of pairs of one dataset and writes them. Can be sent to other processes.

    Attributes:
        prepared: The dataset.
        config: Settings.
        device: Where the deformable stage runs.
        cache: Stores the pairs.
        parameters: All parameters that a registration depends on, for its record.
        network: File of the registration network, or None.
        guide: Guides each pair, or None.
        first: Earlier registrations whose affine maps are reused, or None.
        figures: Whether to draw a picture of each pair.
    """

    prepared: PreparedDataset
    config: OneShotConfig
    device: torch.device
    cache: RegistrationCache
    parameters: dict[str, Any]
    network: Path | None = None
    guide: SegmentingGuide | None = None
    first: RegistrationCache | None = None
    figures: bool = True

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to another process, which loads the rest itself."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**state, "prepared": dataclasses.replace(self.prepared)}

    def registrar(self, atlas: str) -> AtlasRegistrar:
        """Registers this atlas; made when first asked for."""
        if atlas not in self._registrars:
            image, segmentation = self._volumes(atlas)
            self._registrars[atlas] = AtlasRegistrar(
                atlas,
                image,
                self.prepared.spacing(atlas),
                config=self.config.registration,
                device=self.device,
                foreground=segmentation > 0,
            )
        return self._registrars[atlas]

    def register(self, batch: Sequence[Pair]) -> None:
        """All stages of some pairs of one atlas.

        Raises:
            OneShotError: A stage failed; it names the pair.
        """
        images = [self.image(pair) for pair in batch]
        aligned = [self.align(pair, image) for pair, image in zip(batch, images, strict=True)]
        results = self.deform(batch, aligned, [image.shape[1:] for image in images])
        for pair, registration, image in zip(batch, results, images, strict=True):
            self.keep(pair, registration, image)

    def image(self, pair: Pair) -> np.ndarray:
        """(C, U, V, W) image of the case, as it is registered.

        Raises:
            OneShotError: It cannot be read, or is another one than the pair is for.
        """
        with telling_pairs([pair]):
            image = self.prepared.image(pair.case)
            # Damage inside of a compressed file is mostly read as other values.
            if image_digest(image) != pair.source["digest"]:
                raise OneShotError(
                    f"The preprocessed image of {pair.case} in {self.prepared.folder} holds other values than when it "
                    f"was first registered, though its file has the same size and date: it was damaged. Preprocess the "
                    f"dataset again with `nnunet_oneshot plan_and_preprocess`."
                )
            return self.prepared.with_outline(image)

    def align(self, pair: Pair, image: np.ndarray) -> Aligned:
        """The affine stage; ``image`` is that of the case."""
        with telling_pairs([pair]):
            registrar = self.registrar(pair.atlas)
            initial = self.prepared.alignment(pair.case, pair.atlas, image.shape[1:], registrar.atlas_shape)
            known = None if self.first is None else self.first.load(pair.atlas, pair.case)
            spacing = self.prepared.spacing(pair.case)
            if known is None or self.guide is None or not is_ambiguous(known.quality):
                return registrar.align(image, spacing, initial=initial, known=known)
            return registrar.realign(
                image,
                spacing,
                known=known,
                initial=initial,
                atlas_maps=self.guide.atlas_maps(self._volumes(pair.atlas)[1]),
                probabilities=self.guide.probabilities(self.prepared.network_input(pair.case)),
                trust=self.guide.trust,
            )

    def deform(
        self, batch: Sequence[Pair], aligned: Sequence[Aligned], shapes: Sequence[Sequence[int]]
    ) -> list[Registration]:
        """The deformable stage of some pairs of one atlas; ``shapes`` are (U, V, W) of the cases."""
        with telling_pairs(batch):
            registrar, guide = self.registrar(batch[0].atlas), None
            if self.guide is not None:
                # One after the other: of many labels of a large image, they take gigabytes.
                probabilities = (self.guide.probabilities(self.prepared.network_input(pair.case)) for pair in batch)
                maps = self.guide.atlas_maps(self._volumes(registrar.name)[1])
                guide = registrar.guide(maps, probabilities, aligned, self.guide.trust)
            names = [pair.case for pair in batch]
            return registrar.deform(aligned, names, shapes, predict=self._predict, guide=guide)

    def keep(self, pair: Pair, registration: Registration, image: np.ndarray) -> None:
        """Draws and writes a pair; ``image`` is that of the case."""
        with telling_pairs([pair]):
            if self.figures:
                path = self.cache.path(pair.atlas, pair.case, ".png")
                draw_registration(path, registration, self._volumes(pair.atlas), image)
            self.cache.save(
                registration,
                key=pair.key,
                sources=pair.source,
                parameters=self.parameters,
                versions={"nnunet_oneshot": nnunet_oneshot.__version__, "torch": str(torch.__version__)},
            )

    @cached_property
    def _registrars(self) -> dict[str, AtlasRegistrar]:
        return {}

    @cached_property
    def _read(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _volumes(self, atlas: str) -> tuple[np.ndarray, np.ndarray]:
        """(C, X, Y, Z) image and (1, X, Y, Z) label map of an atlas; that of the last one is kept."""
        if atlas not in self._read:
            read = self.prepared.registration_image(atlas), self.prepared.segmentation(atlas)
            self._read.clear()
            self._read[atlas] = read
        return self._read[atlas]

    @cached_property
    def _predict(self) -> Predictor | None:
        if self.network is None:
            return None
        return load_predictor(self.network, self.prepared, config=self.config, device=self.device)


def described(batch: Sequence[Pair]) -> str:
    """The pairs of a batch in words, such as ``atlas_0 to case_1, case_2``."""
    return f"{batch[0].atlas} to {listed(pair.case for pair in batch)}"


@contextmanager
def telling_pairs(batch: Sequence[Pair]) -> Iterator[None]:
    """Turns what fails into an `OneShotError` that names the pairs."""
    try:
        yield
    except OneShotError as error:
        raise OneShotError(f"The registration of {described(batch)} failed: {error}") from error
    except Exception as error:
        # The user gets the sentence; whoever looks for the reason needs the place.
        traceback.print_exc(file=sys.stderr)
        raise OneShotError(
            f"The registration of {described(batch)} failed ({type(error).__name__}: {error}). Pairs that were "
            f"finished are kept: mend the cause and give the same command again."
        ) from error
