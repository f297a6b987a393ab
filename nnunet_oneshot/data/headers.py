"""NIfTI headers: where they contradict themselves, and how a written file gets the geometry of another.

A header may give the place of the voxels twice, as ``sform`` (any affine map) and as ``qform`` (a rotation), and the
voxel edges a third time, as ``pixdim``. Libraries choose differently among them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

# Of the shortest voxel edge; rounding of quaternions in float32 stays far below.
_PLACE_TOLERANCE = 0.1
_EDGE_TOLERANCE = 1e-2
# Cosine between two axes.
_SHEAR = 1e-3
_PLACE = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_CARRIED = (*_PLACE, "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units")


def is_nifti(path: str | os.PathLike) -> bool:
    """Whether a file is NIfTI by its name."""
    return str(path).lower().endswith((".nii", ".nii.gz"))


def raw_header(path: str | os.PathLike) -> Any:
    """The header as it stands in the file, which nibabel would correct; None where the file is no NIfTI."""
    if not is_nifti(path):
        return None
    import nibabel
    from nibabel.openers import ImageOpener

    # Any: stubs do not know that the header's class takes part.
    image: Any = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
        return None
    with ImageOpener(str(path)) as file:
        return type(image.header).from_fileobj(file, check=False)


def file_order(path: str | os.PathLike) -> str | None:
    """The directions in which the axes of a NIfTI volume grow, such as ``RAS``; None where it cannot be told."""
    import nibabel

    try:
        image: Any = nibabel.load(path)
        if len(image.shape) < 3 or min(image.shape[:3]) < 2:
            return None
        return "".join(nibabel.aff2axcodes(image.affine))
    # nibabel raises whatever lies beneath it, and names an axis without direction None.
    except Exception:
        return None


def header_notes(path: str, properties: Mapping[str, Any]) -> list[str]:
    """What is contradictory or missing in the header of a NIfTI file, and what the reader made of it.

    Args:
        path: Any image file; other formats give no notes.
        properties: What nnU-Net's reader found in the file.

    Returns:
        Sentences that name the file.
    """
    header = raw_header(path)
    if header is None:
        return []
    notes = []
    edges = np.asarray(header["pixdim"][1:4], float)
    if not np.all(edges > 0):
        notes.append(
            f"{path}: the header gives the voxel edges {_rounded(edges)} mm; 0 is read as 1 mm and a negative edge as "
            f"positive. Correct pixdim."
        )
    codes = int(header["sform_code"]), int(header["qform_code"])
    if max(codes) <= 0:
        notes.append(
            f"{path}: the header tells neither directions nor position (the codes of sform and qform are 0): the order "
            f"of the axes is taken as it is stored. Make sure that it is that of the other files."
        )
        return notes
    if min(codes) > 0 and (note := _forms_note(path, header, properties)):
        notes.append(note)
    if codes[0] > 0:
        notes += _sform_notes(path, header, properties)
    return notes


def carry_geometry(source: str | os.PathLike | None, target: str | os.PathLike) -> None:
    """Gives a NIfTI file the sform, qform and voxel edges of another, so that every library places both alike.

    A form that is missing is set from the other one where it can hold it. Files of other formats stay as they are.

    Args:
        source: The file that was segmented; None, another format or other numbers of voxels give nothing to carry.
        target: The file to change, on the same grid.
    """
    if not is_nifti(target):
        return
    import nibabel

    image: Any = nibabel.load(target)
    header = image.header.copy()
    known = raw_header(source) if source is not None else None
    if known is not None and known.get_data_shape()[:3] == header.get_data_shape()[:3]:
        for field in _CARRIED:
            header[field] = known[field]
    _complete(header)
    voxels = np.asanyarray(image.dataobj)
    changed = type(image)(voxels, None, header)
    for field in _CARRIED:
        changed.header[field] = header[field]
    changed.to_filename(target)


def _complete(header: Any) -> None:
    """Sets the one form whose code is 0 from the other."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if qform > 0 and sform == 0:
        header.set_sform(_qform(header), code=qform)
    elif sform > 0 and qform == 0:
        affine, edges = header.get_sform(), header["pixdim"][1:4].copy()
        if not is_sheared(affine) and np.allclose(np.linalg.norm(affine[:3, :3], axis=0), edges, rtol=1e-4):
            header.set_qform(affine, code=sform)
            header["pixdim"][1:4] = edges


def is_sheared(affine: np.ndarray) -> bool:
    """Whether the axes of a (4, 4) affine map are not perpendicular."""
    axes = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-12)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR)


def _forms_note(path: str, header: Any, properties: Mapping[str, Any]) -> str | None:
    """Says that sform and qform differ, and which one was taken."""
    try:
        forms = {"sform": header.get_sform(), "qform": _qform(header)}
    except ValueError:
        return f"{path}: the qform of the header is no rotation: the sform is taken where the reader knows it."
    shape = header.get_data_shape()
    distance = _distance(forms["sform"], forms["qform"], shape)
    if distance <= _PLACE_TOLERANCE * float(np.linalg.norm(forms["sform"][:3, :3], axis=0).min()):
        return None
    taken = _affine(properties)
    told = "make sure which one is right"
    if taken is not None:
        nearest = min(forms, key=lambda name: _direction_difference(forms[name], taken, shape))
        told = f"here the {nearest} is taken; correct the header if that is wrong"
    return f"{path}: sform and qform of the header place voxels up to {distance:.4g} mm apart: {told}."


def _sform_notes(path: str, header: Any, properties: Mapping[str, Any]) -> list[str]:
    """Says that the sform has other voxel edges than pixdim, or sheared axes."""
    affine = header.get_sform()
    notes = []
    edges, declared = np.linalg.norm(affine[:3, :3], axis=0), np.abs(np.asarray(header["pixdim"][1:4], float))
    shape = header.get_data_shape()
    if len(shape) > 2 and np.all(declared > 0) and not np.allclose(edges, declared, rtol=_EDGE_TOLERANCE):
        spacing = [float(edge) for edge in properties["spacing"]][::-1]
        notes.append(
            f"{path}: the header gives the voxel edges {_rounded(declared)} mm (pixdim), its sform "
            f"{_rounded(edges)} mm: {_rounded(spacing)} mm are taken. Correct the header if that is wrong."
        )
    if is_sheared(affine):
        notes.append(
            f"{path}: the axes of its sform are sheared, not perpendicular; voxels are taken as boxes with the edges "
            f"in the header. Resample the file onto perpendicular axes if the shear matters."
        )
    return notes


def _qform(header: Any) -> np.ndarray:
    """The qform of an uncorrected header."""
    corrected = header.copy()
    edges = np.abs(corrected["pixdim"][1:4])
    corrected["pixdim"][1:4] = np.where(edges == 0, 1, edges)
    if corrected["pixdim"][0] not in (-1, 1):
        corrected["pixdim"][0] = 1
    return corrected.get_qform()


def _affine(properties: Mapping[str, Any]) -> np.ndarray | None:
    """The map from voxels to mm in RAS that a reader took; None where it keeps none, or one of a reordered array."""
    if "sitk_stuff" in properties:
        stuff = properties["sitk_stuff"]
        if len(stuff["origin"]) != 3 or "original_orientation" in stuff:
            return None
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(stuff["direction"], (3, 3)) * np.asarray(stuff["spacing"])
        affine[:3, 3] = stuff["origin"]
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if "nibabel_stuff" in properties:
        return np.asarray(properties["nibabel_stuff"]["original_affine"], float)
    return None


def _direction_difference(form: np.ndarray, taken: np.ndarray, shape: tuple[int, ...]) -> float:
    """Distance of two maps whose edges are made equal: readers take those of pixdim."""
    lengths = np.linalg.norm(form[:3, :3], axis=0), np.linalg.norm(taken[:3, :3], axis=0)
    scaled = form.copy()
    scaled[:3, :3] *= lengths[1] / np.maximum(lengths[0], 1e-12)
    return _distance(scaled, taken, shape)


def _distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance between the places that two maps give to the corners of a grid."""
    sizes = [*shape[:3], 1, 1, 1][:3]
    corners = np.array([[*corner, 1.0] for corner in product(*[(0, size - 1) for size in sizes])]).T
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 4) for value in values]
