"""The result of registering an atlas to a case."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Registration:
    """How an atlas is warped onto a case: warped(p) = atlas(exp(velocity)(affine(p))).

    Attributes:
        atlas: Name of the labelled case.
        case: Name of the unlabelled case.
        affine: (4, 4) float64, case voxel coordinates -> atlas voxel coordinates, array axis order.
        velocity: (3, gx, gy, gz) float32, atlas voxels, on a grid over the atlas's field of view. Along an axis
            where the atlas has one voxel, the component is 0 and the grid has one voxel.
        atlas_shape: Voxels of the preprocessed atlas.
        case_shape: Voxels of the preprocessed case.
        quality: Figures such as ``similarity_before``, ``similarity_after``, ``folding``, ``seconds``.
    """

    atlas: str
    case: str
    affine: np.ndarray
    velocity: np.ndarray
    atlas_shape: tuple[int, ...]
    case_shape: tuple[int, ...]
    quality: dict = field(default_factory=dict)
