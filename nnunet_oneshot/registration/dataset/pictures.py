"""The pictures of a dataset's registrations."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nnunet_oneshot.io import atomic_path, writing
from nnunet_oneshot.registration.pair.figure import registration_figure
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import atlas_coordinates, warp_atlas_to_case

_COLOURS = 256


def draw_registration(
    path: Path, registration: Registration, atlas: tuple[np.ndarray, np.ndarray], image: np.ndarray
) -> None:
    """Writes the PNG of a pair; see `nnunet_oneshot.registration.pair.figure`.

    Args:
        path: The file.
        registration: The pair.
        atlas: (C, X, Y, Z) image and (1, X, Y, Z) label map of the atlas.
        image: (C, U, V, W) image of the case.
    """
    from PIL import Image

    atlas_image, seg = atlas
    warped, warped_seg = warp_atlas_to_case(registration, atlas_image, seg)
    figure = registration_figure(
        atlas=atlas_image[0],
        atlas_seg=seg[0],
        case=image[0],
        warped=warped[0],
        warped_seg=warped_seg[0],
        displacement=atlas_coordinates(registration).numpy(),
    )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            # A palette halves the file, and the few colours of a picture fit into it.
            picture = Image.fromarray(figure).quantize(_COLOURS, dither=Image.Dither.NONE)
            picture.save(temporary, optimize=True)
