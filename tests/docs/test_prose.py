"""Pages that are read once: a README of one page, and short sentences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, pages

MOST_WORDS_OF_README = 500
LONGEST_SENTENCE = 25  # words, at the ninth decile


def sentence_lengths(text: str) -> list[int]:
    """The number of words of each sentence of the prose: no code, tables, headings and addresses of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    kept = [line for line in text.splitlines() if not re.match(r"\s*(\||#|!|<!--|:::)", line)]
    prose = re.sub(r"\]\([^)]*\)", "", re.sub(r"`[^`]*`", "code", "\n".join(kept)))
    parts = re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n\s*(?:[*-]|\d+\.) ", prose)
    counts = [len(re.findall(r"\w[\w'’-]*", part)) for part in parts]
    return sorted(count for count in counts if count > 2)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    lengths = sentence_lengths(page.read_text(encoding="utf-8"))
    assert not lengths or lengths[int(0.9 * len(lengths))] <= LONGEST_SENTENCE


def test_readme_is_one_page() -> None:
    above, heading, _ = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Learn more")
    assert heading
    assert len(above.split()) <= MOST_WORDS_OF_README


def test_links_lead_to_files() -> None:
    broken = []
    for page in pages():
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
