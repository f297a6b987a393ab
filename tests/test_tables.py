"""Tables whose names come from files: no name becomes markup, another cell or a formula."""

import csv
import re

import pytest

from nnunet_oneshot.evaluation.report import _summary_csv, _summary_markdown
from nnunet_oneshot.evaluation.runs import rows_of
from nnunet_oneshot.evaluation.statistics import ClosedGaps
from nnunet_oneshot.tables import Markup, code, csv_table, markdown_table, plain

NAMES = [
    "a|b",
    "a\nb",
    "<script>alert(1)</script>",
    "`x`",
    "*a*",
    "_a_",
    "__a__",
    "[a](b)",
    "$a$",
    "~~a~~",
    "\\",
    "=1+1",
]


def cells(line):
    return re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_one_cell_of_plain_text(name):
    header, rule, row = markdown_table([name, "b"], [[name, Markup("**1**")]])
    assert len(cells(header)) == len(cells(rule)) == len(cells(row)) == 2
    for text in (header, row.replace("**1**", "")):
        assert "<" not in text and not re.search(
            r"(?<!\\)[`*\[\]~$]|(?<![\\\w])_|(?<!\\)_(?!\w)", text.replace("\\\\", "")
        )
    assert row.endswith(" **1** |")


def test_usual_names_stay_readable():
    assert plain("case_00 left_lobe, 0.5") == "case_00 left_lobe, 0.5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a -b", "`a -b`"), ("a`b", "``a`b``"), ("`a``b", "``` `a``b ```"), ("a\nb", "`a b`"), ("<b>", "`<b>`")],
)
def test_code_ends_where_its_text_ends(text, expected):
    assert code(text) == expected


@pytest.mark.parametrize("name", ["a,b", 'a"b', "a\nb", "a;b", "-0.5", "left"])
def test_csv_keeps_names_and_numbers(name):
    text = csv_table(["name", "value"], [[name, -1.5]])
    assert list(csv.reader(text.splitlines(keepends=True))) == [["name", "value"], [name, "-1.5"]]


@pytest.mark.parametrize("name", ["=1+1", "+1+1", "-1+1", "@a", " =1", "\t=1", "-rf"])
def test_no_cell_is_calculated_by_a_spreadsheet(name):
    assert list(csv.reader(csv_table([name], []).splitlines(keepends=True))) == [[f"'{name}"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_with_such_names(name):
    scores = [{"case": "c", "label": label, "dice": 0.5, "hd95": 1.0, "nsd_2mm": 0.5} for label in (name, "left")]
    record = {"dataset": "Dataset001_A", "method": "distill", "atlas": name, "fold": 0, "seed": 1, "epochs": 1}
    record |= {"plans": "P", "configuration": "3d_fullres", "device": "cpu", "versions": {"torch": "2"}, "seconds": 1.0}
    record |= {"peak_memory_mb": None, "resumed": False, "overrides": {"atlases": [name]}, "command": f"run {name}"}
    record["scores"] = scores
    rows = rows_of(record)
    lines = _summary_markdown(rows, [record], ClosedGaps("nnunet-atlas", "nnunet-full", {})).splitlines()
    tables = [line for line in lines if line.startswith("| ")]
    assert {len(cells(line)) for line in tables} == {8, 9}
    assert not any("<" in line for line in tables)
    written = list(csv.reader(_summary_csv(rows, [record]).splitlines(keepends=True)))
    assert {len(row) for row in written} == {12}
    assert written[1][1].removeprefix("'") == name
