"""Registrations on disk: what is written comes back, and what is damaged is named."""

import json
import zlib

import numpy as np
import pytest

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset.cache import RegistrationCache, kept_of, packed, unpacked
from nnunet_oneshot.registration.pair.registration import Registration

FIGURES = {"similarity_before": 0.3, "folding": 0.0, "affine_start": "moments"}


@pytest.fixture
def cache(tmp_path):
    """A cache that holds one pair, made with the key "made so"."""
    cache = RegistrationCache(tmp_path)
    pair = Registration(
        "atlas",
        "case",
        affine=np.diag([1.0, 2.0, 3.0, 1.0]),
        velocity=np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2),
        atlas_shape=(4, 5, 6),
        case_shape=(7, 8, 9),
        quality={**FIGURES, "similarity_after": 0.5},
    )
    cache.save(pair, key="made so", sources={}, parameters={"levels": 3}, versions={"torch": "2"})
    return cache


def test_a_pair_comes_back_as_it_was_saved(cache):
    pair = cache.load("atlas", "case")
    np.testing.assert_array_equal(pair.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    np.testing.assert_array_equal(pair.velocity, np.arange(24).reshape(3, 2, 2, 2))
    assert (pair.atlas_shape, pair.case_shape) == ((4, 5, 6), (7, 8, 9))
    assert pair.quality == {**FIGURES, "similarity_after": 0.5}
    assert cache.state("atlas", "case", "made so") == "current"
    assert cache.state("atlas", "case", "made otherwise") == "outdated"


@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (3, 1, 8, 9), (3, 2, 2, 2)])
def test_velocities_are_stored_to_a_sixteenth_of_a_voxel(shape):
    velocity = np.random.default_rng(0).normal(0, 40, shape).astype(np.float32)
    found = unpacked(packed(velocity), shape)
    assert found.dtype == np.float32 and np.abs(found - velocity).max() <= 1 / 32
    assert np.array_equal(unpacked(packed(found), shape), found)
    with pytest.raises(ValueError):
        unpacked(packed(velocity), (3, 4, 6, 7))


def test_a_smooth_field_takes_few_bytes():
    place = np.stack(np.meshgrid(*[np.linspace(0, 3, 32)] * 3, indexing="ij"))
    velocity = (3 * np.sin(place + place[::-1])).astype(np.float32)
    assert len(zlib.compress(packed(velocity).tobytes())) < velocity.nbytes / 12


def test_a_pair_that_was_never_written_is_missing(cache):
    assert cache.state("atlas", "other", "made so") == "missing"
    with pytest.raises(OneShotError, match="atlas to other.*does not exist"):
        cache.load("atlas", "other")


@pytest.mark.parametrize("content", [{"key": "made so", "checksum": "0"}, ["quality"], 1])
def test_a_record_without_its_figures_is_named(cache, content):
    path = cache.path("atlas", "case", ".json")
    path.write_text(json.dumps(content))
    assert cache.state("atlas", "case", "made so") == "damaged"
    with pytest.raises(OneShotError, match=r"atlas to case in .*case\.json (lacks|must hold) .*run that command again"):
        cache.quality("atlas", "case")


def test_arrays_that_do_not_fit_their_record_are_named(cache):
    path = cache.path("atlas", "case", ".npz")
    path.write_bytes(path.read_bytes()[:100])
    assert cache.state("atlas", "case", "made so") == "damaged"
    with pytest.raises(OneShotError, match=r"case\.npz is missing or damaged"):
        cache.load("atlas", "case")


def test_of_two_registrations_the_guided_one_counts_where_it_is_kept(tmp_path):
    first, guided = RegistrationCache(tmp_path / "first"), RegistrationCache(tmp_path / "guided")
    for cache, similarities in ((first, (0.5, 0.5, 0.5)), (guided, (0.49, 0.3))):
        for case, similarity in zip("abc", similarities, strict=False):
            velocity = np.full((3, 2, 2, 2), similarity, np.float32)
            pair = Registration(
                "atlas", case, np.eye(4), velocity, (4,) * 3, (4,) * 3, {**FIGURES, "similarity_after": similarity}
            )
            cache.save(pair, key="made so", sources={}, parameters={}, versions={})
    chosen = kept_of(first, guided, [("atlas", "a"), ("atlas", "b")])
    assert chosen.kept == {("atlas", "a")}
    assert [chosen.load("atlas", case).quality["similarity_after"] for case in "abc"] == [0.49, 0.5, 0.5]
