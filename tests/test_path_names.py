"""Which names may become parts of paths."""

import pytest

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.names import check_name, inside


@pytest.mark.parametrize("name", ["case_01", "Fall 7", "a.b-c", "Müller", "x" * 180, "$HOME", "a;b", "3d_fullres"])
def test_usual_names_are_fine(name, tmp_path):
    assert check_name(name, "case", "dataset.json") == name
    assert inside(tmp_path, name, "case", "dataset.json").parent == tmp_path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("..", "means a folder"),
        (".", "means a folder"),
        ("../../../evil", "starts with '.'"),
        ("a/../../evil", "holds '/'"),
        ("/elsewhere/x", "holds '/'"),
        ("a\\b", "holds '\\\\'"),
        ("C:x", "holds ':'"),
        ("<script>", "holds '<', '>'"),
        (".DS_Store", "starts with '.'"),
        ("-rf", "starts with '-'"),
        ("case.", "ends in '.'"),
        ("case ", "ends in ' '"),
        ("a\nb", "holds '\\n'"),
        ("a\0b", "holds '\\x00'"),
        ("a\u202eb", "holds '\\u202e'"),
        ("\ud800", "no valid Unicode"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("x" * 181, "181 bytes"),
        ("ü" * 100, "200 bytes"),
        ("con.nii", "reserved"),
        (3, "no text but int"),
        (None, "no text but NoneType"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_place(name, reason):
    with pytest.raises(OneShotError) as caught:
        check_name(name, "case", "dataset.json")
    assert reason in str(caught.value) and "of dataset.json" in str(caught.value)
    assert len(str(caught.value)) < 500
