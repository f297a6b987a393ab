"""``nnunet_oneshot to-dicom``: segmentations as DICOM-SEG, which viewers show over the series they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot import __version__
from nnunet_oneshot.data.dicom_seg import require_highdicom
from nnunet_oneshot.data.drawn_labels import on_grid
from nnunet_oneshot.data.raw import visible_files
from nnunet_oneshot.data.scans import Scan, find_scans, read_scan
from nnunet_oneshot.data.structures import structures
from nnunet_oneshot.data.verify import detail_of
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.volumes import description_of
from nnunet_oneshot.io import atomic_path, writing

_MAY_BE_EMPTY = (
    "AccessionNumber",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyID",
    "StudyTime",
)


def write_dicom_segmentations(
    segmentations: str | os.PathLike, *, scans: str | os.PathLike, out: str | os.PathLike
) -> list[Path]:
    """Writes one DICOM-SEG file a case.

    Args:
        segmentations: Folder of segmentations with ``dataset.json``, as ``nnUNetv2_predict`` leaves it.
        scans: The folder of DICOM series that was imported, so that cases have the same names.
        out: Folder for the files ``CASE.dcm``.

    Returns:
        The files.

    Raises:
        OneShotError: ``highdicom`` is missing, a case has no series, or lies on other voxels than it.
    """
    require_highdicom("DICOM-SEG is to be written")
    folder, target = Path(segmentations), Path(out)
    described = description_of(folder)
    ending = described["file_ending"]
    names = visible_files(folder, ending)
    series = {scan.name: scan for scan in find_scans(scans) if scan.modality is not None}
    cases = [name[: -len(ending)] for name in names]
    missing = [case for case in cases if case not in series]
    if missing or not cases:
        raise OneShotError(
            f"{folder} holds {len(cases)} segmentations that end in {ending}, {len(missing)} of them without a DICOM "
            f"series in {scans}{f', such as {missing[0]}' if missing else ''}: give the folder that was imported."
        )
    written = []
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, case in zip(names, cases, strict=True):
            written.append(target / f"{case}.dcm")
            _write(folder / name, series[case], structures(described), written[-1])
    print(f"Wrote {len(written)} DICOM-SEG files to {target}.")
    return written


def _write(path: Path, scan: Scan, groups: Mapping[str, Any], target: Path) -> None:
    import pydicom
    from highdicom import UID

    highdicom = require_highdicom("DICOM-SEG is to be written")
    files = scan.channels[0]
    try:
        segmentation = sitk.ReadImage(str(path))
        sources = [pydicom.dcmread(file) for file in files]
    # Readers raise whatever the underlying library raises.
    except Exception as error:
        raise OneShotError(f"Case {scan.name}: {path} or its series cannot be read ({detail_of(error)}).") from error
    image = read_scan(files)
    for source in sources:
        # The distance as it is, which headers state wrongly at times.
        source.SpacingBetweenSlices = image.GetSpacing()[2]
        # What DICOM wants to be there, if only empty.
        for name in _MAY_BE_EMPTY:
            if name not in source:
                setattr(source, name, "")
    array = sitk.GetArrayFromImage(on_grid(segmentation, image, str(path), f"the series {scan.source}"))
    masks = np.stack([np.isin(array, np.atleast_1d(values)) for values in groups.values()], axis=-1)
    present = [number for number in range(len(groups)) if masks[..., number].any()]
    if not present:
        raise OneShotError(f"Case {scan.name}: {path} holds background only, which no DICOM-SEG can: remove the file.")
    result = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=masks[..., present].astype(np.uint8),
        segmentation_type="BINARY",
        segment_descriptions=[
            _described(highdicom, number, list(groups)[index]) for number, index in enumerate(present, 1)
        ],
        series_instance_uid=UID(),
        series_number=100,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer="nnunet_oneshot",
        manufacturer_model_name="nnunet_oneshot",
        software_versions=__version__,
        device_serial_number="0",
        series_description="nnunet_oneshot segmentation",
    )
    with atomic_path(target) as temporary:
        result.save_as(temporary)


def _described(highdicom: Any, number: int, name: str) -> Any:
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        # DICOM allows 64 characters.
        segment_label=name[:64],
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="nnunet_oneshot", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
