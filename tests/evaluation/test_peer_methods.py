"""Greedy and ConvexAdam: a known shift is found with its sign, axis and unit, and what is missing is told."""

import sys
import warnings

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates, shift

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation import itk_methods as itk
from nnunet_oneshot.evaluation import peer_methods as peers
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS, MethodOptions

SPACING, ATLAS_SPACING = (1.5, 1.0, 0.8), (1.0, 0.8, 1.25)
# mm, array axis order: what lies at x in the case lies at x + SHIFT in the atlas.
SHIFT = (1.5, -2.0, 2.4)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def texture(shape):
    image = gaussian_filter(np.random.default_rng(0).normal(size=shape), 2.0)
    return (image / image.std()).astype(np.float32)


def shifted_pair(shape):
    """A case and an atlas (1, *shape) on one grid, the case read in the atlas at SHIFT."""
    edges = SPACING[-len(shape) :]
    atlas = texture(shape)
    voxels = [-length / edge for length, edge in zip(SHIFT[-len(shape) :], edges, strict=True)]
    return shift(atlas, voxels, order=1, mode="nearest")[None], atlas[None], edges


def start(dim, *, translation=None, edges=SPACING):
    matrix = np.eye(dim + 1)
    if translation is not None:
        matrix[:dim, dim] = np.asarray(translation) / edges
    return itk.affine_transform(matrix, fixed_spacing=edges, moving_spacing=edges)


def median_shift(transform, fixed, edges):
    """Median over the inner voxels of how far their places lie, mm, array axis order."""
    places = itk.read_places(transform, fixed, edges)
    moved = (places - np.indices(places.shape[1:])) * np.reshape(edges, (-1, *[1] * len(edges)))
    inner = moved[(slice(None), *[slice(6, -6)] * len(edges))]
    return np.median(inner.reshape(len(edges), -1), axis=1)


@pytest.mark.parametrize("own_affine", [False, True])
@pytest.mark.parametrize("shape", [(28, 32, 36), (44, 40)])
def test_greedy_finds_a_shift(shape, own_affine):
    pytest.importorskip("picsl_greedy")
    case, atlas, edges = shifted_pair(shape)
    images = [itk.to_image(image, edges) for image in (case, atlas)]
    found = peers.register_greedy(*images, None if own_affine else start(len(shape), edges=edges), seed=0, threads=1)
    assert median_shift(found, images[0], edges) == pytest.approx(SHIFT[-len(shape) :], abs=0.15)


def test_convexadam_finds_a_shift_on_voxels_of_unequal_edges():
    pytest.importorskip("convexAdam")
    case, atlas, edges = shifted_pair((28, 32, 36))
    images = [itk.to_image(image, edges) for image in (case, atlas)]
    found = peers.register_convexadam(*images, start(3), device="cpu")
    assert median_shift(found, images[0], edges) == pytest.approx(SHIFT, abs=0.3)


@pytest.mark.parametrize("name", ["greedy", "convexadam"])
def test_a_start_that_is_right_is_kept(name):
    pytest.importorskip({"greedy": "picsl_greedy", "convexadam": "convexAdam"}[name])
    case, atlas, edges = shifted_pair((28, 32, 36))
    images = [itk.to_image(image, edges) for image in (case, atlas)]
    right = start(3, translation=SHIFT)
    if name == "greedy":
        found = peers.register_greedy(*images, right, seed=0, threads=1)
    else:
        found = peers.register_convexadam(*images, right, device="cpu")
    assert median_shift(found, images[0], edges) == pytest.approx(SHIFT, abs=0.15)


@pytest.mark.parametrize("name", ["greedy", "greedy_own", "convexadam"])
def test_places_are_voxels_of_an_atlas_on_another_grid(name):
    pytest.importorskip({"convexadam": "convexAdam"}.get(name, "picsl_greedy"))
    fine = texture((56, 50, 50))
    volumes = []
    for edges, begin in ((SPACING, (6, 6, 6)), (ATLAS_SPACING, (4, 8, 5))):
        # Both are read in the same fine image, of 0.8 mm, at another origin.
        axes = [np.arange(b, b + 26 * 0.8 + 1e-6, edge) for b, edge in zip(begin, edges, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij")) / 0.8
        volumes.append((map_coordinates(fine, grid, order=1)[None].astype(np.float32), edges))
    case, atlas = volumes
    options = MethodOptions(RegistrationConfig())
    places = REGISTRATION_METHODS[name].register(case, atlas, None, options).places()
    assert places.shape == (3, *case[0].shape[1:]) and places.dtype == np.float32
    scale = np.reshape(np.divide(SPACING, ATLAS_SPACING), (3, 1, 1, 1))
    origin = np.reshape(np.subtract((6, 6, 6), (4, 8, 5)) / ATLAS_SPACING, (3, 1, 1, 1))
    true = np.indices(case[0].shape[1:]) * scale + origin
    inner = (slice(None), *[slice(4, -4)] * 3)
    assert np.median(np.abs(places - true)[inner]) < 0.2


def test_slices_of_greedy_stay_in_their_plane():
    pytest.importorskip("picsl_greedy")
    case, atlas, edges = shifted_pair((44, 40))
    volumes = [(image[:, None], (3.0, *edges)) for image in (case, atlas)]
    found = REGISTRATION_METHODS["greedy"].register(*volumes, None, MethodOptions(RegistrationConfig()))
    places = found.places()
    assert places.shape == (3, 1, 44, 40) and not places[0].any()
    moved = (places - np.indices(places.shape[1:]))[1:, 0, 8:-8, 8:-8] * np.reshape(edges, (2, 1, 1))
    assert np.median(moved.reshape(2, -1), axis=1) == pytest.approx(SHIFT[1:], abs=0.15)


def test_slices_are_refused_by_convexadam():
    pytest.importorskip("convexAdam")
    image = itk.to_image(texture((20, 22))[None], (1.0, 1.0))
    with pytest.raises(OneShotError, match="single slices"):
        peers.register_convexadam(image, image, start(2, edges=(1.0, 1.0)), device="cpu")


@pytest.mark.parametrize("name", ["greedy", "greedy_own", "convexadam"])
def test_images_without_structure_are_told(name):
    pytest.importorskip({"convexadam": "convexAdam"}.get(name, "picsl_greedy"))
    empty = (np.zeros((1, 18, 18, 18), np.float32), SPACING)
    with pytest.raises(OneShotError, match="not finite, as it does for images without any structure"):
        REGISTRATION_METHODS[name].register(empty, empty, None, MethodOptions(RegistrationConfig()))


def test_a_failure_of_greedy_is_a_sentence(monkeypatch):
    pytest.importorskip("picsl_greedy")
    monkeypatch.setattr(peers, "_greedy_iterations", lambda sizes: "100x50x10")
    image = itk.to_image(texture((9, 10, 13))[None], SPACING)
    with pytest.raises(OneShotError, match="Greedy failed on this pair .*four pixels"):
        peers.register_greedy(image, image, start(3), seed=0, threads=1)


def test_small_volumes_are_registered():
    case = (texture((9, 10, 13))[None], SPACING)
    for name, package in (("greedy", "picsl_greedy"), ("convexadam", "convexAdam")):
        pytest.importorskip(package)
        places = REGISTRATION_METHODS[name].register(case, case, None, MethodOptions(RegistrationConfig())).places()
        assert np.abs(places - np.indices(case[0].shape[1:])).max() < 0.5


def test_levels_of_greedy_follow_the_shortest_axis():
    assert peers._greedy_iterations([40, 30, 16]) == "100x50x10"
    assert peers._greedy_iterations([40, 30, 15]) == "50x10"
    assert peers._greedy_iterations([4, 30]) == "10"
    with pytest.raises(OneShotError, match="needs 4 voxels along each axis, and one of these images has 3"):
        peers._greedy_iterations([3, 30])


def test_matrices_of_greedy_turn_two_axes():
    transform = itk.affine_transform(
        np.array([[1, 0.1, 0, 3], [0, 1, 0.2, 4], [0.3, 0, 1, 5], [0, 0, 0, 1.0]]),
        fixed_spacing=(1, 1, 1),
        moving_spacing=(1, 1, 1),
    )
    matrix = peers._in_ras(transform)
    # The last array axis is ITK's first.
    assert matrix[:3, 3] == pytest.approx([-5, -4, 3])
    assert peers._from_ras(matrix).GetParameters() == pytest.approx(transform.GetParameters())


def test_a_cubic_grid_covers_the_image():
    grid = peers._cubic_grid(itk.to_image(np.zeros((1, 5, 20, 30)), (4.0, 1.0, 2.0)))
    assert grid.GetSpacing() == pytest.approx((2.0, 2.0, 2.0))
    # 58, 19 and 16 mm need 30, 11 and 9 voxels; the next sizes that 6 divides, at least 18.
    assert grid.GetSize() == (30, 18, 18)


@pytest.mark.parametrize(
    ("module", "method", "tool"),
    [
        ("picsl_greedy", "greedy", "Greedy"),
        ("picsl_greedy", "greedy_own", "Greedy"),
        ("convexAdam.convex_adam_MIND", "convexadam", "ConvexAdam"),
    ],
)
def test_what_is_not_installed_is_told_with_the_extra(module, method, tool, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OneShotError, match=rf"needs {tool}, which is not installed: .*nnunet_oneshot\[peers\]"):
        REGISTRATION_METHODS[method].require()


def test_convexadam_leaves_warnings_as_they_are(monkeypatch):
    pytest.importorskip("convexAdam")
    for name in [name for name in sys.modules if name.startswith("convexAdam")]:
        monkeypatch.delitem(sys.modules, name)
    before = list(warnings.filters)
    peers.require_convexadam()
    assert warnings.filters == before
