"""Pure tensor functions on grids, coordinates, displacements and velocity fields.

Vocabulary:
    voxel coordinates: float index coordinates in array axis order; the centre of the first voxel is 0.
    displacement: (B, D, *grid), in voxels of a named grid, array axis order; a location p is read at p + u(p).
    velocity: a stationary velocity field of the same layout; exp(v) is its flow at time 1.
    warp: pull-back; the output at p is the input at phi(p), with phi the map of the displacement.

D is the number of spatial axes, 2 or 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@lru_cache(maxsize=256)
def constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Few numbers on a device, which are copied there once: each copy would interrupt the GPU. Not to be changed."""
    # Also for those who ask next and want gradients.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def identity_grid(shape: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Voxel coordinates of every voxel, (D, *shape) float32."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def sample_at(volume: Tensor, coordinates: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Reads a volume at voxel coordinates.

    Args:
        volume: (B, C, *in).
        coordinates: (B, D, *out), voxel coordinates of ``volume``.
        mode: ``"bilinear"`` (linear in every axis) or ``"nearest"``.
        padding: Outside the volume: ``"border"`` (nearest voxel) or ``"zeros"``.

    Returns:
        (B, C, *out).
    """
    dim = coordinates.shape[1]
    sizes = constants(tuple(volume.shape[2:]), coordinates.dtype, coordinates.device)
    scale = (2.0 / sizes).view(1, dim, *[1] * dim)
    normalised = (coordinates + 0.5) * scale - 1.0
    grid = normalised.flip(1).movedim(1, -1)
    return F.grid_sample(volume, grid.to(volume.dtype), mode=mode, padding_mode=padding, align_corners=False)


def transform_points(affine: Tensor, points: Tensor) -> Tensor:
    """Applies a homogeneous affine.

    Args:
        affine: (D + 1, D + 1) or (B, D + 1, D + 1), acting on voxel coordinates.
        points: (B, D, *out).

    Returns:
        (B, D, *out).
    """
    if affine.ndim == 2:
        affine = affine[None].expand(points.shape[0], -1, -1)
    dim = points.shape[1]
    flat = points.reshape(points.shape[0], dim, -1)
    moved = affine[:, :dim, :dim] @ flat + affine[:, :dim, dim:]
    return moved.reshape(points.shape)


def resize(field: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear resize of (B, C, *grid) to (B, C, *shape) over the same field of view; values are not rescaled."""
    if tuple(field.shape[2:]) == tuple(shape):
        return field
    return F.interpolate(field, size=tuple(shape), mode=_LINEAR[field.ndim - 2], align_corners=False)


def downsample(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Area average of (B, C, *grid) onto (B, C, *shape): each voxel is the mean of the area it covers.

    Partly covered voxels count by their share; where sizes do not divide, adaptive pooling would round to whole voxels.
    """
    if all(size % target == 0 for size, target in zip(image.shape[2:], shape, strict=True)):
        if image.ndim == 4:
            return F.adaptive_avg_pool2d(image, (shape[0], shape[1]))
        return F.adaptive_avg_pool3d(image, (shape[0], shape[1], shape[2]))
    for axis, target in enumerate(shape, start=2):
        if image.shape[axis] != target:
            weights = _area_weights(image.shape[axis], target).to(image)
            image = torch.tensordot(image, weights, dims=([axis], [0])).movedim(-1, axis)
    return image


@lru_cache(maxsize=256)
def _area_weights(size: int, target: int) -> Tensor:
    """(size, target), the share of each coarse cell that each fine cell fills; columns sum to 1."""
    edges = torch.arange(target + 1, dtype=torch.float64) * (size / target)
    lower = torch.arange(size, dtype=torch.float64)[:, None]
    overlap = torch.minimum(edges[1:], lower + 1) - torch.maximum(edges[:-1], lower)
    return (overlap.clamp_min(0) / (size / target)).float()


def scale_vectors(field: Tensor, source: Sequence[int], target: Sequence[int]) -> Tensor:
    """Converts vectors (B, D, *any) from voxels of a grid of shape ``source`` to voxels of a grid of shape ``target``
    over the same field of view."""
    factors = tuple(t / s for s, t in zip(source, target, strict=True))
    return field * constants(factors, field.dtype, field.device).view(1, -1, *[1] * (field.ndim - 2))


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Displacement of the map p -> q = p + second(p) -> q + first(q), all (B, D, *grid) in voxels of the grid."""
    points = identity_grid(first.shape[2:], device=first.device)[None] + second
    return second + sample_at(first, points)


def integrate_velocity(velocity: Tensor, *, steps: int = 5) -> Tensor:
    """Displacement of exp(velocity) by scaling and squaring (Arsigny et al., MICCAI 2006).

    Args:
        velocity: (B, D, *grid), voxels of the grid.
        steps: Number of squarings.

    Returns:
        Displacement (B, D, *grid), voxels of the grid.
    """
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement)
    return displacement


def integrate_on(velocity: Tensor, shape: Sequence[int], *, steps: int = 5) -> Tensor:
    """Displacement of exp(velocity) for a velocity on a coarser grid over the same field of view.

    Args:
        velocity: (B, D, *coarse), voxels of the grid of shape ``shape``.
        shape: Grid of the returned displacement, whose voxels are also the unit of ``velocity``.
        steps: Number of squarings.

    Returns:
        Displacement (B, D, *shape), voxels of the grid of shape ``shape``.
    """
    coarse = velocity.shape[2:]
    displacement = integrate_velocity(scale_vectors(velocity, shape, coarse), steps=steps)
    return resize(scale_vectors(displacement, coarse, shape), shape)


def inverse_residual(velocity: Tensor, *, steps: int = 7) -> tuple[Tensor, Tensor]:
    """Deviation of exp(-v) o exp(v) from the identity; 0 if a resolved field is integrated exactly.

    Args:
        velocity: (B, D, *grid), voxels of the grid.
        steps: Number of squarings.

    Returns:
        Displacement of the composition (B, D, *grid), voxels, and a mask (B, *grid) that is 1 where exp(v) stays within
        the grid: outside it the field is unknown, and the residual is meaningless.
    """
    forward, backward = integrate_velocity(velocity, steps=steps), integrate_velocity(-velocity, steps=steps)
    reached = identity_grid(velocity.shape[2:], device=velocity.device)[None] + forward
    last = torch.tensor(velocity.shape[2:], device=velocity.device).view(1, -1, *[1] * (velocity.ndim - 2)) - 1
    inside = ((reached >= 0) & (reached <= last)).all(1).to(velocity.dtype)
    return compose(backward, forward), inside


def warp(volume: Tensor, displacement: Tensor, *, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Pull-back of (B, C, *grid) by a displacement (B, D, *grid) in voxels of the same grid."""
    points = identity_grid(displacement.shape[2:], device=displacement.device)[None] + displacement
    return sample_at(volume, points, mode=mode, padding=padding)


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of the Jacobian of p + u(p) by central differences.

    Args:
        displacement: (B, D, *grid), voxels of the grid; every axis has at least 2 voxels.

    Returns:
        (B, *grid); values <= 0 are folds.
    """
    dim = displacement.shape[1]
    columns = torch.gradient(displacement.float(), dim=tuple(range(2, 2 + dim)))
    # j[i][k] is d (p + u)_i / d p_k. Cofactors take a tenth of the time of a matrix decomposition per voxel.
    j = [[columns[k][:, i] + float(i == k) for k in range(dim)] for i in range(dim)]
    if dim == 2:
        return j[0][0] * j[1][1] - j[0][1] * j[1][0]
    first, *others = (
        j[0][k] * (j[1][m] * j[2][n] - j[1][n] * j[2][m]) for k, m, n in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    )
    return sum(others, first)


def folding(displacement: Tensor) -> Tensor:
    """Share of voxels whose Jacobian determinant is <= 0, (B,)."""
    return (jacobian_determinant(displacement) <= 0).flatten(1).float().mean(1)


def without_folds(velocity: Tensor, shape: Sequence[int], *, steps: int = 7, rounds: int = 20) -> Tensor:
    """Smooths velocity fields only where their flows fold, until no fold is left, at most ``rounds`` times.

    The exact flow of a velocity field does not fold, but its approximation on a grid does where the field varies too
    strongly between neighbouring voxels.

    Args:
        velocity: (B, D, *coarse), voxels of the grid of shape ``shape``.
        shape: The grid on which folds are detected.
        steps: Number of squarings.
        rounds: Largest number of smoothings.

    Returns:
        (B, D, *coarse); ``velocity`` itself where nothing folds.
    """
    for _ in range(rounds):
        folds = (jacobian_determinant(integrate_on(velocity, shape, steps=steps)) <= 0)[:, None].to(velocity.dtype)
        if not folds.any():
            break
        # The velocity at a voxel also affects the flow around it, and any share of folds in a coarse voxel counts.
        around = (box_mean(downsample(folds, velocity.shape[2:]), 5) > 0).to(velocity.dtype)
        velocity = torch.lerp(velocity, box_mean(velocity, 3), box_mean(around, 3))
    return velocity


def box_mean(image: Tensor, window: int) -> Tensor:
    """Mean over a cube of ``window`` voxels (odd) around each voxel of (B, C, *grid); border voxels are repeated."""
    dim = image.ndim - 2
    return _BoxSum.apply(F.pad(image, [window // 2] * 2 * dim, "replicate"), window) / window**dim


class _BoxSum(torch.autograd.Function):
    """Sums over cubes that lie within (B, C, *grid); the gradient is again such a sum."""

    @staticmethod
    def forward(ctx, image: Tensor, window: int) -> Tensor:
        ctx.window = window
        return _box_sum(image, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        margin = [ctx.window - 1] * 2 * (gradient.ndim - 2)
        return _box_sum(F.pad(gradient, margin), ctx.window), None


def _box_sum(image: Tensor, window: int) -> Tensor:
    for axis in range(2, image.ndim):
        length = image.shape[axis] - window + 1
        # Adding shifted copies is several times cheaper than a convolution.
        image = sum((image.narrow(axis, k, length) for k in range(1, window)), start=image.narrow(axis, 0, length))
    return image


def local_moments(image: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, each (B, C, *grid), of an image in a cube of ``window`` voxels (odd) around each voxel."""
    mean, square = box_mean(torch.cat([image, image * image], dim=1), window).chunk(2, dim=1)
    return mean, (square - mean * mean).clamp_min(0)


def squared_local_correlation(
    first: Tensor, second: Tensor, window: int, *, moments: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Squared normalised cross-correlation in a cube around each voxel (Avants et al., MedIA 2008).

    Args:
        first: (B, C, *grid) float32; gradients flow through it.
        second: (B, C, *grid) float32.
        window: Edge of the cube, odd, voxels.
        moments: `local_moments` of ``second``, if already computed.

    Returns:
        (B, C, *grid) from 0 to 1; 0 where either is constant.
    """
    mean_2, variance_2 = local_moments(second, window) if moments is None else moments
    averages = box_mean(torch.cat([first, first * first, first * second], dim=1), window)
    mean_1, square_1, product = averages.chunk(3, dim=1)
    covariance = product - mean_1 * mean_2
    variance_1 = (square_1 - mean_1 * mean_1).clamp_min(0)
    return covariance * covariance / (variance_1 * variance_2 + 1e-5)


def correlation_window(kernel: int, shape: Sequence[int]) -> int:
    """Edge of the local correlation window on a grid: odd, no longer than any axis, but at least 3."""
    window = min([kernel, *shape])
    return max(window - 1 + window % 2, 3)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each sample of (B, C, *grid), (B,), over voxels where the mask (B, 1, *grid) is 1; None is all voxels."""
    if mask is None:
        return values.flatten(1).mean(1)
    weights = mask.float().expand_as(values)
    return (values * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1.0)


def diffusion_energy(velocity: Tensor, spacing: Sequence[float]) -> Tensor:
    """Mean squared first derivative of a field in physical units, so that all axes of anisotropic voxels count equally.

    Args:
        velocity: (B, D, *grid), voxels of the grid; every axis has at least 2 voxels.
        spacing: D voxel edges of the grid, mm.

    Returns:
        (B,): mean over voxels of the sum over components i and axes j of (d v_i [mm] / d x_j [mm])^2.
    """
    dim = velocity.shape[1]
    edges = constants(tuple(spacing), velocity.dtype, velocity.device).view(1, dim, *[1] * dim)
    energy = velocity.new_zeros(len(velocity))
    for axis in range(dim):
        difference = torch.diff(velocity, dim=2 + axis) * edges / float(spacing[axis])
        energy = energy + (difference**2).sum(1).flatten(1).mean(1)
    return energy


def contrastive_loss(atlas_features: Tensor, case_features: Tensor, *, temperature: float = 0.1) -> Tensor:
    """NT-Xent between pooled features of the atlas and of the cases of a batch (arXiv 2408.03616, registration).

    For case i the positive is its atlas; the negatives are the other cases of the batch.

    Args:
        atlas_features: (B, F) features of the atlas of each pair.
        case_features: (B, F) features of the case of each pair.
        temperature: Softmax temperature.

    Returns:
        Scalar; 0 for a batch of one pair, which has no negatives.
    """
    atlas_features = F.normalize(atlas_features.float(), dim=1)
    case_features = F.normalize(case_features.float(), dim=1)
    positive = (atlas_features * case_features).sum(1, keepdim=True)
    negatives = case_features @ case_features.T
    size = len(negatives)
    # What is not on the diagonal, as rows: without its first element, the diagonal is every size + 1-th.
    others = negatives.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)
    logits = torch.cat([positive, others], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
