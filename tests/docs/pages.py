"""The pages that people read, and the fenced blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ORDER = ("index", "attention", "training", "memory", "streaming", "fault_tolerance", "launchers")
FENCE = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)


def pages() -> list[Path]:
    """README, the pages of docs in the order in which they are read, and CONTRIBUTING."""
    docs = [ROOT / "docs" / f"{name}.md" for name in ORDER]
    others = sorted(set((ROOT / "docs").glob("*.md")) - set(docs))
    return [ROOT / "README.md", *docs, *others, ROOT / "CONTRIBUTING.md"]


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
        page: its file.
        line: of the fence.
        language: after the fence.
        code: between the fences.
        mark: the comment above the fence: ``run``, ``run: key=value …`` (settings added to each training, to make it
            short), ``file: NAME`` (the block becomes that file) or ``output`` (what the block above prints).
    """

    page: Path
    line: int
    language: str
    code: str
    mark: str

    @property
    def name(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(page, line, match["language"], match["code"], match["mark"] or ""))
    return found


def table_rows(page: Path) -> list[list[str]]:
    """The cells of every row of every table, without headings."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = [
        line for line, after in zip(lines, [*lines[1:], ""], strict=True) if not _is_rule(line) and not _is_rule(after)
    ]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in rows if line.startswith("|")]


def _is_rule(line: str) -> bool:
    return bool(re.fullmatch(r"\|[-:| ]+\|", line))
