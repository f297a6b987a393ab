"""The documentation builds as a site without a warning, and its first page is short."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("material", reason="MkDocs Material is an extra of development")
ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_asks_no_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    loaded = re.compile(r'<(?:script|img)[^>]*src="https?://|<link[^>]*rel="stylesheet"[^>]*href="https?://')
    assert [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))] == []


def test_the_first_page_has_one_picture_and_at_most_300_words():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"!\[", text)) == 1
    assert len(text.split()) <= 300


def test_every_picture_is_shown_small_and_made_by_the_script():
    shown = {
        (page.parent / target).resolve()
        for page in (ROOT / "docs").rglob("*.md")
        for target in re.findall(r"!\[[^\]]+\]\(([^)\s]+\.png)\)", page.read_text(encoding="utf-8"))
    }
    pictures = set((ROOT / "docs" / "images").iterdir())
    assert shown & pictures == pictures
    assert [picture.name for picture in pictures if picture.stat().st_size > 250_000] == []
    script = (ROOT / "docs" / "make_pictures.py").read_text(encoding="utf-8")
    made = {f"report_{name}_{width}.png" for name in ("phantoms", "abdomens") for width in ("wide", "narrow")}
    assert {picture.name for picture in pictures} == made | {"registration.png"}
    assert all(f'"{word}"' in script for word in ("phantoms", "abdomens", "wide", "narrow", "registration.png"))


def test_a_page_is_photographed_as_wide_as_a_telephone_and_nothing_is_cut(tmp_path):
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if (browser := next(filter(None, map(shutil.which, module.BROWSERS)), None)) is None:
        pytest.skip("no browser")
    boxes = ["width: 100%; height: 100px; background: #fa0", "width: 50%; height: 200px; background: #00f"]
    style = "body { margin: 0 } div { margin-bottom: 20px } @media (min-width: 400px) { div { display: none } }"
    drawn = "".join(f'<div style="{box}"></div>' for box in boxes)
    (tmp_path / "page.html").write_text(f"<style>{style}</style>{drawn}")
    module.photograph(browser, tmp_path / "page.html", tmp_path / "shot.png", (390, 250))
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.size == (390, 120)
        assert [shot.getpixel((389, y)) for y in (50, 110)] == [(255, 170, 0), (255, 255, 255)]
