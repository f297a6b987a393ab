"""Any axis order, header and scale of intensities: labels land where they belong in the scanner's space.

``NNUNET_ONESHOT_EXAMPLES`` sets the number of examples.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_data import draw_blobs

from nnunet_oneshot.benchmarks.axis_orders import reorder
from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.evaluation.metrics import dice
from nnunet_oneshot.registration.files.register_pair import register_volumes
from nnunet_oneshot.registration.files.volumes import read_labels, read_volume

EXAMPLES = int(os.environ.get("NNUNET_ONESHOT_EXAMPLES", 12))
CONFIG = RegistrationConfig(method="refine", refine_iterations=(8, 6))
SHAPE = (18, 20, 22)


def as_image(array):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.25, 1.5))
    image.SetOrigin((-12.0, 40.0, 7.0))
    return image


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    order=st.permutations(range(3)),
    flips=st.tuples(*[st.booleans()] * 3),
    exponent=st.integers(-9, 9),
    offset=st.sampled_from([0.0, 0.5, -3.0, 20.0]),
    shift=st.tuples(*[st.integers(-4, 4)] * 3),
    origin=st.sampled_from([None, (500.0, -300.0, 90.0)]),
    outside=st.sampled_from([None, -3024.0, -1e6]),
    seed=st.integers(0, 5),
)
def test_labels_land_in_the_same_place(order, flips, exponent, offset, shift, origin, outside, seed, tmp_path):
    array, label = draw_blobs(SHAPE, np.random.default_rng(seed))
    moved, moved_label = (np.roll(a, [s // 2 for s in shift], (0, 1, 2)) for a in (array, label))
    moved = moved.astype(np.float64)
    if outside is not None:
        moved[:, :, :2] = moved[:, :, -2:] = outside
        moved[:2], moved[-2:] = outside, outside
        moved[:, :2], moved[:, -2:] = outside, outside
    changed = ((moved + offset * 100) * 10.0**exponent).astype(np.float32)
    paths = {name: str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving", "labels")}
    sitk.WriteImage(as_image(array.astype(np.float32)), paths["fixed"])
    for name, values in (("moving", changed), ("labels", moved_label)):
        image = reorder(as_image(values), order, flips)
        if origin is not None:
            image.SetOrigin(origin)
        sitk.WriteImage(image, paths[name])
    fixed, moving = read_volume(paths["fixed"], "fixed"), read_volume(paths["moving"], "moving")
    labels, _ = read_labels(paths["labels"], moving)
    result = register_volumes(fixed, moving, config=CONFIG, labels=labels)
    warped = result.warped_labels(labels)
    scores = [dice(warped == value, label == value) for value in (1, 2)]
    assert min(scores) > 0.7, scores
