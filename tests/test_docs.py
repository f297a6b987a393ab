"""README and docs: links resolve, quoted commands and names exist, and every option and setting is listed."""

import importlib
import importlib.util
import re
import shlex
from importlib.metadata import distribution
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_quoted_commands_parse(page, capsys):
    stock = {entry.name for entry in distribution("nnunetv2").entry_points}
    for line in shell_lines(page):
        # What a shell would hand over: assignments and substitutions play no part in parsing.
        words = shlex.split(line, comments=True) if line.count('"') % 2 == 0 and line.count("'") % 2 == 0 else []
        if words[:1] == ["nnunet_oneshot"]:
            try:
                build_parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{line}\n{capsys.readouterr().err}")
        elif words and words[0].startswith("nnUNetv2_"):
            assert words[0] in stock
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`nnunet_oneshot ([a-z][\w-]*)", text)) <= set(SUBPARSERS.choices)
    assert set(re.findall(r"\bnnUNetv2_\w+", text)) <= stock


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
