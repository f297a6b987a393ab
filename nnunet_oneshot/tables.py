"""Tables in Markdown and CSV in which no name from a file becomes markup, another cell or a formula."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Sequence

# Inside a word an underscore means nothing, so that names such as case_00 stay as they are.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_FORMULA = re.compile(r"\s*[=+\-@]")


class Markup(str):
    """Markdown of our own, which a table takes as it is."""


def plain(text: str) -> Markup:
    """Text on one line of Markdown, or in a cell of its table, in which no name becomes markup."""
    return Markup(_MARKUP.sub(r"\\\g<0>", html.escape(" ".join(str(text).split()), quote=False)))


def code(text: str) -> Markup:
    """Text as code in a line of Markdown, outside of tables."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Markup(f"{fence}{space}{line}{space}{fence}")


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; cells that are no `Markup` are plain text."""
    rows = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(cell if isinstance(cell, Markup) else plain(cell) for cell in row)} |" for row in rows]


def csv_table(header: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """The text of a table; text with which a spreadsheet would calculate gets an apostrophe in front."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([_no_formula(cell) for cell in row] for row in [header, *body])
    return buffer.getvalue()


def _no_formula(cell: object) -> object:
    if not isinstance(cell, str) or not _FORMULA.match(cell):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell
