"""Labels read between voxels."""

import pytest
import torch

from nnunet_oneshot.registration.pair.functional import identity_grid, resize, sample_at
from nnunet_oneshot.registration.pair.warp import (
    deform_points,
    displacement_of,
    flow_points,
    flow_single_points,
    interpolate_at,
    sample_labels,
)


@pytest.mark.parametrize("shape", [(7, 9, 8), (1, 9, 8)])
def test_the_label_with_the_largest_interpolated_indicator_is_read(shape, monkeypatch):
    # More points than fit into one part, inside and outside the volume.
    monkeypatch.setattr("nnunet_oneshot.registration.pair.warp.CHUNK_POINTS", 100)
    generator = torch.Generator().manual_seed(0)
    seg = torch.randint(-1, 5, (1, *shape), generator=generator, dtype=torch.int16)
    points = torch.rand((3, 6, 7, 8), generator=generator) * 14 - 3
    values = torch.unique(seg)
    indicators = torch.stack([sample_at((seg == v).float()[None], points[None])[0, 0] for v in values])
    found = sample_labels(seg, points)
    assert found.dtype == torch.int16 and found.shape == (1, 6, 7, 8)
    # Only labels whose indicators are equal but for rounding may differ.
    own = indicators.gather(0, torch.searchsorted(values, found).long())[0]
    torch.testing.assert_close(own, indicators.max(0).values, atol=1e-4, rtol=0)


def test_of_labels_that_weigh_the_same_the_smallest_is_read():
    seg = torch.tensor([3, 1], dtype=torch.int16).view(1, 1, 1, 2)
    halfway = torch.tensor([0.0, 0.0, 0.5]).view(3, 1, 1, 1)
    assert sample_labels(seg, halfway).item() == 1
    assert sample_labels(seg.flip(-1), halfway).item() == 1


ATLAS = (60, 50, 40)


def smooth_velocity(magnitude, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return magnitude * resize(torch.randn(1, 3, 6, 5, 4, generator=generator), (30, 25, 20))[0]


@pytest.mark.parametrize("magnitude", [1.0, 4.0])
@pytest.mark.parametrize("corner", [(0, 0, 0), (25, 20, 15), (55, 45, 35), (-30, 0, 0)])
def test_a_flow_around_points_is_that_of_the_whole_grid(corner, magnitude):
    velocity = smooth_velocity(magnitude)
    points = identity_grid((8, 8, 8)) + torch.tensor(corner).view(3, 1, 1, 1)
    whole = deform_points(points, displacement_of(velocity, ATLAS, steps=5), ATLAS)
    assert torch.allclose(flow_points(points, velocity, ATLAS, steps=5), whole, atol=1e-3)


def test_single_points_flow_as_the_grid_does():
    velocity = smooth_velocity(2.0)
    points = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) * 30 + 5
    whole = deform_points(points[:, :, None, None], displacement_of(velocity, ATLAS), ATLAS)[:, :, 0, 0]
    assert (flow_single_points(points, velocity, ATLAS) - whole).norm(dim=0).max() < 0.3


@pytest.mark.parametrize("shape", [(7, 6, 5), (1, 6, 5)])
def test_interpolation_in_parts_is_grid_sampling(shape):
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(2, *shape, generator=generator)
    points = torch.rand(3, 200, generator=generator) * 10 - 2
    expected = sample_at(volume[None], points[None, :, :, None, None])[0, :, :, 0, 0]
    assert torch.allclose(interpolate_at(volume, points), expected, atol=1e-5)
