"""The registration network: the plan's U-Net, its encoder shared by both images (arXiv 2408.03616)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.precision import processor_autocast
from nnunet_oneshot.progress import tracked
from nnunet_oneshot.registration.pair.functional import (
    contrastive_loss,
    diffusion_energy,
    downsample,
    integrate_on,
    warp,
)
from nnunet_oneshot.registration.pair.pyramid import velocity_shape
from nnunet_oneshot.registration.pair.similarities import similarity_loss
from nnunet_oneshot.unet import as_unet


class RegistrationNetwork(nn.Module):
    """Maps an atlas and a case on one grid to a stationary velocity field.

    Both images pass through the same encoder. A 1x1 convolution joins their features at each scale, and the plan's
    decoder turns them into one output per spatial axis. The last layer starts near zero, so that training starts near
    the identity. The paper predicts a plain displacement; this network predicts a velocity field, whose flow does not
    fold.

    Args:
        unet: U-Net of dynamic-network-architectures with the channels of one image as input, one output per spatial
            axis and no deep supervision.
        dim: Number of spatial axes, 2 or 3.
    """

    def __init__(self, unet: nn.Module, dim: int) -> None:
        super().__init__()
        self.unet = unet
        encoder, decoder = as_unet(unet).encoder, as_unet(unet).decoder
        convolution = nn.Conv2d if dim == 2 else nn.Conv3d
        self.join = nn.ModuleList(convolution(2 * width, width, 1) for width in encoder.output_channels)
        head = decoder.seg_layers[-1]
        nn.init.normal_(head.weight, std=1e-5)
        nn.init.zeros_(head.bias)
        self.divisor = [1] * dim
        for stride in encoder.strides:
            strides = [stride] * dim if isinstance(stride, int) else stride
            self.divisor = [d * s for d, s in zip(self.divisor, strides, strict=True)]

    def forward(self, atlas: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity of each pair, and the features for the contrastive term.

        Args:
            atlas: (B, C, *grid), any shape; padded internally to a shape that the U-Net can divide.
            fixed: (B, C, *grid).

        Returns:
            Velocity (B, D, *grid), voxels of the grid; globally pooled bottleneck features (B, F) of atlas and case.
        """
        shape = fixed.shape[2:]
        padding = []
        for size, divisor in zip(reversed(shape), reversed(self.divisor), strict=True):
            # Instance normalisation needs more than one voxel at the bottleneck.
            padding += [0, max(-(-size // divisor), 2) * divisor - size]
        atlas, fixed = (F.pad(image, padding, mode="constant") for image in (atlas, fixed))
        encoder, decoder = as_unet(self.unet).encoder, as_unet(self.unet).decoder
        atlas_skips, fixed_skips = encoder(atlas), encoder(fixed)
        joined = [join(torch.cat(pair, dim=1)) for join, *pair in zip(self.join, atlas_skips, fixed_skips, strict=True)]
        inside = (slice(None), slice(None), *(slice(0, n) for n in shape))
        return decoder(joined)[inside], atlas_skips[-1].flatten(2).mean(2), fixed_skips[-1].flatten(2).mean(2)


@dataclass(frozen=True)
class TrainingPairs:
    """The training pairs of a registration network.

    Attributes:
        atlases: (1, C, *grid) of each atlas.
        spacings: Voxel edges of each atlas's grid, mm.
        atlas_of: Atlas index of each pair; all pairs of a step share one atlas and thus one grid.
        load: Pair index -> (fixed (1, C, *grid), mask (1, 1, *grid)).
    """

    atlases: Sequence[Tensor]
    spacings: Sequence[Sequence[float]]
    atlas_of: Sequence[int]
    load: Callable[[int], tuple[Tensor, Tensor]]


def fit_network(
    network: RegistrationNetwork,
    training: TrainingPairs,
    config: RegistrationConfig,
    *,
    seed: int,
    device: torch.device,
    precision: str = "auto",
) -> list[float]:
    """Trains the network on all pairs: similarity + smoothness + contrastive term (arXiv 2408.03616).

    Args:
        network: On ``device``.
        training: The pairs.
        config: Weights, iterations, batch size.
        seed: Seed for the order of the pairs.
        device: Device of the network.
        precision: Whether convolutions may run in bfloat16 on a CPU, see `nnunet_oneshot.precision`; integration and
            losses use float32.

    Returns:
        The loss of each iteration.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.network_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(config.network_iterations, 1))
    losses = []
    network.train()
    number = config.network_iterations
    for _ in tracked(range(number), number, "Training the registration network"):
        index = training.atlas_of[int(torch.randint(len(training.atlas_of), (1,), generator=generator))]
        pairs = [pair for pair, atlas in enumerate(training.atlas_of) if atlas == index]
        order = torch.randperm(len(pairs), generator=generator)[: config.network_batch_size]
        batch = [training.load(pairs[i]) for i in order.tolist()]
        fixed, mask = (torch.cat([pair[k] for pair in batch]).to(device) for k in (0, 1))
        atlas = training.atlases[index].to(device).expand(len(batch), -1, *fixed.shape[2:])
        # CPU only: half precision on CUDA needs gradient scaling, which this simple loop does not do.
        with processor_autocast(device, precision):
            velocity, atlas_features, case_features = network(atlas, fixed)
        velocity = velocity.float()
        loss = _pair_loss(velocity, atlas, fixed, mask, training.spacings[index], config)
        if config.contrastive:
            loss = loss + config.contrastive * contrastive_loss(
                atlas_features, case_features, temperature=config.temperature
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist() if losses else []


def coarse_velocity(velocity: Tensor, config: RegistrationConfig) -> Tensor:
    """The network's velocity (B, D, *grid) on the velocity grid, voxels of the registration grid."""
    return downsample(velocity, velocity_shape(velocity.shape[2:], config.velocity_downsample))


def _pair_loss(
    velocity: Tensor, atlas: Tensor, fixed: Tensor, mask: Tensor, spacing: Sequence[float], config: RegistrationConfig
) -> Tensor:
    shape = tuple(fixed.shape[2:])
    warped = warp(atlas, integrate_on(coarse_velocity(velocity, config), shape, steps=config.integration_steps))
    similarity = similarity_loss(warped, fixed, mask, similarity=config.similarity, kernel=config.lncc_kernel)
    return (similarity + config.smoothness * diffusion_energy(velocity, spacing)).mean()
