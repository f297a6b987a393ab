"""Labels as a term of registration: closed-form values, trust, and what they add where intensities say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_oneshot.config import RegistrationConfig
from nnunet_oneshot.registration.pair.label_guide import LabelGuide, guide_shape
from nnunet_oneshot.registration.pair.registrar import register_arrays
from nnunet_oneshot.registration.pair.warp import warp_atlas_to_case


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def bar(start, stop, size=20):
    """A label that fills the columns start to stop - 1 of a square, (size, size)."""
    label = torch.zeros(size, size)
    label[:, start:stop] = 1
    return label


def guide(atlas, fixed, known=None, mask=None, say=None):
    """Of lists of (size, size) label maps."""
    shape = atlas[0].shape
    everywhere = torch.ones(1, 1, *shape)
    return LabelGuide(
        torch.stack(atlas)[None],
        everywhere if known is None else known[None, None],
        torch.stack(fixed)[None],
        everywhere if mask is None else mask[None, None],
        torch.ones(len(atlas)) if say is None else torch.tensor(say),
    )


def still(size=20):
    return torch.zeros(1, 2, size, size)


def sphere(shape, centre, radius):
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    return np.linalg.norm(grid - np.reshape(centre, (3, 1, 1, 1)), axis=0) <= radius


def test_overlap_of_a_quarter_costs_three_quarters():
    loss = guide([bar(4, 8)], [bar(7, 11)]).loss_on((20, 20))(still())
    assert loss.tolist() == pytest.approx([0.75])


def test_the_right_displacement_costs_nothing():
    displacement = still()
    # Pull-back: the place of the case's bar is read 3 voxels before it.
    displacement[:, 1] = -3
    assert guide([bar(4, 8)], [bar(7, 11)]).loss_on((20, 20))(displacement).tolist() == pytest.approx([0], abs=1e-6)


@pytest.mark.parametrize(("start", "sign"), [(6, 1), (2, -1)])
def test_descent_moves_the_label_towards_the_students(start, sign):
    displacement = still().requires_grad_(True)
    guide([bar(4, 8)], [bar(start, start + 4)]).loss_on((20, 20))(displacement).backward()
    gradient = displacement.grad.sum((0, 2, 3))
    assert sign * gradient[1] > 0
    assert gradient[0] == 0


def test_displacements_are_in_voxels_of_the_grid_they_are_given_on():
    # The guide lies on half the resolution: 6 voxels of the finer grid are 3 of its own.
    displacement = torch.zeros(1, 2, 40, 40)
    displacement[:, 1] = -6
    labels = guide([bar(4, 8)], [bar(7, 11)])
    assert labels.loss_on((40, 40))(displacement).tolist() == pytest.approx([0], abs=1e-6)
    assert labels.loss_on((40, 40))(torch.zeros_like(displacement)).tolist() == pytest.approx([0.75])


def test_a_label_counts_as_far_as_it_has_a_say():
    labels = guide([bar(4, 8), bar(12, 16)], [bar(7, 11), bar(15, 19)], say=[0.5, 0.0])
    assert labels.loss_on((20, 20))(still()).tolist() == pytest.approx([0.5 * 0.75 / 2])
    assert labels.agreement_on((20, 20))(still()).tolist() == pytest.approx([0.25])


def test_losses_of_labels_are_averaged_and_absent_labels_do_not_count():
    nothing = torch.zeros(20, 20)
    labels = guide([bar(4, 8), bar(12, 14), nothing], [bar(7, 11), bar(12, 14), nothing])
    assert labels.loss_on((20, 20))(still()).tolist() == pytest.approx([0.75 / 2])
    assert labels.agreement_on((20, 20))(still()).tolist() == pytest.approx([(0.25 + 1) / 2])


def test_a_label_is_trusted_by_the_ratio_of_its_volumes():
    labels = guide([bar(4, 8), bar(12, 14), bar(15, 16)], [bar(2, 10), bar(12, 13), torch.zeros(20, 20)])
    assert labels.trust()[0].tolist() == pytest.approx([0.5, 0.5, 0])


def test_a_label_that_the_student_did_not_find_has_no_say():
    displacement = still().requires_grad_(True)
    loss = guide([bar(4, 8)], [torch.zeros(20, 20)]).loss_on((20, 20))(displacement)
    loss.backward()
    assert loss.item() == 0
    assert not displacement.grad.any()


def test_what_is_ignored_or_not_observed_does_not_count():
    half = torch.ones(20, 20)
    half[10:] = 0
    fixed = bar(4, 8)
    fixed[10:] = bar(12, 20)[10:]
    for places in ({"known": half}, {"mask": half}):
        labels = guide([bar(4, 8)], [fixed], **places)
        assert labels.trust().item() == pytest.approx(1)
        assert labels.loss_on((20, 20))(still()).tolist() == pytest.approx([0])
    assert guide([bar(4, 8)], [fixed]).loss_on((20, 20))(still()).item() > 0.3


def test_labels_are_compared_at_half_resolution_but_not_below_twelve_voxels():
    assert guide_shape((40, 30, 14)) == (20, 15, 12)


@pytest.fixture
def featureless():
    """Images of noise without any structure, and a label that has moved by 4 voxels."""
    shape = (24, 24, 24)
    random = np.random.default_rng(0)
    atlas, case = (random.normal(size=(1, *shape)).astype(np.float32) for _ in range(2))
    return atlas, case, sphere(shape, (12, 12, 9), 5), sphere(shape, (12, 12, 13), 5)


def propagated_dice(images, guide_maps=None, **settings):
    atlas, case, label, expected = images
    config = RegistrationConfig(affine=False, **settings)
    found = register_arrays(
        atlas, case, atlas_spacing=(1, 1, 1), case_spacing=(1, 1, 1), guide=guide_maps, config=config
    )
    _, warped = warp_atlas_to_case(found, atlas, label[None].astype(np.int16))
    dice = 2 * (warped[0].astype(bool) & expected).sum() / (warped[0].sum() + expected.sum())
    return dice, found


def maps(label, students):
    """What `register_arrays` takes: the atlas's mask and the places that count, and the student's probability."""
    return np.stack([label, np.ones_like(label)]).astype(np.float32), students[None].astype(np.float32)


def test_guide_finds_what_intensities_cannot(featureless):
    *_, label, expected = featureless
    unguided, _ = propagated_dice(featureless)
    # A student that is unsure everywhere still shows the way.
    guided, found = propagated_dice(featureless, maps(label, 0.1 + 0.7 * expected), guide_weight=1.0)
    assert unguided < 0.65
    assert guided > 0.85
    assert found.quality["guide_dice_after"] > found.quality["guide_dice_before"] + 0.15
    assert found.quality["folding"] == 0


def test_weight_of_zero_and_a_blind_student_change_nothing(featureless):
    *_, label, expected = featureless
    _, plain = propagated_dice(featureless)
    _, weightless = propagated_dice(featureless, maps(label, expected), guide_weight=0.0)
    _, blind = propagated_dice(featureless, maps(label, np.zeros_like(expected)))
    assert np.array_equal(plain.velocity, weightless.velocity)
    assert np.array_equal(plain.velocity, blind.velocity)
    assert "guide_dice_after" not in plain.quality


def test_guide_in_two_dimensions():
    random = np.random.default_rng(0)
    images = [random.normal(size=(1, 1, 32, 32)).astype(np.float32) for _ in range(2)]
    label, expected = (np.zeros((1, 32, 32), bool) for _ in range(2))
    label[:, 8:20, 8:20], expected[:, 8:20, 12:24] = True, True
    unguided, _ = propagated_dice((*images, label, expected))
    guided, _ = propagated_dice((*images, label, expected), maps(label, expected))
    assert guided > unguided + 0.15
