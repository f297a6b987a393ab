"""Registration of files: any grid and orientation, results that SimpleITK reproduces, and clear errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.spatial.transform import Rotation
from tiny_volumes import blobs

from nnunet_oneshot.cli import main
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.files.register_pair import quality_warnings, register_pair, register_volumes
from nnunet_oneshot.registration.files.volumes import header_alignment, read_labels, read_volume

QUICK = RegistrationConfig(refine_iterations=(15, 10))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_image(array, spacing=None, direction=None, origin=None):
    """Spacing, direction (D x D) and origin are SimpleITK's, in the order x, y, z."""
    image = sitk.GetImageFromArray(np.asarray(array, np.float32))
    if spacing is not None:
        image.SetSpacing([float(s) for s in spacing])
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    if origin is not None:
        image.SetOrigin([float(o) for o in origin])
    return image


def centred(array, spacing, direction, centre):
    """An image whose middle lies at ``centre``, mm."""
    dim = array.ndim
    middle = np.asarray(direction) @ (np.asarray(spacing) * (np.array(array.shape[::-1]) - 1) / 2)
    return make_image(array, spacing, np.asarray(direction).reshape(dim, dim), np.asarray(centre) - middle)


def body(size=48):
    """A scene of 48 mm in patient space, without symmetry."""
    array = blobs((size,) * 3)[0]
    array[28:36, 14:20, 10:20] += 3
    array[12:18, 26:34, 26:30] -= 3
    return centred(array, (1, 1, 1), np.eye(3), (0, 0, 0))


def scanned(scene, shape, spacing, direction, centre, transform=None):
    """The scene on another grid; ``transform`` maps points of the grid to points of the scene."""
    grid = centred(np.zeros(shape, np.float32), spacing, direction, centre)
    return sitk.Resample(scene, grid, transform or sitk.Transform(), sitk.sitkLinear, 0.0)


def write(path, image):
    sitk.WriteImage(image, str(path))
    return str(path)


def resampled_by_sitk(out: Path, fixed, moving, default, interpolator=sitk.sitkLinear):
    field = sitk.Cast(sitk.ReadImage(str(out / "displacement.nii.gz")), sitk.sitkVectorFloat64)
    transform = sitk.DisplacementFieldTransform(field)
    return sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, interpolator, default, sitk.sitkFloat32))


def assert_sitk_agrees(out, fixed, moving):
    """Everywhere but at the rim of the moving image, where rounding decides what was observed."""
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "warped.nii.gz")))
    array = sitk.GetArrayFromImage(moving)
    theirs = resampled_by_sitk(out, fixed, moving, float(array.min()))
    different = np.abs(ours - theirs) > 1e-3 * np.ptp(array)
    assert different.mean() < 2e-3
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


OBLIQUE = Rotation.from_euler("zyx", [25, -15, 10], degrees=True).as_matrix()
SAGITTAL = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])


@pytest.mark.parametrize(
    ("fixed_direction", "moving_direction"),
    [(np.eye(3), np.eye(3)), (np.eye(3), OBLIQUE), (OBLIQUE.T, SAGITTAL), (np.diag([-1, -1, 1]), SAGITTAL @ OBLIQUE)],
)
def test_sitk_reproduces_the_warped_image_across_grids_and_directions(tmp_path, fixed_direction, moving_direction):
    scene = body()
    fixed = scanned(scene, (20, 24, 28), (1.5, 1.6, 1.8), fixed_direction, (2, -1, 1))
    moving = scanned(scene, (26, 22, 19), (1.4, 1.7, 2.0), moving_direction, (-1, 2, 0))
    result = register_pair(
        write(tmp_path / "f.nii.gz", fixed), write(tmp_path / "m.nii.gz", moving), out=tmp_path / "out", config=QUICK
    )
    assert_sitk_agrees(tmp_path / "out", fixed, moving)
    # Both show one scene, so registration has nothing to move in patient space.
    inside = ~result.outside()
    assert np.linalg.norm(result.displacement_mm()[inside], axis=1).mean() < 1.0
    assert result.quality["similarity_after"] > 0.5


def test_a_known_motion_is_found_across_directions(tmp_path):
    scene = body()
    motion = sitk.Euler3DTransform((0, 0, 0), 0.08, -0.05, 0.1, (3.0, -2.0, 1.5))
    fixed = scanned(scene, (24, 24, 24), (1.8, 1.8, 1.8), np.eye(3), (0, 0, 0), motion)
    moving = scanned(scene, (26, 24, 22), (1.7, 1.9, 2.0), OBLIQUE, (1, 0, -1))
    result = register_pair(
        write(tmp_path / "f.nii.gz", fixed), write(tmp_path / "m.mha", moving), out=tmp_path / "out", config=QUICK
    )
    middle = np.array(result.displacement_mm()[6:-6, 6:-6, 6:-6]).reshape(-1, 3)
    points = [
        fixed.TransformIndexToPhysicalPoint((i, j, k)) for k in range(6, 18) for j in range(6, 18) for i in range(6, 18)
    ]
    expected = np.array([np.subtract(motion.TransformPoint(point), point) for point in points])
    assert np.linalg.norm(middle - expected, axis=1).mean() < 1.2
    assert result.quality["similarity_after"] > result.quality["similarity_before"]


def test_positions_far_apart_are_bridged_by_the_centres(tmp_path):
    scene = body()
    fixed = scanned(scene, (20, 20, 20), (2, 2, 2), np.eye(3), (0, 0, 0))
    moving = scanned(scene, (20, 20, 20), (2, 2, 2), OBLIQUE, (0, 0, 0))
    moving.SetOrigin(np.add(moving.GetOrigin(), (900, -700, 400)).tolist())
    files = write(tmp_path / "f.nii.gz", fixed), write(tmp_path / "m.nii.gz", moving)
    result = register_pair(*files, out=tmp_path / "out", config=QUICK)
    assert result.quality["start"] == "centres"
    assert_sitk_agrees(tmp_path / "out", fixed, moving)
    assert np.allclose(result.displacement_mm()[5:-5, 5:-5, 5:-5].mean((0, 1, 2)), (900, -700, 400), atol=1.5)


def test_labels_follow_the_image_and_are_background_where_nothing_was_observed(tmp_path):
    scene = body()
    fixed = scanned(scene, (22, 22, 30), (2, 2, 2), np.eye(3), (0, 0, 0))
    moving = scanned(scene, (22, 22, 16), (2, 2, 2), np.eye(3), (0, 0, 0))
    labels = sitk.Cast(moving > 1.0, sitk.sitkUInt16) * 2035
    result = register_pair(
        write(tmp_path / "f.nii.gz", fixed),
        write(tmp_path / "m.nii.gz", moving),
        labels=write(tmp_path / "l.nii.gz", labels),
        out=tmp_path / "out",
        config=QUICK,
    )
    warped = sitk.ReadImage(str(tmp_path / "out" / "warped_labels.nii.gz"))
    array = sitk.GetArrayFromImage(warped)
    assert array.dtype == np.uint16
    assert set(np.unique(array)) == {0, 2035}
    assert not array[..., :5].any()
    assert result.quality["overlap"] < 0.75
    expected = resampled_by_sitk(tmp_path / "out", fixed, labels, 0.0, sitk.sitkLabelLinear)
    assert (array != expected).mean() < 0.01


def test_2d_images_of_unequal_size(tmp_path):
    moving = blobs((40, 36))[0]
    fixed = make_image(np.roll(moving, (2, -2), (0, 1))[3:, :34], (0.8, 0.8), origin=(5, 3))
    angle = 0.3
    rotation = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    moving = make_image(moving, (0.8, 0.8), rotation, (6, 1))
    files = write(tmp_path / "f.mha", fixed), write(tmp_path / "m.mha", moving)
    register_pair(*files, out=tmp_path / "out", config=QUICK)
    field = sitk.ReadImage(str(tmp_path / "out" / "displacement.nii.gz"))
    assert field.GetDimension() == 2
    assert field.GetNumberOfComponentsPerPixel() == 2
    assert_sitk_agrees(tmp_path / "out", fixed, moving)


def test_pictures_and_single_slices(tmp_path):
    array = blobs((24, 20))[0]
    grey = np.interp(array, (array.min(), array.max()), (0, 255)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(grey), str(tmp_path / "a.png"))
    register_pair(str(tmp_path / "a.png"), str(tmp_path / "a.png"), out=tmp_path / "png", config=QUICK)
    slices = make_image(array[None], (1, 1, 5), np.diag([-1, 1, -1]), (3, 4, 5))
    other = make_image(array[None], (1, 1, 3), origin=(-16, 4, 40))
    files = write(tmp_path / "s.nii.gz", slices), write(tmp_path / "o.nii.gz", other)
    register_pair(*files, out=tmp_path / "slice", config=QUICK)
    assert_sitk_agrees(tmp_path / "slice", slices, other)
    tilted = make_image(array[None], (1, 1, 5), SAGITTAL)
    with pytest.raises(OneShotError, match="different planes"):
        register_pair(files[0], write(tmp_path / "t.nii.gz", tilted), out=tmp_path / "tilted")


def test_channels_are_joined_by_commas_and_written_apart(tmp_path):
    names = [write(tmp_path / f"{name}.nii.gz", make_image(blobs((14, 12, 13), i)[0])) for i, name in enumerate("ab")]
    register_pair(",".join(names), names, out=tmp_path / "out", config=QUICK)
    for channel, name in enumerate(names):
        warped = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"warped_{channel:04d}.nii.gz")))
        assert np.corrcoef(warped.ravel(), sitk.GetArrayFromImage(sitk.ReadImage(name)).ravel())[0, 1] > 0.98
    with pytest.raises(OneShotError, match="2 channel.*1 "):
        register_pair(names, names[0], out=tmp_path / "other")


def test_command_writes_complete_results(tmp_path, capsys):
    files = [write(tmp_path / f"{i}.nii.gz", make_image(blobs((12, 14, 16), i)[0], (1, 2, 1))) for i in range(2)]
    labels = write(tmp_path / "l.nii.gz", sitk.Cast(sitk.ReadImage(files[1]) > 1, sitk.sitkUInt8))
    assert main(["register-pair", *files, "--labels", labels, "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "displacement.nii.gz",
        "figure.png",
        "quality.json",
        "warped.nii.gz",
        "warped_labels.nii.gz",
    ]
    quality = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert quality["seconds"] > 0
    assert quality["peak_memory_mib"] > 10
    assert 0 <= quality["folding"] < 1e-3
    assert quality["similarity_before"] <= quality["similarity_after"] <= 1
    assert "local correlation" in capsys.readouterr().out
    # The results of an earlier run stay.
    assert main(["register-pair", *files, "-o", str(tmp_path / "out")]) == 1
    assert "not empty" in capsys.readouterr().err


def _nan(path):
    array = blobs((12, 12, 12))[0]
    array[0, 0, 0] = np.nan
    return write(path, make_image(array))


def _truncated(path):
    write(path, make_image(blobs((12, 12, 12))[0]))
    path.write_bytes(path.read_bytes()[:700])
    return str(path)


def _sheared(path):
    affine = np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(blobs((12, 12, 12))[0].astype(np.float32), affine), path)
    return str(path)


def _empty(path):
    path.write_bytes(b"")
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: str(path), "does not exist"),
        (_sheared, "sheared"),
        (_empty, "cannot be used"),
        (lambda path: write(path, make_image(np.ones((12, 12, 12)))), "same value"),
        (_nan, "NaN or infinite"),
        (_truncated, "cannot be used"),
        (lambda path: write(path, make_image(blobs((12, 12))[0])), "2D image and a volume"),
        (lambda path: write(path, make_image(np.zeros((2, 9, 1, 9)))), "at least 2 pixels|4 axes"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, make, message):
    fixed = write(tmp_path / "fixed.nii.gz", make_image(blobs((12, 12, 12))[0]))
    with pytest.raises(OneShotError, match=message):
        register_pair(fixed, make(tmp_path / "bad.nii.gz"), out=tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".partial", "out"))]


def test_labels_on_another_grid_are_refused(tmp_path):
    image = write(tmp_path / "i.nii.gz", make_image(blobs((12, 12, 12))[0]))
    for number, labels in enumerate(
        [
            make_image(np.zeros((11, 12, 12))),
            make_image(np.zeros((12,) * 3), (1, 1, 2)),
            make_image(np.full((12,) * 3, 0.5)),
        ]
    ):
        path = write(tmp_path / f"l{number}.nii.gz", labels)
        with pytest.raises(OneShotError, match=f"l{number}.nii.gz.*(size|spacing|whole numbers)"):
            register_pair(image, image, labels=path, out=tmp_path / "out")


def test_labels_in_colours_and_empty_ones_are_refused(tmp_path):
    image = write(tmp_path / "i.nii.gz", make_image(blobs((12, 12, 12))[0]))
    empty = write(tmp_path / "e.nii.gz", make_image(np.zeros((12, 12, 12))))
    with pytest.raises(OneShotError, match="e.nii.gz is empty"):
        register_pair(image, image, labels=empty, out=tmp_path / "out")
    colours = sitk.Compose([sitk.ReadImage(image)] * 3)
    with pytest.raises(OneShotError, match="3 channels, such as colours"):
        register_pair(image, image, labels=write(tmp_path / "c.nii.gz", colours), out=tmp_path / "out")


def test_labels_that_are_nearly_whole_numbers_are_those(tmp_path):
    image = write(tmp_path / "i.nii.gz", make_image(blobs((12, 12, 12))[0]))
    nearly = write(tmp_path / "l.nii.gz", make_image(np.full((12,) * 3, 1.9995)))
    labels, _ = read_labels(nearly, read_volume(image, "moving"))
    assert set(np.unique(labels)) == {2}


def test_results_have_the_header_of_the_fixed_file_and_contradictions_are_told(tmp_path):
    image = nibabel.Nifti1Image(blobs((12, 13, 14))[0].astype(np.float32), np.eye(4))
    image.header.set_sform(np.eye(4), code=3)
    image.header.set_qform(np.array([[-1.0, 0, 0, 4], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), code=1)
    path = str(tmp_path / "i.nii.gz")
    nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header).to_filename(path)
    said = []
    labels = write(tmp_path / "l.nii.gz", sitk.Cast(sitk.ReadImage(path) > 0, sitk.sitkUInt8))
    register_pair(path, path, labels=labels, out=tmp_path / "out", config=QUICK, log=said.append)
    assert any("Warning" in line and "sform and qform" in line for line in said)
    for name in ("warped", "warped_labels"):
        written = tmp_path / "out" / f"{name}.nii.gz"
        assert np.allclose(nibabel.load(written).affine, np.eye(4))
        places = [sitk.ReadImage(str(one)) for one in (path, written)]
        assert places[0].GetOrigin() == pytest.approx(places[1].GetOrigin())
        assert places[0].GetDirection() == pytest.approx(places[1].GetDirection())


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    image = write(tmp_path / "i.nii.gz", make_image(blobs((12, 12, 12))[0]))

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nnunet_oneshot.registration.files.register_pair.registration_figure", fail)
    with pytest.raises(OneShotError, match="No space left"):
        register_pair(image, image, out=tmp_path / "out", config=QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["i.nii.gz"]


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(OneShotError, match="not available"):
        register_pair("a.nii.gz", "b.nii.gz", out=tmp_path / "out", device="abacus")


def test_arrays_without_contrast_stay_where_they_are(tmp_path):
    volume = read_volume(write(tmp_path / "i.nii.gz", make_image(blobs((10, 10, 10))[0])), "fixed")
    flat = dataclasses.replace(volume, array=np.ones_like(volume.array))
    result = register_volumes(flat, flat, config=QUICK)
    assert np.abs(result.displacement_mm()).max() < 1e-4
    assert any("nothing better" in warning for warning in quality_warnings(result.quality))
    assert not any("nothing better" in warning for warning in quality_warnings(result.quality, affine=False))


def test_header_alignment_maps_equal_points_onto_each_other(tmp_path):
    scene = body()
    fixed = write(tmp_path / "f.nii.gz", scanned(scene, (20, 24, 28), (1.5, 1.6, 1.8), OBLIQUE, (2, -1, 1)))
    moving = write(tmp_path / "m.nii.gz", scanned(scene, (26, 22, 19), (1.4, 1.7, 2.0), SAGITTAL, (-1, 2, 0)))
    first, second = read_volume(fixed, "fixed"), read_volume(moving, "moving")
    matrix, by_headers = header_alignment(first, second)
    assert by_headers
    point = first.image.TransformContinuousIndexToPhysicalPoint((3.0, 4.0, 5.0))
    index = second.image.TransformPhysicalPointToContinuousIndex(point)
    assert np.allclose(matrix @ [5, 4, 3, 1], [*index[::-1], 1], atol=1e-4)
