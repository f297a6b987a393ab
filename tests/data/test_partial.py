"""Labelled cases that show some of the structures: declaration, checks, and what comes of it."""

import json

import numpy as np
import pytest
from tiny_data import read_image, write_image

from nnunet_oneshot.cli import main
from nnunet_oneshot.data.partial import (
    averaged_probabilities,
    check_partial,
    hidden_labels,
    require_every_label,
)
from nnunet_oneshot.errors import OneShotError

LABELS = {"background": 0, "left": 1, "right": 2, "top": 3, "ignore": 4}


def described(partial, labels=LABELS):
    return {"labels": labels, "oneshot": {"partial": partial}}


def test_labels_that_are_not_listed_are_hidden():
    content = described({"a": ["left"], "b": ["top", "right", "left"], "c": ["right", "top"]})
    check_partial(content, "dataset.json")
    assert hidden_labels(content) == {"a": (2, 3), "c": (1,)}
    assert hidden_labels({"labels": LABELS}) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": LABELS, "oneshot": []}, '"oneshot" in d.json is'),
        ({"labels": LABELS, "oneshot": {"partly": {}}}, '"oneshot" in d.json is'),
        (described([]), '"oneshot" in d.json is'),
        (described({"a": "left"}), 'Case "a" of "oneshot" in d.json shows "left"'),
        (described({"a": []}), "expected a list of one or more of left, right, top"),
        (described({"a": ["left", "left"]}), "each once"),
        (described({"a": ["liver"]}), "liver"),
        (described({"a": ["background"]}), "background"),
        (described({"a": ["ignore"]}), "ignore"),
        (described({"a": [1]}), "shows"),
        (described({"a": ["left"]}, {"background": 0, "both": [1, 2], "left": 1}), "regions"),
    ],
)
def test_a_declaration_of_another_shape_is_refused(content, message):
    with pytest.raises(OneShotError, match=message.replace("[", r"\[")):
        check_partial(content, "d.json")


def test_each_structure_needs_an_atlas_that_shows_it():
    content = described({"a": ["left"], "b": ["left", "right"]})
    require_every_label(content, ["a", "b", "c"], 0)
    with pytest.raises(OneShotError, match="None of the atlases of fold 3 .a, b. shows top"):
        require_every_label(content, ["a", "b"], 3)


def test_background_of_a_partly_labelled_atlas_does_not_vote_against_what_it_hides():
    """Three voxels: left, right and nothing. One atlas shows left alone, the other right alone."""
    first = np.array([[0.2, 1, 1], [0.8, 0, 0], [0, 0, 0]])
    second = np.array([[1, 0.3, 1], [0, 0, 0], [0, 0.7, 0]])
    found = {"a": first, "b": second}

    def averaged(found, hidden):
        # The first is overwritten.
        return averaged_probabilities([(name, values.copy()) for name, values in found.items()], [0, 1, 2], hidden)

    assert np.array_equal(averaged(found, {}), (first + second) / 2)
    shown = averaged(found, {"a": (2,), "b": (1,)})
    assert np.allclose(shown, [[0.2, 0.3, 1], [0.8, 0, 0], [0, 0.7, 0]])
    # A label that no atlas shows is carried nowhere.
    assert np.allclose(averaged({"a": first}, {"a": (2,)}), first)
    # An atlas that shows all counts for all.
    both = averaged({**found, "c": second}, {"a": (2,), "b": (1,)})
    assert np.allclose(both[1:], [[0.4, 0, 0], [0, 0.7, 0]])


@pytest.fixture
def partly(tiny_dataset):
    """A function that makes a data set in which case_00 shows the left and case_01 the right structure alone."""

    def make(*, honest=True, **settings):
        shown = {"case_00": ["left"], "case_01": ["right"]}
        dataset = tiny_dataset(**{"labelled": ("case_00", "case_01"), "n_cases": 4, **settings})
        dataset.edit_json(oneshot={"partial": shown})
        for case, kept in (("case_00", 1), ("case_01", 2)):
            label = read_image(dataset.label(case))
            if honest:
                label[label != kept] = 0
            write_image(dataset.label(case), label)
        return dataset

    return make


def plan(dataset, *arguments):
    command = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres"]
    return main([*command, "--no_pbar", *arguments])


def test_partial_labels_are_planned_without_a_warning_of_what_is_missing(partly, capsys):
    dataset = partly()
    assert plan(dataset, "--atlas", "case_00", "case_01") == 0
    output = capsys.readouterr().out
    assert "no voxel of" not in output and "Fingerprint" in output
    assert "Note: the labels of case_00, case_01 show some structures only." in output
    assert json.loads((dataset.preprocessed / "dataset.json").read_text())["oneshot"]["partial"]["case_00"] == ["left"]


def test_a_label_that_holds_what_it_is_said_not_to_show_is_refused(partly, capsys):
    assert plan(partly(honest=False), "--atlas", "case_00") == 1
    assert 'holds the values [2], which "oneshot" in dataset.json declares as not shown' in capsys.readouterr().err


def test_a_declaration_that_is_added_later_is_checked_too(partly, capsys):
    dataset = partly(honest=False)
    dataset.edit_json(oneshot=None)
    assert plan(dataset, "--atlas", "case_00", "case_01", "--no_pp") == 0
    dataset.edit_json(oneshot={"partial": {"case_00": ["left"]}})
    assert plan(dataset, "--atlas", "case_00", "case_01", "--no_pp") == 1
    assert "holds the values [2]" in capsys.readouterr().err


def test_a_declared_case_without_a_label_is_refused(partly, capsys):
    dataset = partly()
    dataset.edit_json(oneshot={"partial": {"case_03": ["left"], "nobody": ["right"]}})
    assert plan(dataset) == 1
    assert "case_03, nobody, which have no label" in capsys.readouterr().err


def test_every_case_is_an_atlas_where_all_are_labelled_but_some_in_part(partly, capsys):
    dataset = partly(labelled="all")
    assert plan(dataset, "--no_pp") == 0
    splits = json.loads((dataset.preprocessed / "splits_final.json").read_text())
    assert f"Atlas: {', '.join(splits[0]['train'])} (" in capsys.readouterr().out
