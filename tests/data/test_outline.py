import numpy as np
import pytest

from nnunet_oneshot.data.outline import restore_outline


def _normalised_ball(shape=(24, 26, 28), radius=9.0):
    """An object of mean 0 and deviation 1 in an outside of 0, as masked normalisation leaves it."""
    axes = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes if axis.shape) < radius**2
    image = np.zeros(shape, np.float32)
    values = np.random.default_rng(0).normal(size=int(inside.sum()))
    image[inside] = (values - values.mean()) / values.std()
    return image[None], inside


@pytest.mark.parametrize("shape", [(24, 26, 28), (1, 30, 28), (2, 30, 28)])
def test_outside_gets_the_first_percentile_and_inside_keeps_its_values(shape):
    image, inside = _normalised_ball(shape)

    restored = restore_outline(image, [True])

    told_apart = inside & (np.abs(image[0]) >= 0.01)
    assert np.array_equal(restored[0][told_apart], image[0][told_apart])
    assert np.unique(restored[0][~inside]) == pytest.approx(np.percentile(image[0][inside], 1), abs=0.02)
    assert np.abs(image[0][~inside]).max() == 0


def test_empty_hole_in_the_object_is_no_outside():
    image, inside = _normalised_ball()
    image[0, 9:14, 10:15, 11:16] = 0

    restored = restore_outline(image, [True])

    assert (restored[0, 9:14, 10:15, 11:16] == 0).all()
    assert (restored[0][~inside] < -1).all()


def test_surface_of_the_mean_value_that_reaches_the_border_is_no_outside():
    # A ramp through 0 across the whole volume: its zero surface is one voxel wide.
    image = np.broadcast_to(np.linspace(-2, 2, 21, dtype=np.float32)[:, None, None], (21, 20, 20))[None].copy()

    assert restore_outline(image, [True]) is image


def test_channels_without_masked_normalisation_are_left_alone():
    image, inside = _normalised_ball()
    both = np.concatenate([image, image])

    restored = restore_outline(both, [False, True])

    assert np.array_equal(restored[0], both[0])
    assert (restored[1][~inside] < -1).all()
    assert restore_outline(both, [False, False]) is both


def test_empty_image_is_left_alone():
    image = np.zeros((1, 8, 8, 8), np.float32)
    assert restore_outline(image, [True]) is image
