"""The oneshot block of a plans file."""

import dataclasses
import json
import subprocess
import sys
import types
import typing

import pytest
from hostile_values import nested

import nnunet_oneshot.registries  # noqa: F401  (loads the names that similarity and hint may have)
from nnunet_oneshot.config import (
    OVERRIDES_VARIABLE,
    DistillationConfig,
    OneShotConfig,
    RegistrationConfig,
    SynthesisConfig,
    differences,
    form_of,
    merge_settings,
    settings_in_force,
)
from nnunet_oneshot.errors import OneShotError

BLOCKS = {
    None: OneShotConfig,
    "registration": RegistrationConfig,
    "synthesis": SynthesisConfig,
    "distillation": DistillationConfig,
}
SETTINGS = [(block, spec.name) for block, cls in BLOCKS.items() for spec in dataclasses.fields(cls)]


INFINITE, NAN = float("inf"), float("nan")
HOSTILE = [
    None,
    "",
    " ",
    "x",
    "a\0b",
    "auto",
    -1,
    0,
    1,
    1.5,
    2**32,
    10**40,
    10**400,
    INFINITE,
    -INFINITE,
    NAN,
    True,
    [],
    [1],
    [True],
    [2, 1],
    [0.2, 0.1],
    [0.5, 0.5],
    [1, 2, 3],
    [1, None],
    [INFINITE, INFINITE],
    [NAN, NAN],
    [0, 10**400],
    ["a", "a"],
    [["a"]],
    [[[[]]]],
    {},
    {"a": 1},
    nested(100_000),
]


def read(**block):
    return OneShotConfig.from_plans({"plans_name": "P", "oneshot": block})


def is_of(value, declared):
    """Whether a value has a declared type; a whole number is none of the numbers with a point here."""
    if isinstance(declared, types.UnionType):
        return any(is_of(value, option) for option in typing.get_args(declared))
    if typing.get_origin(declared) is tuple:
        arguments = typing.get_args(declared)
        if not isinstance(value, tuple) or (arguments[-1] is not ... and len(value) != len(arguments)):
            return False
        return all(is_of(item, arguments[0]) for item in value)
    return type(value) is declared


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


@pytest.mark.parametrize("cls", BLOCKS.values(), ids=lambda cls: cls.__name__)
def test_every_default_has_the_form_that_is_declared_with_it(cls):
    for spec in dataclasses.fields(cls):
        if spec.default is not dataclasses.MISSING:
            assert form_of(spec).read(json.loads(json.dumps(spec.default))) == spec.default


@pytest.mark.parametrize(("block", "name"), SETTINGS)
@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_any_value_is_of_its_type_or_refused_by_name(block, name, value):
    try:
        config = read(**({name: value} if block is None else {block: {name: value}}))
    except OneShotError as error:
        # A nested block of another form is refused by the name of what is wrong in it.
        assert f'"{name}"' in str(error) or isinstance(value, dict)
        assert len(str(error)) < 1500
        return
    owner = config if block is None else getattr(config, block)
    assert is_of(getattr(owner, name), typing.get_type_hints(type(owner))[name])
    assert OneShotConfig.from_plans({"oneshot": config.to_dict()}) == config
    assert "NaN" not in json.dumps(config.to_dict()) and "Infinity" not in json.dumps(config.to_dict())


@pytest.mark.parametrize("value", [value for value in HOSTILE if value != {}])
def test_a_block_that_is_no_object_of_settings_is_refused(value):
    with pytest.raises(OneShotError, match="expected an object|unknown settings"):
        OneShotConfig.from_plans({"oneshot": value})


@pytest.mark.parametrize("plans", [None, [], "plans", 3])
def test_plans_that_are_no_object_are_refused(plans):
    with pytest.raises(OneShotError, match="not a JSON object"):
        OneShotConfig.from_plans(plans)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        ({"sede": 1}, "sede"),
        ({"registration": {"methods": "refine"}}, "methods"),
        ({"registration": 3}, "registration"),
        ({"registration": None}, "registration"),
        ({"synthesis": []}, "synthesis"),
        ({"seed": "1"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**32}, "seed.*from 0 to 4294967295"),
        ({"seed": {}}, "seed"),
        ({"version": 99}, "version"),
        ({"version": True}, "version"),
        ({"initial_lr": 0}, "initial_lr.*a number above 0"),
        ({"atlases": []}, "atlases"),
        ({"atlases": "case_1"}, "atlases"),
        ({"atlases": ["case_1", "case_1"]}, "atlases.*each once"),
        ({"mirror_axes": "never"}, "mirror_axes"),
        ({"mirror_axes": [3]}, "mirror_axes"),
        ({"mirror_axes": [0, 0]}, "mirror_axes"),
        ({"mirror_axes": [True]}, "mirror_axes"),
        ({"registration": {"affine": 1}}, "affine"),
        ({"registration": {"similarity": "ssim"}}, "similarity"),
        ({"registration": {"similarity": ["lncc"]}}, "similarity"),
        ({"registration": {"refine_iterations": []}}, "refine_iterations"),
        ({"registration": {"refine_iterations": [10.5]}}, "refine_iterations.*whole numbers"),
        ({"registration": {"refine_iterations": [1] * 17}}, "refine_iterations.*1 to 16"),
        ({"registration": {"refine_learning_rate": 0}}, "refine_learning_rate"),
        ({"registration": {"velocity_downsample": 0}}, "velocity_downsample.*from 1"),
        ({"registration": {"lncc_kernel": 2}}, "lncc_kernel.*from 3"),
        ({"registration": {"max_voxels": 100}}, "max_voxels.*from 512"),
        ({"registration": {"temperature": 0}}, "temperature.*above 0"),
        ({"registration": {"network_batch_size": 0}}, "network_batch_size"),
        ({"registration": {"network_batch_size": 1}}, '"network_batch_size" to 2 or more'),
        ({"synthesis": {"p_mix": 1.5}}, "p_mix"),
        ({"synthesis": {"scale_range": 0.5}}, "scale_range"),
        ({"synthesis": {"scale_range": [1.4]}}, "scale_range.*two numbers"),
        ({"synthesis": {"scale_range": [1, 2, 3]}}, "scale_range.*two numbers"),
        ({"synthesis": {"scale_range": [1.4, 0.6]}}, "scale_range.*the smaller first"),
        ({"synthesis": {"random_smoothness": NAN}}, "random_smoothness.*nan"),
        ({"synthesis": {"random_magnitude": INFINITE}}, "random_magnitude.*inf"),
        ({"distillation": {"hint": "cosine"}}, "hint"),
        ({"distillation": {"levels": 0}}, "levels.*from 1"),
        ({"distillation": {"corruption_block": 0}}, "corruption_block.*from 1"),
        ({"distillation": {"average_decay": 1}}, "average_decay.*below 1"),
        ({"distillation": {"rounds": 0.5}}, "rounds"),
        ({"distillation": {"rounds": [0]}}, "rounds"),
        ({"distillation": {"rounds": [0.5, 1]}}, "rounds"),
        ({"distillation": {"rounds": [0.6, 0.4]}}, "rounds.*rising"),
        ({"distillation": {"rounds": [0.5, 0.5]}}, "rounds.*rising"),
        ({"distillation": {"rounds": ["early"]}}, "rounds"),
        ({"distillation": {"student_share": 0.5}}, "student_share"),
    ],
)
def test_faulty_setting_is_named(block, named):
    with pytest.raises(OneShotError, match=named):
        read(**block)


def test_a_training_may_have_no_rounds():
    assert read(distillation={"rounds": []}).distillation.rounds == ()


def test_a_batch_of_one_pair_needs_no_contrastive_term():
    config = read(registration={"network_batch_size": 1, "contrastive": 0})
    assert config.registration.network_batch_size == 1


def test_overrides_are_merged_and_checked(monkeypatch):
    monkeypatch.setenv(OVERRIDES_VARIABLE, '{"seed": 5, "registration": {"affine": false}}')
    config = read(registration={"method": "network"})
    assert (config.seed, config.registration.affine, config.registration.method) == (5, False, "network")
    monkeypatch.setenv(OVERRIDES_VARIABLE, '{"seeds": 5}')
    with pytest.raises(OneShotError, match="seeds"):
        read()


@pytest.mark.parametrize(
    "value",
    ["{", "[1]", "null", "[" * 100_000, '{"a":' * 100_000, '{"seed": ' + "[" * 900 + "]" * 900 + "}"]
    + ['{"seed": NaN}', '{"seed": 1e400}', '{"seed": %s}' % ("9" * 5000), '{"registration": null}'],
    ids=range(10),
)
def test_faulty_overrides_are_refused(monkeypatch, value):
    monkeypatch.setenv(OVERRIDES_VARIABLE, value)
    with pytest.raises(OneShotError, match=OVERRIDES_VARIABLE) as error:
        read()
    assert len(str(error.value)) < 1000


def test_settings_that_are_nested_too_deeply_are_not_merged():
    deep = {}
    for _ in range(100_000):
        deep = {"registration": deep}
    with pytest.raises(OneShotError, match="nested too deeply"):
        merge_settings(deep, deep)


@pytest.mark.parametrize("detach", ["student", "none"])
def test_a_teacher_that_stays_as_it_is_cannot_be_moved_by_the_hint(detach):
    block = {"distillation": {"teacher_first": 0.5, "detach": detach}}
    with pytest.raises(OneShotError, match='"teacher_first" 0.5.*"detach".*set "teacher_first" to 0'):
        OneShotConfig.from_plans({"oneshot": block})


def test_settings_are_read_without_torch():
    code = "import sys, nnunet_oneshot.config as c; c.OneShotConfig.from_plans({}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_in_force_are_equal_after_they_were_stored():
    stored = json.loads(json.dumps(settings_in_force(read(seed=3, mirror_axes=[0]))))
    assert differences(stored, settings_in_force(read(seed=3, mirror_axes=[0]))) == []
    assert differences(stored, dataclasses.asdict(read(seed=3, mirror_axes=[0]))) == []


def test_settings_that_differ_are_told_with_both_values():
    stored = settings_in_force(read(seed=3, distillation={"rounds": [0.5]}))
    now = settings_in_force(read(seed=3, atlases=["a"], distillation={"hint": "none"}))
    assert differences(stored, now) == [
        "atlases was None, is ['a']",
        "distillation.hint was 'voxel', is 'none'",
        "distillation.rounds was [0.5], is [0.3, 0.6]",
    ]


def test_settings_of_another_release_are_told():
    stored = {"seed": 1, "old": {"a": 2}}
    assert differences(stored, {"seed": 1, "new": 3}) == [
        "new was not a setting, is 3",
        "old.a was 2, is no setting any more",
    ]
