"""The teacher network, the projections of the student's features, and the losses of teacher and hint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nnunet_oneshot.config import DistillationConfig
from nnunet_oneshot.distillation.features import decoder_features, feature_channels
from nnunet_oneshot.distillation.functional import mask_patches, reconstruction_loss, scale_gradient
from nnunet_oneshot.distillation.hints import HINTS
from nnunet_oneshot.unet import as_unet


def build_teacher(configuration_manager: ConfigurationManager, num_channels: int) -> nn.Module:
    """The plan's network with the image channels as input and output and no deep supervision.

    Args:
        configuration_manager: Configuration of the plans from which the student is built.
        num_channels: Number of image channels, both in and out.
    """
    return get_network_from_plans(
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        num_channels,
        num_channels,
        allow_init=True,
        deep_supervision=False,
    )


class FeatureProjection(nn.Module):
    """Maps the student's features of one level to the teacher's: two 1x1 convolutions with a LeakyReLU in between.

    The student can keep features that only segmentation needs, because only their projection has to match the teacher.
    The projection is used in training only.

    Args:
        conv_op: ``nn.Conv2d`` or ``nn.Conv3d``, the network's own.
        channels: Channels of student and teacher at this level.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_op(channels, channels, 1), nn.LeakyReLU(inplace=True), conv_op(channels, channels, 1)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


class Distiller(nn.Module):
    """Teacher, projections and their losses; used in training only.

    The reconstruction loss trains the teacher. The hint trains the projections and, by default, only the student (see
    ``detach`` in the settings).

    Args:
        teacher: Network of `build_teacher`.
        config: Form of the hint, number of levels (at most those of the decoder) and corruption.
        features: Computes outputs and features; `decoder_features` or a compiled form of it.
    """

    def __init__(
        self, teacher: nn.Module, config: DistillationConfig, *, features: Callable = decoder_features
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.config = config
        self._features = features
        channels = feature_channels(teacher)[: config.levels]
        conv_op = as_unet(teacher).encoder.conv_op
        self.projections = nn.ModuleList(
            FeatureProjection(conv_op, number) if HINTS[config.hint].projects else nn.Identity() for number in channels
        )

    averaged: AveragedModel

    def follow(self, averaged: AveragedModel) -> None:
        """Stores the average of a student's weights, so that it is saved with the teacher."""
        self.averaged = averaged

    @property
    def teaches(self) -> bool:
        """Whether the student learns from the teacher; otherwise no teacher is trained."""
        return HINTS[self.config.hint].teaches

    @property
    def moves_teacher(self) -> bool:
        """Whether the hint also trains the teacher, so that the teacher's loss has to wait for the student's."""
        return self.teaches and self.config.detach != "teacher"

    def hint_weight(self, progress: float) -> float:
        """Weight of the hint after a share ``progress`` (0 to 1) of the epochs: a linear rise, then constant."""
        if progress >= self.config.warmup_epochs:
            return self.config.hint_weight
        return self.config.hint_weight * progress / self.config.warmup_epochs

    def reconstruct(self, real: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The teacher's loss on real patches, and its features for `hint`.

        Both come from one pass over the patches, which are corrupted if configured.

        Args:
            real: Real patches ``(B, C, *spatial)``.

        Returns:
            ``(loss, features)``: mean squared error times the configured weight (the paper's lambda_recon), and the
            features, full resolution first, detached unless the hint trains the teacher.
        """
        config = self.config
        seen = mask_patches(real, share=config.corruption, block=config.corruption_block)
        reconstruction, features = self._features(self.teacher, seen)
        loss = config.reconstruction_weight * reconstruction_loss(reconstruction, real)
        features = features[: config.levels]
        return loss, features if self.moves_teacher else [level.detach() for level in features]

    def hint(
        self,
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        *,
        hint_weight: float,
    ) -> torch.Tensor:
        """The loss that pulls the features of both together; add it to the segmentation loss without a weight.

        ``hint_weight`` scales the gradient that reaches the networks, not the loss. The projections thus learn at full
        strength while the weight is still low, and are no longer random when it rises.

        Args:
            student: The student's features on synthetic patches, full resolution first.
            teacher: The teacher's features on the real patches aligned with them.
            hint_weight: Weight of the hint for the networks that it trains (the paper's lambda_hint).

        Returns:
            The sum over the levels, as in the paper, at weight 1.
        """
        total = student[0].new_zeros((), dtype=torch.float32)
        if not self.teaches:
            return total
        for projection, own, other in zip(self.projections, student, teacher, strict=False):
            own = own.detach() if self.config.detach == "student" else scale_gradient(own, hint_weight)
            other = scale_gradient(other, hint_weight) if self.moves_teacher else other.detach()
            total = total + HINTS[self.config.hint].loss(projection(own), other)
        return total
