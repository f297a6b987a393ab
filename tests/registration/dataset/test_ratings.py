"""Ratings of registrations: exported files are kept beside the plans, and bad pairs are told and left out."""

import csv
import json

import numpy as np
import pytest
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.registration.dataset import ratings as module
from nnunet_oneshot.registration.dataset.cache import FOLDER, RegistrationCache
from nnunet_oneshot.registration.pair.registration import Registration

DATASET, NAME = "Dataset901_Tiny", "plans_3d"
QUALITY = {"similarity_before": 0.2, "similarity_after": 0.5, "folding": 0.0, "affine_start": "moments"}


@pytest.fixture
def base(tmp_path):
    (tmp_path / DATASET).mkdir()
    return tmp_path / DATASET


def rating(case, value, key="", **changes):
    return {"registrations": NAME, "atlas": "a", "case": case, "rating": value, "key": key, **changes}


def exported(path, *ratings, **changes):
    content = {"format": module.FORMAT, "version": 1, "dataset": DATASET, "ratings": list(ratings), **changes}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def cached(base, *cases, key="k"):
    cache = RegistrationCache(base / FOLDER / NAME)
    for case in cases:
        pair = Registration("a", case, np.eye(4), np.zeros((3, 1, 1, 1), np.float32), (2, 2, 2), (2, 2, 2), QUALITY)
        cache.save(pair, key=key, sources={}, parameters={}, versions={})
    return cache


def test_an_exported_file_is_added_and_later_ratings_replace_earlier_ones(base, tmp_path):
    assert module.stored_ratings(base) == []
    first = exported(tmp_path / "first.json", rating("b", "bad"), rating("c", "good"), rating("é", "doubtful"))
    assert module.keep_ratings(base, first) == 3
    second = exported(tmp_path / "second.json", rating("b", "good", "k"), rating("c", "none"), rating("d", "bad"))
    module.keep_ratings(base, second)
    assert {r.case: r.rating for r in module.stored_ratings(base)} == {"b": "good", "d": "bad", "é": "doubtful"}
    # A copy is as good as the command.
    (base / module.RATINGS_FILE).write_bytes(first.read_bytes())
    assert {r.case: r.rating for r in module.stored_ratings(base)} == {"b": "bad", "c": "good", "é": "doubtful"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ({"dataset": "Dataset002_Other"}, "Dataset002_Other"),
        ({"ratings": {}}, "must hold a list"),
        ({"ratings": [3]}, "holds the rating 3"),
        ({"ratings": [rating("b", "awful")]}, 'b "awful": expected one of good, doubtful, bad'),
        ({"version": 9}, '"version": 1'),
    ],
)
def test_a_file_of_another_kind_is_refused_and_nothing_kept_is_lost(base, tmp_path, content, match):
    module.keep_ratings(base, exported(tmp_path / "good.json", rating("b", "bad")))
    path = tmp_path / "other.json"
    path.write_text(content) if isinstance(content, str) else exported(path, **content)
    with pytest.raises(OneShotError, match=match):
        module.keep_ratings(base, path)
    assert [r.case for r in module.stored_ratings(base)] == ["b"]


def test_bad_pairs_are_rejected_unless_they_were_registered_again_in_another_way(base, tmp_path):
    cache, log = cached(base, "b", "c", "d", "e", key="now"), []
    pairs = [("a", case) for case in "bcde"]
    assert module.rejected_pairs(base, cache, pairs, log.append) == frozenset() and log == []
    entries = [rating("b", "bad"), rating("c", "bad", "now"), rating("d", "bad", "earlier"), rating("e", "doubtful")]
    other = rating("e", "bad", registrations="plans_2d")
    module.keep_ratings(base, exported(tmp_path / "r.json", *entries, other))
    assert module.rejected_pairs(base, cache, pairs, log.append) == {("a", "b"), ("a", "c")}
    assert "2 of 4 registrations are left out, since they are rated bad" in log[0] and "b, c." in log[0]
    assert "1 bad ratings" in log[1] and "(d)" in log[1]
    assert module.rejected_pairs(base, cache, pairs[2:], log.append) == frozenset()


def test_the_table_of_register_says_that_a_bad_pair_is_not_used(tiny_dataset, monkeypatch, capsys):
    torch.set_num_threads(1)
    dataset = tiny_dataset(n_cases=3)
    plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    assert main(plan) == 0
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [1]}}))
    register = ["register", "-d", str(dataset.id), "-c", "3d_fullres", "-p", "nnUNetOneShotCPUPlans", "--no_figures"]
    assert main(register) == 0
    (table,) = dataset.preprocessed.rglob("quality_case_00.csv")
    assert {row["used_in_training"] for row in csv.DictReader(table.open())} == {"yes"}
    bad = {**rating("case_02", "bad"), "registrations": table.parent.name, "atlas": "case_00"}
    exported(dataset.preprocessed / module.RATINGS_FILE, bad, dataset=dataset.name)
    capsys.readouterr()
    assert main(register) == 0
    assert "1 of 2 registrations are left out" in capsys.readouterr().out
    assert {r["case"]: r["used_in_training"] for r in csv.DictReader(table.open())} == {
        "case_01": "yes",
        "case_02": "no",
    }
