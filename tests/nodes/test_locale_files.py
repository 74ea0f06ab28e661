"""The nodes' texts and help pages in every language, checked without a ComfyUI."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
DOCS = LOCALES.parent / "nodes" / "web" / "docs"
FILES = sorted(path.relative_to(LOCALES).as_posix() for path in LOCALES.glob("*/*.json"))


def texts(file):
    """Path of keys -> text, of everything in a locale file."""

    def flat(value, path=()):
        if not isinstance(value, dict):
            return {path: value}
        return {p: text for key in value for p, text in flat(value[key], (*path, key)).items()}

    return flat(json.loads((LOCALES / file).read_text(encoding="utf-8")))


def test_english_and_simplified_chinese_are_there():
    assert {"en/nodeDefs.json", "zh/nodeDefs.json"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_every_locale_has_the_keys_of_the_english_one_and_no_empty_text(file):
    found, english = texts(file), texts(f"en/{Path(file).name}")
    # the English names are those of the nodes, which depend on the host
    names = {(node, "display_name") for node, *_ in english}
    assert not names & set(english)
    assert set(found) == set(english) | (set() if file.startswith("en/") else names)
    assert all(isinstance(text, str) and text.strip() for text in found.values())


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("zh/")])
def test_the_chinese_texts_are_chinese(file):
    for path, text in texts(file).items():
        assert any("\u4e00" <= character <= "\u9fff" for character in text), path


@pytest.mark.parametrize("english", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_the_chinese_help_page_says_what_the_english_one_says(english):
    # where both of ComfyUI's frontends look for it; pictures lie beside the English page
    chinese = DOCS / english.stem / "zh.md"
    pages = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    title = texts("zh/nodeDefs.json")[english.stem, "display_name"]
    assert pages[1].startswith(f"# {title}\n") and f"]({english.stem}.png)" in pages[1]
    for parts in (r"^#+ ", r"^ *- ", r"^\|", r"\*\*(\w+)\*\*", r"`(.+?)`", r"\d+(?:\.\d+)?"):
        found = [re.findall(parts, page, re.MULTILINE | re.ASCII) for page in pages]
        if "(" in parts:  # names, what is typed, numbers: each at least once
            found = [set(each) for each in found]
        assert found[0] == found[1], parts
