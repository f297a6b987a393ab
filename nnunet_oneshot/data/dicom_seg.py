"""DICOM segmentation objects, by ``highdicom`` (``pip install "nnunet_oneshot[dicom]"``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.data.verify import detail_of
from nnunet_oneshot.errors import OneShotError


def read_dicom_seg(path: str) -> tuple[sitk.Image, dict[int, str]]:
    """Reads a DICOM-SEG file as a label map.

    Args:
        path: The file.

    Returns:
        The label map, whose values are the numbers of the segments, and the names of the segments.

    Raises:
        OneShotError: The package is missing, or the file cannot be read as one label map, such as where segments
            overlap.
    """
    highdicom = require_highdicom(f"{path} is a DICOM segmentation")
    try:
        segmentation = highdicom.seg.segread(path)
        volume = segmentation.get_volume(combine_segments=True, dtype=np.int16)
        names = {
            int(number): str(segmentation.get_segment_description(number).segment_label)
            for number in segmentation.segment_numbers
        }
    # highdicom raises whatever the content of the file leads to.
    except Exception as error:
        raise OneShotError(
            f"{path} cannot be read as a label map ({detail_of(error)}): save it as NIfTI or NRRD from the program "
            f"that drew it."
        ) from error
    return volume.to_simpleitk(), names


def require_highdicom(why: str) -> Any:
    """The package ``highdicom``.

    Args:
        why: Why it is needed, the beginning of the error.

    Raises:
        OneShotError: It is not installed.
    """
    try:
        import highdicom
        import highdicom.seg
    except ImportError as error:
        raise OneShotError(f'{why}, which needs highdicom: pip install "nnunet_oneshot[dicom]".') from error
    return highdicom
