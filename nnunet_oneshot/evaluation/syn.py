"""Label propagation by ANTs SyN (antspyx, the extra ``ants``), for comparison."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np

from nnunet_oneshot.errors import OneShotError


def syn_label_probabilities(
    *,
    atlas_image: np.ndarray,
    atlas_segmentation: np.ndarray,
    image: np.ndarray,
    labels: Sequence[int],
    atlas_spacing: Sequence[float],
    spacing: Sequence[float],
    seed: int = 0,
) -> np.ndarray:
    """Registers an atlas to an image with ANTs' ``SyN`` (affine and deformable, default settings) and warps its labels.

    Args:
        atlas_image: (C, X, Y, Z); channels are averaged.
        atlas_segmentation: (1, X, Y, Z).
        image: (C, X, Y, Z), any grid.
        labels: Values that are warped, each as a mask with linear interpolation, as our own warp does it.
        atlas_spacing: Three voxel edges, mm, array axis order.
        spacing: Those of ``image``.
        seed: Of ANTs' random sampling.

    Returns:
        (len(labels), X, Y, Z) float32 in the grid of ``image``.

    Raises:
        OneShotError: antspyx is not installed.
    """
    ants = require_ants()
    ants.config.set_ants_deterministic(on=True, seed_value=seed + 1)
    flat = image.shape[1] == 1 and atlas_image.shape[1] == 1

    def as_ants(volume: np.ndarray, edges: Sequence[float]):
        if flat:
            volume, edges = volume[0], edges[1:]
        return ants.from_numpy(np.ascontiguousarray(volume, dtype=np.float32), spacing=[float(e) for e in edges])

    # ANTs starts from centres of mass, which need weights that are not negative.
    fixed, moving = (
        as_ants(mean - mean.min(), edges)
        for mean, edges in ((image.mean(axis=0), spacing), (atlas_image.mean(axis=0), atlas_spacing))
    )
    warped = []
    with tempfile.TemporaryDirectory(prefix="syn-") as folder:
        # ANTs leaves its transforms behind as files.
        transforms = ants.registration(fixed=fixed, moving=moving, type_of_transform="SyN", outprefix=f"{folder}/")
        for label in labels:
            mask = as_ants((atlas_segmentation[0] == label).astype(np.float32), atlas_spacing)
            result = ants.apply_transforms(
                fixed=fixed, moving=mask, transformlist=transforms["fwdtransforms"], interpolator="linear"
            )
            warped.append(result.numpy()[None] if flat else result.numpy())
    return np.stack(warped).astype(np.float32)


def require_ants():
    """The module ``ants``.

    Raises:
        OneShotError: antspyx is not installed.
    """
    try:
        import ants
    except ImportError as error:
        raise OneShotError(
            "Method syn needs ANTs, which is not installed: run `pip install nnunet_oneshot[ants]`, or leave the "
            "method out."
        ) from error
    return ants
