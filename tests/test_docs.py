"""README and docs: links resolve, quoted commands and names exist, and every option and setting is listed."""

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from doc_shell import console_scripts

from nnunet_oneshot.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)!?\[([^\]]*)\]\(([^)\s]+)\)")

(SUBPARSERS,) = build_parser()._subparsers._group_actions


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """The page without code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def headings(page):
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_lines(page):
    """Command lines of the page's bash blocks, continuation lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in line.split("&&"))


def commands(page):
    """Words of the commands in the page's bash blocks, with the variables that the page sets before."""
    variables = {}
    for line in shell_lines(page):
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), line)
        assigned = re.findall(r"""(\w+)=("[^"]*"|'[^']*'|\S*)""", re.sub("^export ", "", line))
        if assigned and re.match(r"(export )?\w+=", line):
            variables.update({name: value.strip("\"'") for name, value in assigned})
        # What reaches over several lines, such as Python's, is no command of ours.
        elif line.count('"') % 2 == 0 and line.count("'") % 2 == 0:
            yield shlex.split(line, comments=True)


def exported(package):
    """What a package lists in ``__all__``."""
    return set(importlib.import_module(f"nnunet_oneshot.{package}").__all__)


def update_reference():
    spec = importlib.util.spec_from_file_location("update_reference", ROOT / "docs" / "update_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    broken = []
    for _, target in LINK.findall(prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_sources_name_what_is_defined_there(page):
    for text, target in LINK.findall(prose(page)):
        if target.endswith(".py"):
            source = (page.parent / target).resolve().read_text(encoding="utf-8")
            assert re.search(rf"\b(def|class) {re.escape(text.strip('`'))}\b", source), (text, target)


def test_every_page_is_linked_from_the_contents():
    contents = ROOT / "docs" / "README.md"
    linked = {(contents.parent / target).resolve() for _, target in LINK.findall(prose(contents))}
    assert set((ROOT / "docs").rglob("*.md")) - linked == {contents}


@pytest.mark.parametrize("page", update_reference().PAGES, ids=name)
def test_reference_lists_every_option_and_setting(page):
    text = page.read_text(encoding="utf-8")
    assert update_reference().render(text) == text, "run: python docs/update_reference.py"


def test_every_setting_has_a_meaning():
    module = update_reference()
    for cls in ("OneShotConfig", "RegistrationConfig", "SynthesisConfig", "DistillationConfig"):
        assert f"<!-- generated: {cls} -->" in module.PAGES[1].read_text(encoding="utf-8")
        module.settings(getattr(module.config, cls))


def test_readme_names_every_subcommand_and_trainer():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [c for c in SUBPARSERS.choices if f"`nnunet_oneshot {c}`" not in text] == []
    assert [t for t in exported("trainers") if "epoch" not in t and f"`{t}`" not in text] == []


def test_reference_names_every_trainer_length_and_planner():
    trainers = (ROOT / "docs" / "reference" / "trainers.md").read_text(encoding="utf-8")
    lengths = {trainer.partition("_")[2] for trainer in exported("trainers")} - {""}
    assert [length for length in lengths if f"`_{length}`" not in trainers] == []
    planners = (ROOT / "docs" / "reference" / "planners.md").read_text(encoding="utf-8")
    assert [planner for planner in exported("planners") if f"`{planner}`" not in planners] == []


class Parsed(Exception):
    """Ends a command whose arguments its parser has taken."""


def entry_of(words):
    """The function that runs a command, and its arguments; None where it is neither nnU-Net's nor ours."""
    if words[:2] == ["python", "-m"] and words[2].startswith("nnunet_oneshot."):
        return importlib.import_module(words[2]).main, words[3:]
    if words and (words[0] == "nnunet_oneshot" or words[0].startswith("nnUNetv2_")):
        assert words[0] in console_scripts(), f"no such command: {words[0]}"
        return console_scripts()[words[0]].load(), words[1:]
    return None


def check_arguments(words, monkeypatch, capsys):
    """Gives a command to its own parser.

    Raises:
        AssertionError: The parser refuses it.
    """
    original = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    if (found := entry_of(words)) is None:
        return
    with monkeypatch.context() as changed:
        changed.setattr(argparse.ArgumentParser, "parse_args", parse)
        changed.setattr("sys.argv", [words[0], *found[1]])
        try:
            found[0](found[1]) if words[0] == "python" else found[0]()
        except Parsed:
            return
        except SystemExit:
            pass
    raise AssertionError(f"{' '.join(words)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_commands_parse(page, monkeypatch, capsys):
    for words in commands(page):
        check_arguments(words, monkeypatch, capsys)
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`nnunet_oneshot ([a-z][\w-]*)", text)) <= set(SUBPARSERS.choices)
    assert set(re.findall(r"\bnnUNetv2_\w+", text)) <= set(console_scripts())


@pytest.mark.parametrize(
    ("line", "parses"),
    [
        ("nnUNetv2_train 4 3d_fullres 0 $TR", True),
        ("nnUNetv2_train 4 3d_fullres 0 -trainer X", False),
        ("nnUNetv2_predict -d 4 -c 3d_fullres -i A -o B --nothing", False),
        ("nnunet_oneshot register -d 4 -c 3d_fullres --nothing", False),
        ("nnunet_oneshot nothing", False),
        ("python -m nnunet_oneshot.benchmarks.scale --nothing", False),
        ("nnUNetv2_nothing", False),
    ],
)
def test_an_option_that_does_not_exist_is_found(line, parses, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(f'```bash\nTR="-tr OneShotDistillTrainer -p PLANS"\n{line}\n```\n', encoding="utf-8")
    (words,) = commands(page)
    if parses:
        check_arguments(words, monkeypatch, capsys)
    else:
        with pytest.raises(AssertionError, match="nothing|-trainer"):
            check_arguments(words, monkeypatch, capsys)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_trainers_and_planners_exist(page):
    text = page.read_text(encoding="utf-8")
    quoted = set(re.findall(r"\bOneShot\w*Trainer(?:_\d+epochs?)?\b|\bOneShot\w*Planner\b", text))
    assert quoted <= exported("trainers") | exported("planners") | {"OneShotTrainer"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "how_to").glob("*.md")), ids=name)
def test_how_to_pages_say_when_to_use_them_and_what_they_cost(page):
    assert {"when-to-use", "downsides"} <= headings(page)


def test_readme_keeps_the_block_of_the_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^<!-- tests -->\n```bash\n(.*)\n```$", text, re.MULTILINE)
    assert "pytest" in command
