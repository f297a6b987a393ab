"""Batches of the one-shot loader: what they hold, which image they show, and that a seed decides them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import gaussian_filter

from nnunet_oneshot.config import SynthesisConfig
from nnunet_oneshot.registration.pair.registration import Registration
from nnunet_oneshot.synthesis.data_loader import OneShotDataLoader, PatchSettings, share_of_labelled
from nnunet_oneshot.synthesis.functional import random_velocity
from nnunet_oneshot.synthesis.sampler import Atlas

SHAPE = (20, 22, 18)
PATCH = (12, 14, 10)
CASES = ("c0", "c1", "c2")


def smooth(seed):
    image = gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 2)
    return (image / image.std())[None].astype(np.float32)


class Images:
    """Unlabelled cases whose labels cannot be asked for."""

    identifiers = list(CASES)

    def load_case(self, identifier):
        return smooth(1 + CASES.index(identifier)), None, None, {}


def registration(case, quality=0.5):
    rng = np.random.default_rng(CASES.index(case))
    velocity = random_velocity((10, 11, 9), SHAPE, magnitude=0.8, smoothness=5, rng=rng)
    return Registration("a", case, np.eye(4), velocity.numpy(), SHAPE, SHAPE, {"similarity_after": quality})


def loader(real_share=0.0, *, augment=True, transforms=(), batch_size=2, real_cases=None, **synthesis):
    seg = np.digitize(smooth(0), (0.0, 0.6)).astype(np.int16)
    places = {label: np.argwhere(seg == label) for label in (1, 2)}
    return OneShotDataLoader(
        Images(),
        {"a": Atlas(torch.from_numpy(smooth(0)), torch.from_numpy(seg), places)},
        {("a", case): registration(case) for case in CASES},
        real_cases=real_cases,
        label_manager=LabelManager({"background": 0, "low": 1, "high": 2}, None),
        settings=PatchSettings(
            batch_size=batch_size,
            initial_patch_size=PATCH,
            patch_size=PATCH,
            transforms=ComposeTransforms([RemoveLabelTansform(-1, 0), *transforms]),
            synthesis=replace(SynthesisConfig(), **synthesis),
            real_share=real_share,
            augment=augment,
            oversample_foreground_percent=0.33,
        ),
        seed=0,
    )


def batch(seed=0, **arguments):
    np.random.seed(seed)
    torch.manual_seed(seed)
    return loader(**arguments).generate_train_batch()


def test_a_batch_holds_aligned_patches_and_says_where_they_come_from():
    found = batch(batch_size=3)
    assert found["data"].shape == found["real"].shape == found["target"].shape == (3, 1, *PATCH)
    assert set(found["target"].unique().tolist()) <= {0, 1, 2}
    assert set(found["keys"]) <= set(CASES)
    assert found["atlases"] == ["a"] * 3
    assert not found["from_real"].any()


def test_the_whole_share_shows_the_real_images_as_they_are_registered():
    found = batch(real_share=1.0)
    assert found["from_real"].all()
    assert torch.equal(found["data"], found["real"])
    other = batch(real_share=1.0, p_scale=1.0, p_mix=1.0, p_random=1.0, p_appearance=1.0)
    assert torch.equal(found["data"], other["data"])
    assert torch.equal(found["target"], other["target"])


def test_a_share_between_mixes_both_within_a_batch():
    found = batch(real_share=0.5, batch_size=40)
    assert 10 <= found["from_real"].sum() <= 30
    same = (found["data"] == found["real"]).flatten(1).all(1)
    assert torch.equal(same, found["from_real"])


def test_appearance_changes_the_synthetic_patch_alone():
    still = {"p_scale": 0.0, "p_mix": 0.0, "p_random": 0.0, "batch_size": 1}
    plain = batch(p_appearance=0.0, **still)
    changed = batch(p_appearance=1.0, appearance_strength=(1.0, 1.0), **still)
    assert torch.equal(plain["real"], changed["real"])
    assert torch.equal(plain["target"], changed["target"])
    assert not torch.equal(plain["data"], changed["data"])


@pytest.mark.parametrize("real_share", [0.0, 0.5, 1.0])
def test_a_seed_decides_the_batch(real_share):
    first, again, other = (batch(seed, real_share=real_share) for seed in (3, 3, 4))
    assert torch.equal(first["data"], again["data"])
    assert torch.equal(first["target"], again["target"])
    assert not torch.equal(first["data"], other["data"])


def test_deep_supervision_gives_a_target_for_each_scale():
    found = batch(transforms=[DownsampleSegForDSTransform([1, 0.5])])
    assert [tuple(level.shape) for level in found["target"]] == [(2, 1, *PATCH), (2, 1, 6, 7, 5)]


def test_a_pair_of_weight_zero_is_never_drawn():
    own = loader(batch_size=30)
    own.pair_weights = np.array([1.0, 0.0, 1.0])
    np.random.seed(0)
    found = own.generate_train_batch()
    assert set(found["keys"]) == {"c0", "c2"}


@pytest.mark.parametrize(("real_cases", "shown"), [(["c1"], {"c1"}), (None, set(CASES)), ([], set(CASES))])
def test_real_images_are_those_of_the_cases_that_may_be_shown(real_cases, shown):
    own = loader(0.5, batch_size=60, real_cases=real_cases)
    np.random.seed(0)
    found = own.generate_train_batch()
    drawn = {True: set(), False: set()}
    for case, real in zip(found["keys"], found["from_real"].tolist(), strict=True):
        drawn[real].add(case)
    assert drawn == {True: shown, False: set(CASES)}


def test_an_ambiguous_pair_is_not_shown_as_it_is(monkeypatch):
    ambiguous = registration("c2")
    ambiguous.quality["rival_margin"] = 0.01
    plain = registration
    monkeypatch.setitem(globals(), "registration", lambda case: ambiguous if case == "c2" else plain(case))
    own = loader(0.5, batch_size=60)
    np.random.seed(0)
    found = own.generate_train_batch()
    drawn = [
        {c for c, real in zip(found["keys"], found["from_real"].tolist(), strict=True) if real == kind}
        for kind in (True, False)
    ]
    assert drawn == [{"c0", "c1"}, set(CASES)]


@pytest.fixture
def second_stage(monkeypatch):
    """A function that gives a batch of a cascade's second stage, whose first has segmented each case by intensity."""

    def make(real_share, *transforms):
        see = Images.load_case

        def with_first_stage(self, case):
            image = see(self, case)[0]
            return image, None, np.digitize(image[0], (0.0, 0.6)).astype(np.uint8), {}

        monkeypatch.setattr(Images, "load_case", with_first_stage)
        own = loader(real_share, transforms=[*transforms, MoveSegAsOneHotToDataTransform(1, [1, 2])], batch_size=6)
        own.settings = replace(own.settings, coarseness=(2.0, 2.0, 2.0))
        np.random.seed(0)
        return own.generate_train_batch()

    return make


def one_hot(labels):
    return torch.cat([labels == 1, labels == 2], dim=1).float()


def test_synthetic_patches_of_a_second_stage_show_their_own_label_before_corruption(second_stage, monkeypatch):
    monkeypatch.setattr("nnunet_oneshot.synthesis.data_loader.roughened", lambda seg, coarseness: seg)
    found = second_stage(0.0)
    assert found["data"].shape == (6, 3, *PATCH) and found["real"].shape == (6, 1, *PATCH)
    assert torch.equal(found["data"][:, 1:], one_hot(found["target"]))


def test_what_synthetic_patches_show_of_the_first_stage_is_never_the_exact_label(second_stage):
    found = second_stage(0.0)
    for shown, exact in zip(found["data"][:, 1:], one_hot(found["target"]), strict=True):
        dice = 2 * (shown * exact).sum() / (shown + exact).sum()
        assert 0.4 < dice < 0.99


def test_real_patches_of_a_second_stage_show_what_the_first_saw_in_their_case(second_stage):
    found = second_stage(1.0)
    assert torch.equal(found["data"][:, 1:], one_hot(found["previous"]))
    assert not torch.equal(found["data"][:, 1:], one_hot(found["target"]))


@pytest.mark.parametrize("real_share", [0.0, 1.0])
def test_the_first_stage_lies_where_the_real_image_lies_also_mirrored(second_stage, real_share):
    found = second_stage(real_share, MirrorTransform((0, 1, 2)))
    fits = torch.bucketize(found["real"].contiguous(), torch.tensor([0.0, 0.6])) == found["previous"]
    assert fits.float().mean() > (0.999 if real_share else 0.9)


# Padding, 0, is background.
LIMITS = (0.05, 0.6)


def several(own_share, *, batch_size=60, cases=CASES, **settings):
    """A loader of two atlases whose labels are functions of their intensities."""
    own = loader(batch_size=batch_size, **settings)
    atlases = {}
    for name, seed in (("a", 11), ("b", 12)):
        seg = np.digitize(smooth(seed), LIMITS).astype(np.int16)
        places = {label: np.argwhere(seg == label) for label in (1, 2)}
        atlases[name] = Atlas(torch.from_numpy(smooth(seed)), torch.from_numpy(seg), places)
    pairs = {(a, c): replace(registration(c), atlas=a) for a in atlases for c in cases}
    manager = LabelManager({"background": 0, "low": 1, "high": 2}, None)
    return OneShotDataLoader(
        Images(), atlases, pairs, label_manager=manager, settings=own.settings, seed=0, own_share=own_share
    )


def drawn(own, seed=0):
    np.random.seed(seed)
    torch.manual_seed(seed)
    return own.generate_train_batch()


@pytest.mark.parametrize(
    ("atlases", "cases", "share"), [(1, 1, 0.0), (1, 40, 0.0), (2, 3, 0.4), (5, 95, 0.05), (3, 0, 1.0)]
)
def test_each_image_of_the_training_part_is_shown_equally_often(atlases, cases, share):
    assert share_of_labelled(["a"] * atlases, ["c"] * cases) == share


@pytest.mark.parametrize("real_share", [0.0, 0.5, 1.0])
def test_atlases_are_also_shown_as_they_are_with_their_exact_labels(real_share):
    found = drawn(several(0.4, real_share=real_share))
    pairs = list(zip(found["atlases"], found["keys"], strict=True))
    own = torch.tensor([atlas == case for atlas, case in pairs])
    assert 14 <= own.sum() <= 34 and {atlas for atlas, case in pairs if atlas == case} == {"a", "b"}
    # What is not corrected by intensities, as labels that a registration carried are.
    assert not found["from_real"][own].any()
    assert torch.equal(found["data"][own], found["real"][own])
    exact = np.digitize(found["data"][own].numpy(), LIMITS)
    assert np.array_equal(found["target"][own].numpy(), exact)
    volumes = {name: np.pad(smooth(seed)[0], max(PATCH)) for name, seed in (("a", 11), ("b", 12))}
    for index in own.nonzero()[:4, 0].tolist():
        patch, volume = found["data"][index, 0].numpy(), volumes[found["atlases"][index]]
        windows = np.lib.stride_tricks.sliding_window_view(volume, PATCH)
        assert (windows == patch).all(axis=(3, 4, 5)).any()
    assert {case for _, case in pairs} == {*CASES, "a", "b"}


def test_the_other_samples_of_several_atlases_are_drawn_as_ever():
    plain, again = drawn(several(0.0)), drawn(several(0.0), seed=0)
    assert torch.equal(plain["data"], again["data"]) and set(plain["keys"]) == set(CASES)


def test_without_an_unlabelled_image_every_patch_shows_an_atlas_as_it_is():
    found = drawn(several(1.0, cases=(), batch_size=20))
    assert found["keys"] == found["atlases"] and set(found["keys"]) == {"a", "b"}
    assert np.array_equal(found["target"].numpy(), np.digitize(found["data"].numpy(), LIMITS))
