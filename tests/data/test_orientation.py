"""Where the axes of an array point, in every of the 48 orders."""

from itertools import permutations, product

import numpy as np
import pytest

from nnunet_oneshot.data.orientation import aligned_by_headers, axes_of, in_common_order, name_of, order_of

ORDERS = [(permutation, signs) for permutation in permutations(range(3)) for signs in product((False, True), repeat=3)]


def stored(volume, permutation, signs):
    """A volume (C, Z, Y, X) in another order, and the direction cosines (x, y, z columns) that its header has."""
    moved = volume.transpose(0, *(axis + 1 for axis in permutation))
    flips = [axis for axis, sign in enumerate(signs) if sign]
    moved = np.flip(moved, [axis + 1 for axis in flips]) if flips else moved
    axes = np.zeros((3, 3))
    for axis, (source, sign) in enumerate(zip(permutation, signs, strict=True)):
        axes[source, axis] = -1 if sign else 1
    return moved, axes[::-1, ::-1]


@pytest.mark.parametrize(("permutation", "signs"), ORDERS)
def test_every_order_comes_back(permutation, signs):
    volume = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    moved, direction = stored(volume, permutation, signs)
    axes = axes_of({"sitk_stuff": {"direction": direction.ravel().tolist()}})
    assert np.array_equal(in_common_order(moved, axes), volume)
    assert np.array_equal(axes.T @ axes, np.eye(3))


@pytest.mark.parametrize(("permutation", "signs"), ORDERS)
def test_headers_lay_the_same_places_on_each_other(permutation, signs):
    volume = np.random.default_rng(0).normal(size=(1, 3, 4, 5))
    spacing = np.array([2.0, 1.0, 0.5])
    moved, direction = stored(volume, permutation, signs)
    axes = axes_of({"sitk_stuff": {"direction": direction.ravel().tolist()}})
    matrix = aligned_by_headers(
        np.eye(3), axes, fixed=(volume.shape[1:], spacing), moving=(moved.shape[1:], spacing[list(permutation)])
    )
    if matrix is None:
        matrix = np.eye(4)
    for place in np.ndindex(*volume.shape[1:]):
        there = matrix @ np.array([*place, 1.0])
        assert there[:3] == pytest.approx(np.round(there[:3]))
        assert moved[(0, *np.round(there[:3]).astype(int))] == volume[(0, *place)]


def test_preprocessing_exchanges_axes_too():
    direction = np.diag([-1.0, 1.0, 1.0])
    axes = axes_of({"sitk_stuff": {"direction": direction.ravel()}}, transpose=(2, 0, 1))
    assert np.array_equal(axes[:, 0], [0, 0, -1]) and np.array_equal(axes[:, 1], [1, 0, 0])


def test_nifti_worlds_are_turned_into_that_of_simpleitk():
    affine = np.diag([-0.5, -2.0, 3.0, 1.0])
    assert np.array_equal(axes_of({"nibabel_stuff": {"original_affine": affine}}), np.eye(3))
    reoriented = {"original_affine": affine, "reoriented_affine": np.diag([0.5, 2.0, 3.0, 1.0])}
    assert np.array_equal(np.diag(axes_of({"nibabel_stuff": reoriented})), [1, -1, -1])


def test_files_without_directions_are_taken_as_they_are():
    assert np.array_equal(axes_of({"spacing": (1, 1, 1)}), np.eye(3))
    assert np.array_equal(axes_of({"sitk_stuff": {"direction": (1, 0, 0, 1)}}), np.eye(3))
    assert np.array_equal(axes_of({"sitk_stuff": {"direction": (0,) * 9}}), np.eye(3))


def test_oblique_axes_go_to_the_nearest_order_and_keep_their_angle():
    angle = np.radians(40)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    axes = axes_of({"sitk_stuff": {"direction": rotation.ravel()}})
    assert order_of(axes) == ((0, 1, 2), ())
    matrix = aligned_by_headers(np.eye(3), axes, fixed=((9, 9, 9), (1, 1, 1)), moving=((9, 9, 9), (1, 1, 1)))
    assert matrix is not None and matrix[:3, :3] == pytest.approx(axes.T)
    assert matrix @ [4, 4, 4, 1] == pytest.approx([4, 4, 4, 1])


def test_small_angles_are_rounding():
    axes = np.eye(3) + np.array([[0, 0.01, 0], [-0.01, 0, 0], [0, 0, 0]])
    assert aligned_by_headers(np.eye(3), axes, fixed=((9,) * 3, (1,) * 3), moving=((9,) * 3, (1,) * 3)) is None


def test_names_are_those_of_viewers():
    assert name_of(np.eye(3)) == "SPL"
    assert name_of(np.diag([1, -1, -1])) == "SAR"
    assert name_of(np.eye(3)[:, [2, 0, 1]]) == "LSP"
