"""The grids of the coarse-to-fine optimisation."""

from __future__ import annotations

from collections.abc import Sequence

# Levels keep at least this many voxels on the shortest axis: fewer show no anatomy.
_COARSEST_EDGE = 12


def velocity_shape(shape: Sequence[int], downsample: int) -> tuple[int, ...]:
    """Shape of the velocity grid over a registration grid: coarser by ``downsample``, at least 2 voxels per axis."""
    return tuple(max(2, -(-n // downsample)) for n in shape)


def level_shapes(shape: Sequence[int], levels: int) -> list[tuple[int, ...]]:
    """Grid shapes of the resolution levels, coarse to fine, a factor of 2 apart where the axis is long enough."""
    shapes = []
    for level in reversed(range(levels)):
        shapes.append(tuple(max(min(n, _COARSEST_EDGE), round(n / 2**level)) for n in shape))
    return shapes
