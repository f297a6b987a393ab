"""Which case becomes the atlas."""

import json

import numpy as np
import pytest

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.atlas import ATLAS_FILE, forget_outdated_choice, resolve_atlases, save_choice
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import OneShotError


def volume(offset, seed=0):
    grid = np.linspace(-1, 1, 20)
    x, y, z = np.meshgrid(grid, grid, grid, indexing="ij")
    noise = np.random.default_rng(seed).normal(0, 0.01, x.shape)
    return (np.exp(-((x - offset) ** 2 + y**2 + z**2) * 4) + noise)[None].astype(np.float32)


IMAGES = {"a": volume(-0.6), "b": volume(0.0, 1), "c": volume(0.5, 2), "d": volume(0.1, 3)}


def resolve(folder, train, val=(), labelled=tuple("abcd"), fold=0, config=None, loader=IMAGES.__getitem__):
    return resolve_atlases(folder, config or OneShotConfig(), Fold(fold, train, list(val), list(labelled)), loader)


def never(case):
    raise AssertionError(f"image {case} was opened")


def test_fully_labelled_data_set_gets_the_image_most_like_the_others(tmp_path):
    choice = resolve(tmp_path, list("abcd"))
    assert choice.atlases == ["d"]
    assert "medoid" in choice.how
    assert json.loads((tmp_path / ATLAS_FILE).read_text())["chosen_by"] == "program"


def test_choice_is_kept_and_no_image_is_read_again(tmp_path):
    resolve(tmp_path, list("abcd"))
    assert resolve(tmp_path, list("abcd"), loader=never).atlases == ["d"]


def test_another_atlas_is_chosen_and_stored_for_a_fold_that_holds_it_out(tmp_path):
    resolve(tmp_path, list("abcd"))
    assert resolve(tmp_path, list("abc"), "d", fold=3).atlases == ["b"]
    stored = json.loads((tmp_path / ATLAS_FILE).read_text())
    assert stored["atlases"] == ["d"]
    assert stored["folds"]["3"]["atlases"] == ["b"]
    assert resolve(tmp_path, list("abc"), "d", fold=3, loader=never).atlases == ["b"]
    assert resolve(tmp_path, list("abcd"), loader=never).atlases == ["d"]


def test_it_does_not_matter_which_fold_is_trained_first(tmp_path):
    splits = [{"train": list("abc"), "val": ["d"]}, {"train": list("abd"), "val": ["c"]}]
    for name, folds in (("forwards", (0, 1)), ("backwards", (1, 0))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "splits_final.json").write_text(json.dumps(splits))
        for fold in folds:
            parts = splits[fold]
            assert resolve(tmp_path / name, parts["train"], parts["val"], fold=fold).atlases == ["b"]


def test_every_labelled_training_case_of_a_partly_labelled_data_set_is_an_atlas(tmp_path):
    assert resolve(tmp_path, list("abc"), "d", "ad", loader=never).atlases == ["a"]
    assert resolve(tmp_path, list("bcd"), "a", "ad", 1, loader=never).atlases == ["d"]
    assert resolve(tmp_path, list("abcd"), "", "ad", "all", loader=never).atlases == ["a", "d"]


def test_plans_come_before_the_file(tmp_path):
    save_choice(str(tmp_path), ["a"], by_user=True, how="")
    assert resolve(tmp_path, list("abcd"), config=OneShotConfig(atlases=("c",)), loader=never).atlases == ["c"]


@pytest.mark.parametrize("entry", [{"chosen_by": "user"}, {"chosen_by": "program", "program_choice": ["b"]}])
def test_users_atlas_in_validation_is_refused_even_if_only_the_name_was_edited(tmp_path, entry):
    (tmp_path / ATLAS_FILE).write_text(json.dumps({"atlases": ["a"], **entry}))
    with pytest.raises(OneShotError, match="validation part of fold 2"):
        resolve(tmp_path, list("bcd"), "a", fold=2)


def test_atlas_of_the_plans_in_validation_is_refused(tmp_path):
    with pytest.raises(OneShotError, match="validation part"):
        resolve(tmp_path, list("bcd"), "a", config=OneShotConfig(atlases=("a",)))


@pytest.mark.parametrize(("name", "message"), [("b", "has no label"), ("x", "is not a case")])
def test_named_atlas_without_label_is_refused_with_the_labelled_cases(tmp_path, name, message):
    with pytest.raises(OneShotError, match=rf"{message}.*\(a, c\)"):
        resolve(tmp_path, list("abcd"), labelled="ac", config=OneShotConfig(atlases=(name,)))


@pytest.mark.parametrize(
    "content", ['{"atlases": []}', '{"atlases": "a"}', "[]", "{", '{"atlases": ["a"], "folds": 3}']
)
def test_damaged_file_is_refused_and_kept(tmp_path, content):
    (tmp_path / ATLAS_FILE).write_text(content)
    with pytest.raises(OneShotError, match=ATLAS_FILE):
        resolve(tmp_path, list("abcd"))
    assert (tmp_path / ATLAS_FILE).read_text() == content


def test_new_labels_of_a_partly_labelled_data_set_become_atlases(tmp_path):
    assert resolve(tmp_path, list("abcd"), "", "a", "all", loader=never).atlases == ["a"]
    assert forget_outdated_choice(tmp_path, "abcd", "a") == [] and (tmp_path / ATLAS_FILE).is_file()
    assert forget_outdated_choice(tmp_path, "abcd", "ac") == ["c"]
    assert resolve(tmp_path, list("abcd"), "", "ac", "all", loader=never).atlases == ["a", "c"]


@pytest.mark.parametrize("labelled", ["ac", "abcd"])
def test_a_choice_of_the_user_or_among_all_labels_outlives_new_labels(labelled, tmp_path):
    save_choice(tmp_path, ["a"], by_user=labelled == "ac", how="named")
    before = (tmp_path / ATLAS_FILE).read_text()
    assert forget_outdated_choice(tmp_path, "abcd", labelled) == []
    assert (tmp_path / ATLAS_FILE).read_text() == before
