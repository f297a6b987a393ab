"""Which axes the atlas's labels allow to be mirrored."""

import numpy as np

from nnunet_oneshot.synthesis.mirroring import allowed_mirror_axes, decide_mirror_axes, occurring_mirror_axes


def box(seg, label, *slices):
    seg[tuple(slice(*s) for s in slices)] = label
    return seg


def pair(shift=0):
    """Label 1 on the left and label 2 on the right along axis 0, off the centre of the volume."""
    seg = np.zeros((24, 10, 10), np.int16)
    box(seg, 1, (8, 11), (2, 8), (3, 7))
    return box(seg, 2, (17, 20), (2 + shift, 8 + shift), (3, 7))


def _scan(seed: int, shape=(24, 26, 22)) -> np.ndarray:
    """An image (1, *shape) that is bright on one side of axis 0, bright in the middle of axis 1, and noisy."""
    rng = np.random.default_rng(seed)
    image = np.linspace(0, 4, shape[0])[:, None, None] + 4 * np.exp(-(np.linspace(-2, 2, shape[1]) ** 2))[:, None]
    return (image + rng.standard_normal(shape))[None]


def test_scans_that_all_lie_one_way_forbid_the_axis_on_which_they_differ_from_their_mirror_image():
    cases = [_scan(seed) for seed in range(1, 21)]
    assert 0 not in occurring_mirror_axes([_scan(0)], cases, (0, 1, 2))
    assert 1 in occurring_mirror_axes([_scan(0)], cases, (0, 1, 2))


def test_scans_that_lie_both_ways_allow_the_axis():
    cases = [_scan(seed)[:, :: (-1) ** (seed % 2)] for seed in range(1, 21)]
    assert 0 in occurring_mirror_axes([_scan(0)], cases, (0,))


def test_without_cases_no_axis_is_forbidden():
    assert occurring_mirror_axes([_scan(0)], [], (0, 1, 2)) == (0, 1, 2)


def test_left_and_right_forbid_their_axis_alone():
    assert allowed_mirror_axes([pair()], (0, 1, 2)) == (1, 2)


def test_an_imperfect_pair_is_recognised():
    assert allowed_mirror_axes([pair(shift=2)], (0, 1, 2)) == (1, 2)


def test_a_pair_of_unequal_size_is_recognised():
    seg = box(np.zeros((24, 12, 12), np.int16), 1, (1, 11), (1, 11), (1, 11))
    assert allowed_mirror_axes([box(seg, 2, (15, 22), (2, 9), (3, 10))], (0, 1, 2)) == (1, 2)


def test_a_pair_with_one_name_may_be_mirrored():
    seg = pair()
    assert allowed_mirror_axes([np.where(seg == 2, 1, seg)], (0, 1, 2)) == (0, 1, 2)


def test_a_third_label_on_the_midline_does_not_hide_the_pair():
    assert allowed_mirror_axes([box(pair(), 3, (12, 16), (2, 8), (2, 8))], (0, 1, 2)) == (1, 2)


def test_nested_labels_may_be_mirrored():
    seg = box(np.zeros((16, 16, 16), np.int16), 1, (2, 14), (2, 14), (2, 14))
    assert allowed_mirror_axes([box(seg, 2, (5, 11), (5, 11), (5, 11))], (0, 1, 2)) == (0, 1, 2)


def test_a_small_label_opposite_a_large_one_is_no_pair():
    seg = box(np.zeros((24, 16, 16), np.int16), 1, (0, 14), (0, 16), (0, 16))
    assert allowed_mirror_axes([box(seg, 2, (18, 22), (2, 6), (2, 6))], (0,)) == (0,)


def test_stray_voxels_do_not_move_the_plane():
    assert allowed_mirror_axes([box(pair(), 1, (0, 1), (2, 3), (3, 4))], (0,)) == ()


def test_one_atlas_of_several_decides():
    symmetric = box(np.zeros((24, 10, 10), np.int16), 1, (8, 16), (2, 8), (3, 7))
    assert allowed_mirror_axes([symmetric, pair()[None]], (0, 1, 2)) == (1, 2)


def test_outside_and_ignore_label_are_background():
    seg = pair()
    seg[:4] = -1
    assert allowed_mirror_axes([seg], (0,)) == ()
    seg[seg == 2] = 9
    assert allowed_mirror_axes([seg], (0,), ignore_label=9) == (0,)


def test_empty_atlas_and_flat_axis_allow_everything():
    assert allowed_mirror_axes([np.zeros((1, 5, 5), np.int16)], (1, 2)) == (1, 2)
    assert allowed_mirror_axes([pair()[None, 9:18:8]], (1, 2)) == (1, 2)


def decided(segs, **options):
    scans = [_scan(seed) for seed in range(3)]
    return decide_mirror_axes(
        "auto", dim=3, load_atlas_segs=lambda: segs, load_images=lambda: (scans[:1], scans[1:]), **options
    )


def test_in_mixed_axis_orders_every_axis_is_mirrored_or_none():
    symmetric = box(np.zeros((24, 10, 10), np.int16), 1, (8, 16), (2, 8), (3, 7))
    axes, sentence = decided([symmetric], mixed_orders=True)
    assert axes == (0, 1, 2) and "different axis orders" in sentence
    axes, sentence = decided([pair()], mixed_orders=True)
    assert axes == () and "left on right" in sentence
    assert 1 in decided([pair()])[0]
