"""A label term for registration: the atlas's labels against a student's segmentation of each case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_oneshot.registration.pair.functional import downsample, resize, scale_vectors, warp
from nnunet_oneshot.registration.pair.pyramid import level_shapes


@dataclass(frozen=True)
class LabelGuide:
    """Label maps of an atlas and of a batch of cases registered to it, on one coarse grid.

    Each voxel holds the share of it that a label (or region) fills, so that half the resolution still shows
    displacements of less than a voxel. 40 labels then cost as much as 5 at full resolution.

    Attributes:
        atlas: (1, K, *grid), 0 to 1.
        known: (1, 1, *grid), share of the voxel that the atlas's ignore label does not cover.
        fixed: (B, K, *grid), the student's probabilities, affinely resampled onto the atlas's grid.
        mask: (B, 1, *grid), share of the voxel that was observed in the case.
        say: (K,), upper limit of the weight of each label of the student, 0 to 1.
    """

    atlas: Tensor
    known: Tensor
    fixed: Tensor
    mask: Tensor
    say: Tensor

    def trust(self) -> Tensor:
        """Weight of each label of the student, (B, K), 0 to 1.

        The weight is ``say`` times the ratio of the smaller to the larger of two volumes of the label: in the
        student's segmentation and in the affinely aligned atlas. A label that the student misses, or finds everywhere,
        thus has no weight. Overlap is unsuitable as weight: it is smallest where the guide can improve most.
        """
        weight = self.known * self.mask
        atlas, fixed = ((weight * maps).flatten(2).sum(2) for maps in (self.atlas, self.fixed))
        return self.say * torch.minimum(atlas, fixed) / torch.maximum(atlas, fixed).clamp_min(1e-6)

    def loss_on(self, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The loss of displacements given on a grid.

        Args:
            shape: Grid over the atlas's field of view; labels are compared on it, or on the guide's own grid if that
                is coarser.

        Returns:
            A function of a displacement (B, D, *shape) in voxels of that grid: the mean over the atlas's labels of
            trust x (1 - soft Dice), (B,).
        """
        trust, dice = self.trust(), self.dice_on(shape)
        counted = self._labels().sum().clamp_min(1)
        return lambda displacement: (trust * (1 - dice(displacement))).sum(1) / counted

    def agreement_on(self, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Like `loss_on`, but returns the mean soft Dice of the labels in the atlas, (B,)."""
        dice, labels = self.dice_on(shape), self._labels()
        return lambda displacement: dice(displacement)[:, labels].sum(1) / labels.sum().clamp_min(1)

    def dice_on(self, shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """Like `loss_on`, but returns the soft Dice of each label, (B, K).

        The denominator uses squares (Milletari et al., 3DV 2016), so that equal maps have a Dice of 1.
        """
        grid = tuple(min(pair) for pair in zip(shape, self.atlas.shape[2:], strict=True))
        atlas, known, fixed, mask = (downsample(v, grid) for v in (self.atlas, self.known, self.fixed, self.mask))
        moving = torch.cat([atlas, known], dim=1).expand(len(fixed), -1, *grid)

        def dice(displacement: Tensor) -> Tensor:
            warped = warp(moving, scale_vectors(resize(displacement, grid), shape, grid))
            # Detached: moving unknown voxels over a mismatch must not lower the loss.
            labels, weight = warped[:, :-1], warped[:, -1:].detach() * mask
            both = (weight * labels * fixed).flatten(2).sum(2)
            each = (weight * (labels**2 + fixed**2)).flatten(2).sum(2)
            return 2 * both / each.clamp_min(1e-6)

        return dice

    def _labels(self) -> Tensor:
        """Whether the atlas has each label, (K,) bool."""
        return self.atlas[0].flatten(1).any(1)


def guide_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Grid for comparing labels, given a registration grid: half as many voxels along long axes."""
    return level_shapes(shape, 2)[0]
