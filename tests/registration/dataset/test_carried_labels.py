"""Labels that atlases carry to a case, without the probabilities of all labels at once."""

import numpy as np
import pytest

from nnunet_oneshot.data.partial import averaged_probabilities
from nnunet_oneshot.registration.dataset import agreement
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.registration.pair.warp import warp_label_probabilities

SHAPE, LABELS = (9, 10, 8), [0, 1, 2, 3]
QUALITY = {"similarity_before": 0.2, "similarity_after": 0.5, "folding": 0.0, "affine_start": "moments"}


@pytest.mark.parametrize("hidden", [{}, {"b": (2,)}])
def test_slabs_give_what_all_at_once_gives(hidden, monkeypatch):
    random = np.random.default_rng(0)
    atlases = {name: random.integers(0, 4, (1, *SHAPE)).astype(np.int16) for name in ("a", "b")}
    velocities = {name: random.normal(0, 0.5, (3, 5, 5, 4)).astype(np.float32) for name in atlases}
    pairs = {n: Registration(n, "case", np.eye(4), v, SHAPE, SHAPE, QUALITY) for n, v in velocities.items()}
    warped = ((name, warp_label_probabilities(pairs[name], seg, LABELS)) for name, seg in atlases.items())
    expected = averaged_probabilities(warped, LABELS, hidden).argmax(0)
    sizes = []
    original = agreement.sample_label_probabilities

    def sampled(*arguments):
        sizes.append(original(*arguments))
        return sizes[-1]

    monkeypatch.setattr(agreement, "sample_label_probabilities", sampled)
    monkeypatch.setattr(agreement, "_VALUES", 2 * len(LABELS) * SHAPE[1] * SHAPE[2])
    found = agreement._carried(pairs, atlases, LABELS, hidden)
    assert np.array_equal(found, expected) and len(np.unique(found)) == 4
    assert len(sizes) == 2 * 5 and max(part.size for part in sizes) == agreement._VALUES
