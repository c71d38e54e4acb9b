"""Extension of griffe: docstrings have Sphinx's roles, which Markdown would print as they are."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`<]+)`")
MATH_BLOCK = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n?|\n)+)", re.M)
MATH_ROLE = re.compile(r":math:`([^`]+)`")
SHARED_ENTRY = re.compile(r"^( {4})(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.M)
LITERAL_BLOCK = re.compile(r"::\n(\n(?: {4,}.*\n?|\n)+)")


class PlainMarkdown(Extension):
    """Turns roles into code and formulas."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of an object, if it has one."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    """The docstring in Markdown, with formulas for MathJax."""
    text = SHARED_ENTRY.sub(_one_entry_each, text)
    text = MATH_BLOCK.sub(lambda block: f"$$\n{dedent(block[2]).strip()}\n$$\n\n", text)
    text = MATH_ROLE.sub(lambda role: f"\\({role[1]}\\)", text)
    text = ROLE.sub(lambda role: f"`{role[2].rpartition('.')[2] if role[1] else role[2]}`", text)
    return LITERAL_BLOCK.sub(lambda block: f":\n{block[1]}", text).replace("``", "`")


def _one_entry_each(entry: re.Match[str]) -> str:
    """Arguments that share a description, "a, b: …", as an entry for each."""
    return "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", "))
