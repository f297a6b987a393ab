"""Registers one atlas to cases given as arrays: affine map, velocity field and quality figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.affine import SAME_MAP, AffineResult, centre_alignment, register_affine
from nnunet_oneshot.registration.pair.fitting import refine_velocity
from nnunet_oneshot.registration.pair.functional import (
    correlation_window,
    downsample,
    integrate_on,
    inverse_residual,
    jacobian_determinant,
    local_moments,
    masked_mean,
    scale_vectors,
    squared_local_correlation,
    warp,
    without_folds,
)
from nnunet_oneshot.registration.pair.grid import RegistrationGrid
from nnunet_oneshot.registration.pair.label_guide import LabelGuide, guide_shape
from nnunet_oneshot.registration.pair.pyramid import velocity_shape
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.similarities import SIMILARITIES
from nnunet_oneshot.registration.pair.trial import Trial

_QUALITY_STEPS = 7
# Registrations that lead less far apart than this many voxels are one.
_APART = 6
# Margin around the labels within which similarity is also measured, voxels.
_AROUND_LABELS = 3


@dataclass(frozen=True)
class Aligned:
    """A case after the affine stage, on the atlas's registration grid.

    Attributes:
        affine: (D + 1, D + 1), case voxel -> atlas voxel.
        fixed: (1, C, *grid).
        mask: (1, 1, *grid).
        start: Start that led to the affine map; ``"identity"`` means that no optimised map was used, ``"labels"`` that
            a student's labels chose it.
        rival_margin: Share by which images are less alike after a short registration from the best affine map that
            leads elsewhere; 1 where there is none.
        seconds: Time of the affine stage.
    """

    affine: np.ndarray
    fixed: Tensor
    mask: Tensor
    start: str
    rival_margin: float
    seconds: float


class AtlasRegistrar:
    """Registers one atlas to any number of cases.

    Volumes with one voxel along the first axis (nnU-Net's 2D images) are registered in 2D.

    Args:
        name: Name of the atlas.
        atlas: (C, X, Y, Z).
        spacing: 3 voxel edges, mm.
        config: Settings.
        device: Where the deformable stage runs.
        foreground: (1, X, Y, Z) bool, where the atlas has labels; None measures similarity on the whole image only.
    """

    def __init__(
        self,
        name: str,
        atlas: np.ndarray,
        spacing: Sequence[float],
        *,
        config: RegistrationConfig,
        device: torch.device,
        foreground: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self.config = config
        self.device = device
        self.flat = atlas.shape[1] == 1
        self.atlas_shape = tuple(atlas.shape[1:])
        self._atlas = self._squeeze(atlas)
        self._spacing = self._axes(spacing)
        self.grid = RegistrationGrid.over(self._atlas.shape[1:], self._spacing, config.max_voxels)
        self.image = self.grid.atlas_image(self._atlas).to(device)
        self._foreground = None
        if foreground is not None and foreground.any():
            shown = torch.from_numpy(self._squeeze(foreground).astype(np.float32))[None]
            self._foreground = downsample(shown, self.grid.shape).to(device)

    def align(
        self,
        case: np.ndarray,
        spacing: Sequence[float],
        *,
        initial: np.ndarray | None = None,
        known: Registration | None = None,
    ) -> Aligned:
        """The affine stage.

        Args:
            case: (C, U, V, W).
            spacing: 3 voxel edges of the case, mm.
            initial: (4, 4) rigid map case voxel -> atlas voxel to start from, for example from the file headers; None:
                the axes of both volumes point the same way, and their centres are aligned.
            known: An earlier registration of this pair, whose affine map is reused.
        """
        started = time.perf_counter()
        image, edges = self._squeeze(case), self._axes(spacing)
        if initial is not None and self.flat:
            initial = initial[1:, 1:]
        if known is not None:
            affine, start = known.affine[1:, 1:] if self.flat else known.affine, known.quality["affine_start"]
            margin = known.quality.get("rival_margin", 1.0)
        elif self.config.affine:
            affine, start, margin = self._optimised(image, edges, initial)
        else:
            centred = centre_alignment(image.shape[1:], self._atlas.shape[1:], edges, self._spacing)
            affine, start, margin = (centred if initial is None else initial), "identity", 1.0
        return self._aligned(image, affine, start, margin, started)

    def realign(
        self,
        case: np.ndarray,
        spacing: Sequence[float],
        *,
        known: Registration,
        initial: np.ndarray | None = None,
        atlas_maps: np.ndarray,
        probabilities: np.ndarray,
        trust: np.ndarray | None = None,
    ) -> Aligned:
        """The affine stage of a pair whose images alone hardly tell where the atlas lies: labels decide.

        Args:
            case: (C, U, V, W).
            spacing: 3 voxel edges of the case, mm.
            known: The earlier registration of this pair.
            initial: As for `align`.
            atlas_maps: See `guide`.
            probabilities: (K, U, V, W), see `guide`.
            trust: See `guide`.

        Returns:
            Of the known map and those that the affine stage finds, the one with which the atlas's labels agree best
            with the probabilities (mean soft Dice, weighted by the trust). Without any trust, the known one.
        """
        started = time.perf_counter()
        image, edges = self._squeeze(case), self._axes(spacing)
        if initial is not None and self.flat:
            initial = initial[1:, 1:]
        found = self._registered(image, edges, initial)
        before = known.affine[1:, 1:] if self.flat else known.affine
        maps = [before, found.matrix, *found.rivals]
        margin = known.quality.get("rival_margin", 1.0)
        starts = [known.quality["affine_start"], *["labels"] * (len(maps) - 1)]
        candidates = [
            self._aligned(image, affine, start, margin, started) for affine, start in zip(maps, starts, strict=True)
        ]
        guides = [self.guide(atlas_maps, [probabilities], [candidate], trust) for candidate in candidates]
        still = torch.zeros((1, len(self.grid.shape), *self.grid.shape), device=self.device)
        agreement = torch.stack([(guide.say * guide.dice_on(self.grid.shape)(still)[0]).sum() for guide in guides])
        return candidates[int(agreement.argmax())]

    def _aligned(self, image: np.ndarray, affine: np.ndarray, start: str, margin: float, started: float) -> Aligned:
        fixed, mask = self.grid.fixed_image(image, affine)
        return Aligned(affine, fixed, mask, start, margin, time.perf_counter() - started)

    def _registered(self, image: np.ndarray, edges: Sequence[float], initial: np.ndarray | None) -> AffineResult:
        return register_affine(
            image,
            self._atlas,
            fixed_spacing=edges,
            moving_spacing=self._spacing,
            initial=initial,
            metric=SIMILARITIES[self.config.similarity].affine_metric,
            device=self.device,
        )

    def _optimised(
        self, image: np.ndarray, edges: Sequence[float], initial: np.ndarray | None
    ) -> tuple[np.ndarray, str, float]:
        """The affine map, its start and the margin to its best rival; a trial decides between maps that are close."""
        result = self._registered(image, edges, initial)
        if not result.rivals:
            return result.matrix, result.start, 1.0
        maps = [result.matrix, *result.rivals]
        alike, apart = self._trial.compare(image, maps)
        far = apart > max(SAME_MAP, _APART / max(self.grid.shape))
        # The trial decides between places; of maps that lead to one, that with the better objective stays.
        elsewhere_or_first = far[0] | (np.arange(len(maps)) == 0)
        best = int(np.where(elsewhere_or_first, alike, -np.inf).argmax())
        elsewhere = alike[far[best]]
        margin = 1 - elsewhere.max() / max(alike[best], 1e-6) if elsewhere.size else 1.0
        return maps[best], result.start if best == 0 else "rival", float(margin)

    @cached_property
    def _trial(self) -> Trial:
        return Trial(self._atlas, self._spacing, self.config, self.device)

    def guide(
        self,
        atlas_maps: np.ndarray,
        probabilities: Iterable[np.ndarray],
        aligned: Sequence[Aligned],
        trust: np.ndarray | None = None,
    ) -> LabelGuide:
        """Labels that guide the deformable stage of a batch of aligned cases.

        Args:
            atlas_maps: (K + 1, X, Y, Z) masks of the atlas's labels, then of the voxels that are not ignored.
            probabilities: (K, U, V, W) of each case, asked for one after the other.
            aligned: Results of `align`, in the same order.
            trust: Upper limit of each label's weight, (K,), 0 to 1; None is 1 for all.
        """
        shape = guide_shape(self.grid.shape)
        maps = self.grid.fixed_maps(self._squeeze(atlas_maps), np.eye(len(shape) + 1), shape)
        fixed = [
            self.grid.fixed_maps(self._squeeze(p), a.affine, shape) for p, a in zip(probabilities, aligned, strict=True)
        ]
        mask = downsample(torch.cat([a.mask for a in aligned]), shape)
        say = torch.ones(len(atlas_maps) - 1) if trust is None else torch.from_numpy(trust).float()
        return LabelGuide(*(t.to(self.device) for t in (maps[:, :-1], maps[:, -1:], torch.cat(fixed), mask, say)))

    def deform(
        self,
        aligned: Sequence[Aligned],
        cases: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        predict: Callable[[Tensor, Tensor], Tensor] | None = None,
        guide: LabelGuide | None = None,
    ) -> list[Registration]:
        """The deformable stage for a batch of aligned cases.

        Args:
            aligned: Results of `align`.
            cases: Names.
            shapes: (U, V, W) of each case.
            predict: (atlas, fixed) -> velocity (B, D, *velocity grid) of a trained network. Method ``"network"`` uses
                it as the result; ``"network+refine"`` starts the optimisation from it.
            guide: Result of `guide`; None uses images alone.

        Returns:
            One registration per case, with its quality figures.
        """
        started = time.perf_counter()
        fixed = torch.cat([a.fixed for a in aligned]).to(self.device)
        mask = torch.cat([a.mask for a in aligned]).to(self.device)
        atlas = self.image.expand(len(aligned), -1, *self.grid.shape)
        velocity = None if predict is None else predict(atlas, fixed)
        if self.config.method != "network" or velocity is None:
            velocity = refine_velocity(
                self.image, fixed, mask, spacing=self.grid.spacing, config=self.config, initial=velocity, guide=guide
            )
        with torch.no_grad():
            qualities = self._quality(velocity, atlas, fixed, mask)
            if any(quality["jacobian_min"] <= 0 for quality in qualities):
                velocity = without_folds(velocity, self.grid.shape, steps=_QUALITY_STEPS)
                qualities = self._quality(velocity, atlas, fixed, mask)
            if guide is not None:
                for quality, figures in zip(qualities, self._guide_quality(velocity, guide), strict=True):
                    quality.update(figures)
        seconds = (time.perf_counter() - started) / len(aligned)
        in_atlas_voxels = scale_vectors(velocity, self.grid.shape, self.grid.atlas_shape).cpu().numpy()
        return [
            Registration(
                self.name,
                case,
                self._lift_affine(a.affine),
                self._lift_velocity(field),
                self.atlas_shape,
                tuple(int(n) for n in shape),
                {
                    **quality,
                    "affine_start": a.start,
                    "rival_margin": round(a.rival_margin, 6),
                    "seconds": round(a.seconds + seconds, 3),
                },
            )
            for a, case, shape, field, quality in zip(aligned, cases, shapes, in_atlas_voxels, qualities, strict=True)
        ]

    def velocity_grid(self) -> tuple[int, ...]:
        """Shape of the velocity fields."""
        return velocity_shape(self.grid.shape, self.config.velocity_downsample)

    def _quality(self, velocity: Tensor, atlas: Tensor, fixed: Tensor, mask: Tensor) -> list[dict]:
        displacement = integrate_on(velocity, self.grid.shape, steps=_QUALITY_STEPS)
        window = correlation_window(self.config.lncc_kernel, self.grid.shape)
        moments = local_moments(fixed, window)
        before, after = (
            squared_local_correlation(image, fixed, window, moments=moments)
            for image in (atlas, warp(atlas, displacement))
        )
        determinant = jacobian_determinant(displacement).flatten(1)
        edges = torch.tensor(self.grid.spacing, device=displacement.device).view(1, -1, *[1] * len(self.grid.shape))
        length = (displacement * edges).norm(dim=1).flatten(1)
        coarse = velocity.shape[2:]
        coarse_edges = edges * torch.tensor(
            [n / c for n, c in zip(self.grid.shape, coarse, strict=True)], device=displacement.device
        ).view_as(edges)
        residual, inside = inverse_residual(scale_vectors(velocity, self.grid.shape, coarse), steps=_QUALITY_STEPS)
        error = (residual * coarse_edges).norm(dim=1) * inside
        figures = {
            "similarity_before": masked_mean(before, mask),
            "similarity_after": masked_mean(after, mask),
            "folding": (determinant <= 0).float().mean(1),
            "jacobian_min": determinant.min(1).values,
            "jacobian_max": determinant.max(1).values,
            "log_jacobian_std": determinant.clamp_min(1e-3).log().std(1),
            "mean_displacement_mm": length.mean(1),
            "max_displacement_mm": length.max(1).values,
            "inverse_consistency_mm": error.flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1),
            "inverse_consistency_max_mm": error.flatten(1).max(1).values,
            "observed": mask.flatten(1).mean(1),
        }
        if self._foreground is not None:
            labels = warp(self._foreground.expand(len(fixed), -1, *self.grid.shape), displacement)
            figures["similarity_at_labels"] = masked_mean(after, mask * _around(labels))
        # Fetched from the device at once.
        values = torch.stack(list(figures.values()), dim=1).tolist()
        return [{name: round(v, 6) for name, v in zip(figures, own, strict=True)} for own in values]

    def _guide_quality(self, velocity: Tensor, guide: LabelGuide) -> list[dict]:
        displacement = integrate_on(velocity, self.grid.shape, steps=_QUALITY_STEPS)
        agreement = guide.agreement_on(self.grid.shape)
        figures = zip(agreement(torch.zeros_like(displacement)), agreement(displacement), strict=True)
        return [{"guide_dice_before": round(float(b), 6), "guide_dice_after": round(float(a), 6)} for b, a in figures]

    def _squeeze(self, image: np.ndarray) -> np.ndarray:
        return image[:, 0] if self.flat else image

    def _axes(self, spacing: Sequence[float]) -> tuple[float, ...]:
        return tuple(float(s) for s in (spacing[1:] if self.flat else spacing))

    def _lift_affine(self, affine: np.ndarray) -> np.ndarray:
        if not self.flat:
            return affine
        lifted = np.eye(4)
        lifted[1:, 1:] = affine
        return lifted

    def _lift_velocity(self, velocity: np.ndarray) -> np.ndarray:
        if not self.flat:
            return velocity
        return np.concatenate([np.zeros_like(velocity[:1]), velocity])[:, None]


def _around(foreground: Tensor) -> Tensor:
    """Mask (B, 1, *grid) of voxels within `_AROUND_LABELS` voxels, along every axis, of foreground above 0.5."""
    pool = F.max_pool2d if foreground.ndim == 4 else F.max_pool3d
    grown = pool(foreground, 2 * _AROUND_LABELS + 1, stride=1, padding=_AROUND_LABELS)
    return (grown > 0.5).to(foreground.dtype)


def register_arrays(
    atlas: np.ndarray,
    case: np.ndarray,
    *,
    atlas_spacing: Sequence[float],
    case_spacing: Sequence[float],
    initial: np.ndarray | None = None,
    guide: tuple[np.ndarray, np.ndarray] | None = None,
    config: RegistrationConfig | None = None,
    device: torch.device | str = "cpu",
    atlas_labels: np.ndarray | None = None,
) -> Registration:
    """Registers one volume to another, without any nnU-Net folder.

    Args:
        atlas: (C, X, Y, Z) moving image; (C, 1, Y, Z) for 2D.
        case: (C, U, V, W) fixed image, on any grid.
        atlas_spacing: 3 voxel edges of the atlas, mm.
        case_spacing: 3 voxel edges of the case, mm.
        initial: (4, 4) rigid map case voxel -> atlas voxel to start from; see `AtlasRegistrar.align`.
        guide: Maps of the atlas (K + 1, X, Y, Z) and of the case (K, U, V, W), see `AtlasRegistrar.guide`.
        config: Settings; None for the defaults.
        device: Where the deformable stage runs.
        atlas_labels: (1, X, Y, Z) label map of the atlas; adds the similarity around the labels to the quality
            figures. It does not change the registration.

    Returns:
        The registration; `nnunet_oneshot.registration.pair.warp` applies it.
    """
    registrar = AtlasRegistrar(
        "moving",
        atlas,
        atlas_spacing,
        config=config or RegistrationConfig(method="refine"),
        device=torch.device(device),
        foreground=None if atlas_labels is None else atlas_labels > 0,
    )
    aligned = registrar.align(case, case_spacing, initial=initial)
    labels = None if guide is None else registrar.guide(guide[0], [guide[1]], [aligned])
    return registrar.deform([aligned], ["fixed"], [case.shape[1:]], guide=labels)[0]
