"""Method names, variants with other settings, and the trainer each length needs."""

import pytest

from nnunet_oneshot.config import OneShotConfig, merge_settings
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluation.ablations import ABLATIONS, Ablation
from nnunet_oneshot.evaluation.methods import BASELINES, default_methods, parse_method, parse_settings, trainer_name
from nnunet_oneshot.evaluation.propagation import propagation_methods
from nnunet_oneshot.evaluation.registration_methods import REGISTRATION_METHODS, method


def test_every_method_trains_or_propagates():
    for name in BASELINES:
        method = parse_method(name)
        assert (method.trainer is None) != (method.propagation is None)
        assert method.overrides == {}


def test_variant_holds_nested_settings():
    method = parse_method("distill:distillation.hint=none,distillation.levels=3,unlabelled_fraction=0.2")
    assert method.base == "distill"
    assert method.overrides == {"distillation": {"hint": "none", "levels": 3}, "unlabelled_fraction": 0.2}


def test_value_may_be_a_list():
    assert parse_method("synthesis:synthesis.scale_range=[0.5,1.5],seed=1").overrides == {
        "synthesis": {"scale_range": [0.5, 1.5]},
        "seed": 1,
    }


def test_what_is_compared_unasked_are_the_methods_of_the_documentation():
    compared = (
        "affine registration corrected syn nnunet-atlas supervised-atlas propagation synthesis distill supervised "
        "nnunet-full"
    )
    assert default_methods() == compared.split()
    assert {"syncc", "bspline", "demons", "convexadam", "greedy", "greedy_own"} < set(BASELINES)


@pytest.fixture
def late_peer():
    """A function that registers a peer by a name, after `BASELINES` was made."""
    names = []

    def register(name, **attributes):
        @method(name, **attributes)
        def late(case, atlas, labels, options):
            """Registered by the user's own code."""

        names.append(name)

    yield register
    for name in names:
        REGISTRATION_METHODS.remove(name)


def test_a_peer_that_is_registered_later_is_a_method_too(late_peer):
    before = list(BASELINES)
    late_peer("late", compared=True)
    found = parse_method("late:seed=2")
    assert (found.propagation, found.trainer, found.overrides) == ("late", None, {"seed": 2})
    assert BASELINES.meaning("late") == "Label propagation by a peer. Registered by the user's own code."
    assert "late" in default_methods() and "late" in propagation_methods()
    names = list(BASELINES)
    # Among the peers, so that tables stay in the order of what they compare.
    assert names.index("corrected") < names.index("late") == found.place < names.index("nnunet-atlas")
    assert [name for name in names if name != "late"] == before


def test_own_stages_that_are_registered_later_are_no_methods(late_peer):
    late_peer("stage", own=True)
    assert "stage" not in BASELINES


def test_a_peer_cannot_take_the_name_of_a_training(late_peer):
    late_peer("distill")
    with pytest.raises(ValueError, match="distill is a method already"):
        parse_method("distill")


def test_an_ablation_is_named_and_mixed_with_settings():
    assert parse_method("distill:no-hint").overrides == {"distillation": {"hint": "none"}}
    mixed = parse_method("distill:no-hint,distillation.levels=1,no-appearance,seed=[1,2]")
    assert mixed.overrides == {
        "distillation": {"hint": "none", "levels": 1},
        "synthesis": {"p_appearance": 0},
        "seed": [1, 2],
    }


@pytest.mark.parametrize("name", ["real-35", "levels_3", "Loud"])
def test_any_name_of_an_ablation_can_be_mixed(name):
    ABLATIONS.add(name, Ablation("Another seed.", {"seed": 3}))
    try:
        for text in (f"distill:{name},no-hint", f"distill:no-hint,{name}"):
            assert parse_method(text).overrides == {"distillation": {"hint": "none"}, "seed": 3}
    finally:
        ABLATIONS.remove(name)


def test_values_may_hold_commas_before_words():
    assert parse_method("distill:registration.guide=/models/a,b").overrides == {
        "registration": {"guide": "/models/a,b"}
    }


def test_an_unknown_ablation_is_named_alone():
    with pytest.raises(OneShotError, match="The ablation 'magic' is not known: known are no-hint, "):
        parse_method("distill:no-hint,magic")


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_settings_of_every_ablation_are_valid_and_change_something(name):
    config = OneShotConfig.from_plans({"oneshot": dict(ABLATIONS[name].settings)})
    assert config != OneShotConfig() and ABLATIONS.meaning(name).endswith(".")


def test_variants_have_folders_of_their_own():
    names = ["distill", "distill:seed=1", "distill:seed=2", "distill:synthesis.mix_range=[0,1]"]
    folders = {parse_method(name).folder for name in names}
    assert len(folders) == len(names)
    assert all("/" not in folder and ":" not in folder for folder in folders)


@pytest.mark.parametrize("text", ["magic", "distill:hint"])
def test_what_is_not_understood_is_an_error(text):
    with pytest.raises(OneShotError):
        parse_method(text)


def test_settings_are_merged_deeply():
    first = parse_settings(["distillation.hint=none", "seed=1"])
    assert merge_settings(first, {"distillation": {"levels": 4}, "seed": 2}) == {
        "distillation": {"hint": "none", "levels": 4},
        "seed": 2,
    }


@pytest.mark.parametrize(
    ("method", "epochs", "name"),
    [
        ("distill", 1, "OneShotDistillTrainer_1epoch"),
        ("synthesis", 10, "OneShotSynthesisTrainer_10epochs"),
        ("nnunet-atlas", None, "OneShotAtlasTrainer"),
        ("supervised-atlas", 5, "OneShotSupervisedAtlasTrainer_5epochs"),
        ("supervised", None, "OneShotSupervisedTrainer"),
        ("nnunet-full", 5, "nnUNetTrainer_5epochs"),
        ("nnunet-full", 1000, "nnUNetTrainer"),
    ],
)
def test_length_chooses_the_variant_of_the_trainer(method, epochs, name):
    assert trainer_name(parse_method(method), epochs) == name


def test_stock_variants_exist():
    from nnunetv2.training.nnUNetTrainer.variants.training_length import nnUNetTrainer_Xepochs

    for epochs in (1, 5, 10, 20, 50, 100, 250):
        assert hasattr(nnUNetTrainer_Xepochs, trainer_name(parse_method("nnunet-full"), epochs))


def test_length_without_a_variant_names_those_there_are():
    with pytest.raises(OneShotError, match="no variant of 7 epochs.*5, 10"):
        trainer_name(parse_method("distill"), 7)
