"""The oneshot block of a plans file."""

import json

import pytest

from nnunet_oneshot.config import OVERRIDES_VARIABLE, OneShotConfig
from nnunet_oneshot.errors import OneShotError


def read(**block):
    return OneShotConfig.from_plans({"plans_name": "P", "oneshot": block})


def test_missing_block_means_defaults():
    assert OneShotConfig.from_plans({}) == OneShotConfig()


def test_block_survives_json_unchanged():
    block = OneShotConfig(atlases=("a",), mirror_axes=(0, 2)).to_dict()
    assert json.loads(json.dumps(block)) == block
    assert OneShotConfig.from_plans({"oneshot": block}) == OneShotConfig(atlases=("a",), mirror_axes=(0, 2))


def test_given_settings_replace_defaults():
    config = read(seed=3, registration={"method": "network"}, distillation={"hint": "none"})
    assert (config.seed, config.registration.method, config.distillation.hint) == (3, "network", "none")
    assert config.registration.affine is True


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"sede": 1}, "sede"),
        ({"registration": {"methods": "refine"}}, "methods"),
        ({"registration": 3}, "registration"),
        ({"seed": "1"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"version": 99}, "version"),
        ({"atlases": []}, "atlases"),
        ({"atlases": "case_1"}, "atlases"),
        ({"mirror_axes": "never"}, "mirror_axes"),
        ({"mirror_axes": [3]}, "mirror_axes"),
        ({"registration": {"affine": 1}}, "affine"),
        ({"registration": {"similarity": "ssim"}}, "similarity"),
        ({"registration": {"refine_iterations": []}}, "refine_iterations"),
        ({"synthesis": {"p_mix": 1.5}}, "p_mix"),
        ({"synthesis": {"scale_range": 0.5}}, "scale_range"),
        ({"distillation": {"hint": "cosine"}}, "hint"),
        ({"distillation": {"rounds": 0.5}}, "rounds"),
        ({"distillation": {"rounds": [0]}}, "rounds"),
        ({"distillation": {"rounds": [0.5, 1]}}, "rounds"),
        ({"distillation": {"rounds": ["early"]}}, "rounds"),
        ({"distillation": {"student_share": 0.5}}, "student_share"),
    ],
)
def test_faulty_setting_is_named(block, named):
    with pytest.raises(OneShotError, match=named):
        read(**block)


def test_a_training_may_have_no_rounds():
    assert read(distillation={"rounds": []}).distillation.rounds == ()


def test_overrides_are_merged_and_checked(monkeypatch):
    monkeypatch.setenv(OVERRIDES_VARIABLE, '{"seed": 5, "registration": {"affine": false}}')
    config = read(registration={"method": "network"})
    assert (config.seed, config.registration.affine, config.registration.method) == (5, False, "network")
    monkeypatch.setenv(OVERRIDES_VARIABLE, '{"seeds": 5}')
    with pytest.raises(OneShotError, match="seeds"):
        read()


@pytest.mark.parametrize("value", ["{", "[1]"])
def test_overrides_that_are_no_object_are_refused(monkeypatch, value):
    monkeypatch.setenv(OVERRIDES_VARIABLE, value)
    with pytest.raises(OneShotError, match=OVERRIDES_VARIABLE):
        read()


@pytest.mark.parametrize("detach", ["student", "none"])
def test_a_teacher_that_stays_as_it_is_cannot_be_moved_by_the_hint(detach):
    block = {"distillation": {"teacher_first": 0.5, "detach": detach}}
    with pytest.raises(OneShotError, match='"teacher_first" 0.5.*"detach".*set "teacher_first" to 0'):
        OneShotConfig.from_plans({"oneshot": block})
