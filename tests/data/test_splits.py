"""Folds for any number of labelled cases."""

import json

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_oneshot.data.splits import Fold, check_splits, fold_number, read_splits, resolve_fold
from nnunet_oneshot.errors import OneShotError


def names(count):
    return [f"c{number:02d}" for number in range(count)]


def all_folds(folder, cases, labelled):
    parts(folder, cases, labelled, 0)
    count = len(json.loads((folder / "splits_final.json").read_text()))
    return [parts(folder, cases, labelled, fold) for fold in range(count)]


def parts(folder, cases, labelled, number):
    fold = resolve_fold(folder, cases, labelled, number)
    assert fold.number == number and fold.labelled == sorted(labelled)
    return fold.train, fold.validation


def test_one_labelled_and_one_unlabelled_give_one_fold_without_validation(tmp_path):
    assert all_folds(tmp_path, names(2), ["c01"]) == [(["c00", "c01"], [])]


@pytest.mark.parametrize(("count", "folds"), [(3, 2), (4, 3), (6, 5), (12, 5)])
def test_one_labelled_case_stays_in_training_while_unlabelled_ones_are_held_out_in_turn(tmp_path, count, folds):
    found = all_folds(tmp_path, names(count), ["c02"])
    assert len(found) == folds
    assert all("c02" in train and val for train, val in found)
    assert sorted(case for _, val in found for case in val) == [case for case in names(count) if case != "c02"]


def test_several_labelled_cases_are_held_out_in_turn_and_unlabelled_ones_always_train(tmp_path):
    labelled = ["c00", "c04", "c07"]
    found = all_folds(tmp_path, names(9), labelled)
    assert sorted(case for _, val in found for case in val) == labelled
    assert all(set(names(9)) - set(labelled) <= set(train) for train, _ in found)
    assert all(set(train) & set(labelled) for train, _ in found)


@pytest.mark.parametrize("count", [5, 12])
def test_fully_labelled_data_sets_get_nnunets_own_folds(tmp_path, count):
    found = all_folds(tmp_path, names(count)[::-1], names(count))
    expected = generate_crossval_split(names(count), seed=12345, n_splits=5)
    assert [{"train": train, "val": val} for train, val in found] == expected


def test_fewer_than_five_fully_labelled_cases_give_one_fold_a_case(tmp_path):
    assert sorted(val[0] for _, val in all_folds(tmp_path, names(3), names(3))) == names(3)


def test_fold_all_trains_on_everything_and_writes_nothing(tmp_path):
    assert parts(tmp_path, names(4), ["c00"], "all") == (names(4), [])
    assert not (tmp_path / "splits_final.json").exists()


def test_existing_splits_are_used_as_they_are(tmp_path):
    splits = [{"train": ["c00", "c03"], "val": ["c01"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    assert parts(tmp_path, names(4), ["c00"], 0) == (["c00", "c03"], ["c01"])


@pytest.mark.parametrize("labelled", [["c00"], names(10)])
@pytest.mark.parametrize("fold", range(5, 12))
def test_fold_beyond_the_file_keeps_a_labelled_case_in_training(tmp_path, labelled, fold):
    train, val = parts(tmp_path, names(10), labelled, fold)
    assert set(train) & set(labelled)
    assert sorted(train + val) == names(10)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([{"train": ["c00", "x"], "val": []}], "not in the data set"),
        ([{"train": ["c00", "c01"], "val": ["c01"]}], "both in training and validation"),
        ([{"train": ["c01", "c02"], "val": ["c00"]}], "no labelled case"),
        ([{"train": ["c00"]}], 'lacks "val"'),
        ({"train": []}, "must hold a list"),
        ([{"train": ["c00", "c01", "c01"], "val": []}], "more than once"),
        ([{"train": ["c00", 3], "val": []}], "must hold text .* found 3"),
        ("c00", "must hold a list .*found"),
        ([], "holds no fold"),
    ],
)
def test_unusable_splits_file_is_refused(tmp_path, splits, message):
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(OneShotError, match=message):
        resolve_fold(str(tmp_path), names(4), ["c00"], 0)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "holds no fold"),
        ([{"train": ["c00"], "val": ["c01"]}, {"train": ["c00"], "val": ["x"]}], "Fold 1 .*not in the data set"),
        ([{"train": ["c00"], "val": ["c00"]}], "both in training and validation"),
    ],
)
def test_all_folds_of_a_file_are_checked_before_it_is_taken_over(tmp_path, splits, message):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps(splits))
    with pytest.raises(OneShotError, match=message):
        check_splits(path, names(4))


def test_folds_without_an_atlas_are_left_to_their_training(tmp_path):
    splits = [{"train": ["c01", "c02"], "val": ["c00"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    assert check_splits(tmp_path / "splits_final.json", names(4)) == read_splits(tmp_path / "splits_final.json")


def test_damaged_splits_file_is_refused(tmp_path):
    (tmp_path / "splits_final.json").write_text("[{")
    with pytest.raises(OneShotError, match="not valid JSON"):
        resolve_fold(str(tmp_path), names(4), ["c00"], 0)


def test_scored_are_the_validation_cases_with_a_label():
    assert Fold(0, ["a"], ["b", "c", "d"], ["a", "b", "d"]).scored == ["b", "d"]


@pytest.mark.parametrize(("text", "number"), [("all", "all"), ("3", 3), (0, 0)])
def test_folds_are_numbers_or_all(text, number):
    assert fold_number(text) == number


@pytest.mark.parametrize("text", ["-1", "one", "", "1.0"])
def test_anything_else_is_no_fold(text):
    with pytest.raises(OneShotError, match="neither a number nor 'all'"):
        fold_number(text)


@pytest.mark.parametrize(("cases", "labelled", "message"), [(["c0"], ["c0"], "1 case"), (names(4), [], "no labelled")])
def test_too_little_data_is_refused(tmp_path, cases, labelled, message):
    with pytest.raises(OneShotError, match=message):
        resolve_fold(str(tmp_path), cases, labelled, 0)
