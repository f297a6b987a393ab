"""For MkDocs: links to files outside of ``docs`` lead nowhere on the site and become their text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs' hook: the page's text before it is rendered."""
    folder = (_DOCS / page.file.src_uri).parent

    def render(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        leaves = "://" not in target and not _inside(folder / target)
        return text if leaves else match[0]

    return _LINK.sub(render, markdown)


def _inside(target: Path) -> bool:
    return Path(os.path.normpath(target)).is_relative_to(_DOCS)
