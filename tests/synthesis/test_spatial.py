"""Patches lie where nnU-Net's spatial transform would put them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from nnunet_oneshot.synthesis.spatial import Lattice, patch_places

CORNER = (3, -4, 5)


def everywhere(places):
    return torch.cat([part for _, part in places.lattice.slabs(places.points, points=100)], dim=1)


def transform(size, *, elastic=0.0):
    return SpatialTransform(
        size,
        0,
        False,
        p_elastic_deform=elastic,
        p_rotation=0.7,
        rotation=(-0.5, 0.5),
        p_scaling=0.7,
        scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
    )


@pytest.mark.parametrize("elastic", [0.0, 1.0])
@pytest.mark.parametrize("size", [(12, 9, 11), (1, 12, 9)])
@pytest.mark.parametrize("seed", range(4))
def test_a_patch_lies_where_nnunets_grid_does(size, seed, elastic):
    dim = 3 if size[0] > 1 else 2
    spatial = transform(size[3 - dim :], elastic=elastic)
    initial = tuple(n + 7 for n in size)
    np.random.seed(seed)
    torch.manual_seed(seed)
    found = everywhere(patch_places(CORNER, initial, size, spatial))
    np.random.seed(seed)
    torch.manual_seed(seed)
    grid = spatial.get_parameters(image=torch.empty((1, *size[3 - dim :])))["grid"]
    if grid is None:
        expected = np.indices(size) + np.array(CORNER).reshape(3, 1, 1, 1) + 7 // 2
    else:
        half = np.array(size[3 - dim :]) / 2
        centre = np.array([c + (n - 1) / 2 for c, n in zip(CORNER, initial, strict=True)])
        expected = np.moveaxis(grid.numpy()[..., ::-1] * half + centre[3 - dim :], -1, 0)
        if dim == 2:
            found, expected = found[1:, 0], expected
    assert np.allclose(found, expected, atol=2e-5 if grid is not None else 0.5)


def test_a_patch_that_is_not_turned_is_a_box():
    places = patch_places(CORNER, (12, 9, 11), (12, 9, 11), None)
    assert places.corner == CORNER
    assert torch.equal(everywhere(places)[:, 0, 0, 0], torch.tensor(CORNER).float())
    assert torch.equal(everywhere(places)[:, -1, -1, -1], torch.tensor([14.0, 4.0, 15.0]))


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("shape", [(7, 8, 5), (1, 6, 4)])
def test_between_its_places_a_lattice_interpolates(shape, step):
    """A map that is linear along each axis is exact everywhere."""
    lattice = Lattice(shape, step)
    whole = np.indices(shape).astype(np.float32)

    def curved(x, y, z):
        return x + 0.1 * x * y + 0.2 * y * z

    coordinates = torch.stack([curved(*lattice.voxels())] * 3)
    found = torch.cat([part for _, part in lattice.slabs(coordinates, points=1)], dim=1)
    assert np.allclose(found[0], curved(*whole), atol=1e-4)
