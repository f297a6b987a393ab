"""Labels read between voxels."""

import pytest
import torch

from nnunet_oneshot.registration.pair.functional import sample_at
from nnunet_oneshot.registration.pair.warp import sample_labels


@pytest.mark.parametrize("shape", [(7, 9, 8), (1, 9, 8)])
def test_the_label_with_the_largest_interpolated_indicator_is_read(shape, monkeypatch):
    # More points than fit into one part, inside and outside the volume.
    monkeypatch.setattr("nnunet_oneshot.registration.pair.warp._CHUNK_VOXELS", 100)
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
