"""README and docs claim no accuracy and no speed that a record in ``docs/evidence`` does not hold."""

import csv
import dataclasses
import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from nnunet_oneshot import config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
EVIDENCE = DOCS / "evidence"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if EVIDENCE not in page.parents)]
RECORDS = sorted(path.parent for path in EVIDENCE.glob("*/record.json"))

# Numbers with a unit or a decimal point that are no results. Keep this list short.
NO_CLAIMS = (
    r"arXiv[: ]\d+\.\d+",  # papers
    r"\b\d+\.\d+\.\d+\b",  # versions
    r"Python 3\.\d+|Apache-2\.0",  # versions
    r"95 % (bootstrap )?(confidence )?intervals?",  # the kind of interval
    r"30 and 60 %",  # when the rounds take place, a default
    r"3\.5 robust standard deviations",  # the bound of the flag, a default
    r"0\.001, and 0\.003 in the CPU preset",  # the learning rate, a default
    r"Dice of at least 0\.3, and 0\.1 above",  # the rule by which axes are mirrored
    r"NSD at 2 mm",  # the tolerance of a metric
    r"\d+(\.\d+)? GB",  # memory
)

SETTINGS = "|".join(
    field.name
    for cls in (config.OneShotConfig, config.RegistrationConfig, config.SynthesisConfig, config.DistillationConfig)
    for field in dataclasses.fields(cls)
)
NUMBER = r"(?<![\w.])\d{1,3}(?:,\d{3})+(?!\d)|(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)"
SERIES = rf"(?:{NUMBER})(?:(?:\s*[,\u2013-]\s*|\s+and\s+|\s+or\s+|\s+to\s+|\s*,\s+and\s+)[+-]?(?:{NUMBER}))*"
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
AS_IT_IS, PERCENT = (1.0,), (1.0, 100.0)
# What a unit may be a multiple of in a table: seconds for times, shares for points and %.
UNITS = {
    r"s|seconds?": AS_IT_IS,
    r"minutes?|min": (1.0, 1 / 60),
    r"hours?|h": (1.0, 1 / 3600),
    r"ms": (1.0, 1000.0),
    r"points?|mm|-fold|times(?= (?:as|faster|slower|longer|more|less|the)\b)": PERCENT,
}
# Speeds in words have no value to look up, but need a record too.
SPELLED = r"\b(?:half|twice|double|thirds?|quarters?|fifth)\b[^.;|]{0,25}\b(?:time|as long|as fast|iteration)\b"
METRIC = r"Dice|HD95|NSD|seconds|points|%|\btime\b"
LINKED = re.compile(r"\]\([^)\s]*evidence/(\w+)(?:/[^)\s]*)?\)")


def build_evidence():
    spec = importlib.util.spec_from_file_location("build_evidence", DOCS / "build_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(path):
    return str(path.relative_to(ROOT))


def numbers(text):
    """All numbers of a text; names such as ``hippocampus_303`` and dates are none."""
    return [float(match.replace(",", "")) for match in re.findall(NUMBER, re.sub(r"\d{4}-\d\d-\d\d", "", text))]


def held(record):
    """All numbers in the tables of a record."""
    return [value for path in record.glob("*.csv") for value in numbers(path.read_text(encoding="utf-8"))]


def plain(text):
    """Text without targets of links, names in code, values of settings and what is no claim."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(rf"`(?:\w+\.)?(?:{SETTINGS})`(?: is| of)?\s+[(`]?(?:{NUMBER})", "CODE", text)
    text = re.sub(r"`[^`\n]*[A-Za-z][^`\n]*`", "CODE", text)
    text = re.sub(r"\[([^\]]*[A-Za-z][^\]]*)\]", r"\1", text)
    return re.sub("|".join(NO_CLAIMS), "", text.replace("\n", " "))


def claims(text, *, metric=False):
    """Numbers in a text that claim accuracy or speed, each with the factors by which a record may hold it.

    Args:
        text: Prose or a cell of a table.
        metric: Whether every number counts, as in a column of scores.
    """
    text = plain(text)
    found = {}
    for unit, factors in {**UNITS, "%": PERCENT}.items():
        for match in re.finditer(rf"({SERIES})\s*(?:{unit})(?!\w)", text):
            found |= {(match.start() + m.start(), m[0]): factors for m in re.finditer(NUMBER, match[1])}
        for match in re.finditer(rf"\b({'|'.join(WORDS)}) (?:{unit})(?!\w)", text):
            found[match.start(), str(WORDS[match[1]])] = factors
    spans = [(0, len(text))] if metric else [m.span() for m in re.finditer(r"\[[-+\d., ]+\]", text)]
    for match in re.finditer(NUMBER, text):
        if "." in match[0] or any(start <= match.start() < end for start, end in spans):
            found.setdefault((match.start(), match[0]), PERCENT)
    return [(number, factors) for (_, number), factors in sorted(found.items())]


def is_held(number, factors, values):
    """Whether one of the values is the number, at the precision with which it is displayed."""
    shown = float(number.replace(",", ""))
    tolerance = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
    return any(abs(value * factor - shown) <= tolerance for value in values for factor in factors)


def blocks(text):
    """Paragraphs, headings, list items and tables of a page, without code and generated parts."""
    text = re.sub(r"<!-- generated.*?<!-- end -->|```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    found = []
    for chunk in re.split(r"\n\s*\n", text):
        for line in chunk.strip("\n").splitlines():
            kind = "table" if line.startswith("|") else "text"
            begins = not found or found[-1][0] != kind or re.match(r"\s*([-*]|\d+\.) |#", line)
            if begins and not (kind == "table" and found and found[-1][0] == "table"):
                found.append((kind, [line]))
            else:
                found[-1][1].append(line)
        found.append(("end", []))
    return [(kind, "\n".join(lines)) for kind, lines in found if lines]


def claims_of_table(text):
    """Claims of each cell; in a column that a metric heads, every number is one."""
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    metric = [bool(re.search(METRIC, title)) for title in header]
    return [
        claim
        for row in rows
        for cell, all_count in zip(row, metric, strict=True)
        for claim in claims(cell, metric=all_count)
    ]


def unrecorded(text, evidence=EVIDENCE):
    """Sentences about every claim of a page that no record named beside it holds."""
    problems = []
    parts = blocks(text)
    for i, (kind, block) in enumerate(parts):
        beside = [part for near, part in parts[max(i - 1, 0) : i + 2] if near == "text"] if kind == "table" else []
        named = {record for part in (block, *beside) for record in LINKED.findall(part)}
        problems += [
            f"no such record: {record}" for record in named if not (evidence / record / "record.json").exists()
        ]
        values = [value for record in named for value in held(evidence / record)]
        found = claims_of_table(block) if kind == "table" else claims(block)
        start = f"{block[:60]!r}"
        if (found or re.search(SPELLED, plain(block))) and not named:
            problems.append(f"{start} names no record for {[number for number, _ in found] or 'its speed'}")
        problems += [
            f"{start}: {number} is in no table of {sorted(named)}"
            for number, factors in found
            if named and not is_held(number, factors, values)
        ]
    return problems


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_records_are_complete(record):
    content = json.loads((record / "record.json").read_text(encoding="utf-8"))
    module = build_evidence()
    assert tuple(content) == module.KEYS
    assert content["id"] == record.name and content["topic"] in module.TOPICS and content["claim"].endswith(".")
    assert all(content.values()) or content["note"], "what is not known is said in the note"
    tables = list(record.glob("*.csv"))
    assert record / "table.csv" in tables
    for table in tables:
        header, *rows = csv.reader(table.read_text(encoding="utf-8").splitlines())
        assert rows and {len(row) for row in rows} == {len(header)}, table


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_a_record_holds_its_claim(record):
    claim = json.loads((record / "record.json").read_text(encoding="utf-8"))["claim"]
    values = held(record)
    assert [number for number, factors in claims(claim) if not is_held(number, factors, values)] == []


@pytest.mark.parametrize("record", [path for path in RECORDS if (path / "runs").exists()], ids=lambda path: path.name)
def test_tables_are_the_means_of_their_runs(record):
    scores = defaultdict(list)
    for path in record.glob("runs/**/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        for score in run["scores"]:
            scores[run["method"], score["label"]].append(score["dice"])
    with (record / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["method"], row["label"]): float(row["dice_mean"]) for row in csv.DictReader(file)}
    assert {key for key in rows if key[1] != "mean over labels"} == set(scores)
    for key, values in scores.items():
        assert sum(values) / len(values) == pytest.approx(rows[key], abs=6e-5)


def test_every_folder_of_evidence_is_a_record():
    assert [path for path in EVIDENCE.iterdir() if path.is_dir() and path not in RECORDS] == []


def test_the_list_of_records_is_up_to_date():
    module = build_evidence()
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "run: python docs/build_evidence.py"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_claim_names_a_record_that_holds_it(page):
    assert unrecorded(page.read_text(encoding="utf-8")) == []


def test_pages_keep_to_their_length():
    def words(*pages):
        return sum(len(page.read_text(encoding="utf-8").split()) for page in pages)

    assert words(ROOT / "README.md") <= 900
    assert words(DOCS / "results.md", DOCS / "explanation" / "how_the_defaults_were_chosen.md") <= 1500


@pytest.fixture
def evidence(tmp_path):
    """One record with a table of a Dice, a difference and seconds."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "record.json").write_text("{}")
    (tmp_path / "small" / "table.csv").write_text("method,dice,gain,seconds\nours_303,0.8287,0.041,263\n")
    return tmp_path


@pytest.mark.parametrize(
    "claim",
    [
        "a Dice of 0.829",
        "gains 4.1 points",
        "gains 4.1 [4, 4]",
        "0.83",
        "takes 263 s",
        "takes 4 minutes",
        "four points",
        "83 %",
    ],
)
def test_a_claim_needs_a_record(claim, evidence):
    assert unrecorded(f"It has {claim}.", evidence) != []
    assert unrecorded(f"It has {claim} ([record](evidence/small/)).", evidence) == []


@pytest.mark.parametrize(
    "claim",
    ["0.828", "0.8290", "5.1 points", "five points", "264 s", "5 minutes", "84 %", "a gain [3, 4]", "3.03", "30.3 %"],
)
def test_a_record_must_hold_the_number(claim, evidence):
    assert len(unrecorded(f"It has {claim} ([record](evidence/small/table.csv)).", evidence)) == 1


def test_a_link_to_another_block_or_to_no_record_does_not_count(evidence):
    assert unrecorded("- It has 0.829.\n- See [record](evidence/small/).", evidence) != []
    assert unrecorded("It has 0.829 ([record](evidence/other/)).", evidence) != []


def test_a_table_is_recorded_by_the_paragraph_beside_it(evidence):
    table = "| method | Dice | seconds |\n| --- | --- | --- |\n| ours | 0.829 | 263 |\n"
    assert len(unrecorded(table, evidence)) == 1
    assert unrecorded(f"[Record](evidence/small/):\n\n{table}", evidence) == []
    assert unrecorded(f"{table}\n[Record](evidence/small/).", evidence) == []
    assert len(unrecorded(f"[Record](evidence/small/).\n\nOther text.\n\n{table}", evidence)) == 1
    assert len(unrecorded(f"{table.replace('263', '264')}\n[Record](evidence/small/).", evidence)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "`real_share=0.35` and 1000 epochs of 250 iterations",
        "Python 3.10, torch 2.14.1",
        "```\n0.829\n```",
        "37 labels",
    ],
)
def test_settings_are_no_claims(text, evidence):
    assert unrecorded(text, evidence) == []


def test_a_speed_in_words_is_a_claim(evidence):
    assert unrecorded("It takes twice the time.", evidence) != []
    assert unrecorded("It takes twice the time ([record](evidence/small/)).", evidence) == []
