"""Pages from templates: one file with everything in it, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.io import save_text_atomic

_TEMPLATES = Path(__file__).parent / "templates"
# How a page of ours is known, so that no other file is replaced.
MARK = '<meta name="generator" content="nnunet_oneshot">'
_READ = 4096


def render(template: str, content: Mapping[str, Any]) -> str:
    """The text of a page; everything in ``content`` is escaped.

    Args:
        template: A file in ``templates``.
        content: Its variables.
    """
    return _environment().get_template(template).render(content, mark=MARK)


def save_page(text: str, target: str | os.PathLike) -> None:
    """Writes a page.

    Raises:
        OneShotError: Another file lies there, or it cannot be written.
    """
    path = Path(target)
    if path.is_dir():
        raise OneShotError(f"{path} is a folder: give -o the name of a file, such as {path / 'report.html'}.")
    if path.exists():
        try:
            with path.open(encoding="utf-8", errors="replace") as stream:
                ours = MARK in stream.read(_READ)
        except OSError as error:
            raise OneShotError(f"{path} cannot be read ({error.strerror}): give -o another name.") from error
        if not ours:
            raise OneShotError(f"{path} was not written by this command and stays as it is: give -o another name.")
    if not path.parent.is_dir():
        raise OneShotError(f"The folder {path.parent} does not exist: make it, or give -o another name.")
    save_text_atomic(text, path)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
