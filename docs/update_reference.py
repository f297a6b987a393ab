"""Writes the generated tables of the reference: ``python docs/update_reference.py``.

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from pathlib import Path

import nnunet_oneshot.config as config
import nnunet_oneshot.registries as registries
from nnunet_oneshot.cli import build_parser
from nnunet_oneshot.registry import Registry

DOCS = Path(__file__).resolve().parent
PAGES = tuple(DOCS / "reference" / name for name in ("commands.md", "plans_block.md", "registered.md"))
_SECTION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """A page with its generated parts brought up to date."""
    return _SECTION.sub(lambda match: f"{match[1]}\n{_content(match[2])}\n\n{match[3]}", text)


def _content(name: str) -> str:
    if name in registries.__all__:
        return registered(getattr(registries, name))
    return commands() if name == "commands" else settings(getattr(config, name))


def registered(registry: Registry) -> str:
    """A table of what is registered, with its meaning and, for ablations, its settings."""
    rows = []
    for name, entry in registry.items():
        changed = [f"`{json.dumps(entry.settings)}`"] if registry is registries.ABLATIONS else []
        rows.append([f"`{name}`", _as_markdown(registry.meaning(name)), *changed])
    return _table(["name", "meaning", *(["settings"] if registry is registries.ABLATIONS else [])], rows)


def settings(cls: type) -> str:
    """A table of a config dataclass: name, default, what is allowed and the meaning that its docstring gives."""
    meanings = _attributes(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING:
            rows.append([f"`{field.name}`", "see below", "an object", f"see [`{field.name}`](#{field.name})"])
        else:
            allowed = config.form_of(field).expected
            rows.append([f"`{field.name}`", f"`{json.dumps(field.default)}`", allowed, meanings[field.name]])
    return _table(["setting", "default", "allowed", "meaning"], rows)


def _attributes(cls: type) -> dict[str, str]:
    """Name to meaning, from the ``Attributes`` section of a docstring."""
    section = inspect.getdoc(cls).split("Attributes:\n", 1)[1]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: _as_markdown(" ".join(text.split())) for name, text in entries}


def _as_markdown(text: str) -> str:
    return text.replace("``", "`")


def commands() -> str:
    """A section for each subcommand: description, and a table of its options."""
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = []
    for name, parser in subparsers.choices.items():
        parts.append(f"## {name}\n\n{' '.join(parser.description.split())}")
        rows = [_option(action) for action in parser._actions if not isinstance(action, argparse._HelpAction)]
        parts.append(_table(["option", "meaning"], rows) if rows else "No options.")
    return "\n\n".join(parts)


def _option(action: argparse.Action) -> list[str]:
    if not action.option_strings:
        return [f"`{action.metavar}`", f"**required**; {action.help}"]
    value = ""
    if action.nargs != 0:
        metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
        value = " " + (metavar or "|".join(action.choices or ()) or action.dest.upper())
        value += " ..." if action.nargs == "+" else ""
    meaning = (action.help or "") % {"default": action.default}
    required = "**required**; " if action.required else ""
    return [", ".join(f"`{string}{value}`" for string in action.option_strings), required + meaning]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
