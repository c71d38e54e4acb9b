"""MkDocs hook: the table of configuration keys, and links from pages to files of the repository.

A page links to a file of the repository relative to itself, so that the link works where the repository is browsed.
Here such a file becomes part of the site, and the link points to its copy.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
COPIES = "repository"
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md")  # of the repository, which are pages of the site as well
KEYS_MARK = "<!-- table of all configuration keys -->"
OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")

sys.path.insert(0, str(ROOT))  # the keys are those of this checkout


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository, and every file that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, content=as_page((ROOT / name).read_text(encoding="utf-8"))))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for _, target in OUTSIDE.findall(page.content_string):
            path, name = ROOT / target, place(target)
            if path.is_file() and name not in files.src_uris:
                files.append(File.generated(config, name, content=path.read_bytes(), inclusion=InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the table of keys where its mark is, and point links to the copies."""
    if KEYS_MARK in markdown:
        markdown = markdown.replace(KEYS_MARK, keys_table())
    return OUTSIDE.sub(lambda match: match[1] + place(match[2]), markdown)


def as_page(text: str) -> str:
    """A page of the repository's root with its links as from a page of docs."""
    text = re.sub(r"(\]\()(?!https?:|#|mailto:)", r"\1../", text)
    return text.replace("](../docs/", "](")


def place(target: str) -> str:
    """Where a file of the repository is in the site. Markdown is shown as text: its links are of the repository."""
    return target if target in PAGES else f"{COPIES}/{target}" + ".txt" * target.endswith((".md", ".py"))


def keys_table() -> str:
    """The keys of a configuration as a table for each section, from the schema and its docstrings."""
    from longnet_dist.config.keys import keys

    lines: list[str] = []
    section = ""
    for key in keys():
        name, _, _ = key.name.partition(".")
        if name != section:
            section = name
            lines += ["", f"### `{section}`", "", "| key | default | meaning |", "|---|---|---|"]
        meaning = key.meaning.replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{key.name}` | `{key.default}` | {meaning} |")
    return "\n".join(lines)
