"""Similarity terms of registration, each a registered entry.

The plans' ``registration.similarity`` and ``nnunet_oneshot register-pair --similarity`` name one of `SIMILARITIES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nnunet_oneshot.registration.pair.functional import (
    correlation_window,
    local_moments,
    masked_mean,
    squared_local_correlation,
)
from nnunet_oneshot.registration.pair.multimodal import mind_ssc, mutual_information
from nnunet_oneshot.registry import Registry

# An image (B, C, *grid) -> (B,), smaller is more similar.
Dissimilarity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Similarity:
    """An entry of `SIMILARITIES`.

    Attributes:
        to: (fixed (B, C, *grid) float32, mask (B, 1, *grid) or None, edge of a window in voxels) -> the dissimilarity
            of other images to ``fixed``; terms that depend on ``fixed`` alone are computed once.
        describe: Turns each image (B, C, *grid) float32 into the descriptor that ``to`` compares; None compares the
            images themselves. The optimisation computes it once per level and warps it instead of the image, which
            neglects rotation.
        affine_metric: Metric of the affine stage, see `nnunet_oneshot.registration.pair.affine.register_affine`.
    """

    to: Callable[[Tensor, Tensor | None, int], Dissimilarity]
    describe: Callable[[Tensor], Tensor] | None = None
    affine_metric: str = "correlation"

    def described(self, image: Tensor) -> Tensor:
        """Descriptor of an image, (B, C, *grid) -> (B, K, *grid) float32."""
        return image.float() if self.describe is None else self.describe(image.float())

    @property
    def meaning(self) -> str:
        """What it measures, from the docstring of its function."""
        return inspect.getdoc(self.to) or ""


SIMILARITIES: Registry[Similarity] = Registry("similarity", setting="similarity")


@SIMILARITIES.register("lncc", Similarity)
def local_correlation(fixed: Tensor, mask: Tensor | None, kernel: int) -> Dissimilarity:
    """Squared local normalised cross-correlation, -1 is best: for images of one contrast with varying brightness."""
    window = correlation_window(kernel, fixed.shape[2:])
    moments = local_moments(fixed, window)
    return lambda warped: masked_mean(-squared_local_correlation(warped, fixed, window, moments=moments), mask)


@SIMILARITIES.register("mse", Similarity)
def squared_difference(fixed: Tensor, mask: Tensor | None, kernel: int) -> Dissimilarity:
    """Mean squared difference, 0 is best: for images with comparable intensities."""
    return lambda warped: masked_mean((warped - fixed) ** 2, mask)


@SIMILARITIES.register("mind", Similarity, describe=mind_ssc, affine_metric="mutual_information")
def self_similarity(fixed: Tensor, mask: Tensor | None, kernel: int) -> Dissimilarity:
    """Squared difference of self-similarity descriptors (MIND-SSC; Heinrich et al., MICCAI 2013), 0 is best: for
    images of different contrast."""
    return squared_difference(fixed, mask, kernel)


@SIMILARITIES.register("nmi", Similarity, affine_metric="mutual_information")
def normalised_mutual_information(fixed: Tensor, mask: Tensor | None, kernel: int) -> Dissimilarity:
    """Normalised mutual information (Studholme et al., 1999), -1 is best: for images of different contrast."""
    return lambda warped: -mutual_information(warped, fixed, mask).mean(1)


def similarity_loss_to(
    fixed: Tensor, mask: Tensor | None = None, *, similarity: str = "lncc", kernel: int = 7
) -> Dissimilarity:
    """`similarity_loss` of any image to ``fixed``; terms that depend on ``fixed`` alone are computed once.

    Args:
        fixed: (B, C, *grid).
        mask: (B, 1, *grid), 1 where ``fixed`` was observed; other voxels do not count.
        similarity: A name of `SIMILARITIES`.
        kernel: Edge of the LNCC window, voxels; made odd and no longer than the shortest axis.

    Returns:
        A function that maps an image (B, C, *grid) to its `similarity_loss`.
    """
    term = SIMILARITIES[similarity]
    loss = term.to(term.described(fixed), mask, kernel)
    return lambda warped: loss(term.described(warped))


def similarity_loss(
    warped: Tensor, fixed: Tensor, mask: Tensor | None = None, *, similarity: str = "lncc", kernel: int = 7
) -> Tensor:
    """Dissimilarity of two images, computed in float32; smaller is more similar.

    Args:
        warped: (B, C, *grid).
        fixed: (B, C, *grid).
        mask: See `similarity_loss_to`, also for the other arguments.

    Returns:
        (B,), the mean over channels and observed voxels of each pair.
    """
    return similarity_loss_to(fixed, mask, similarity=similarity, kernel=kernel)(warped)
