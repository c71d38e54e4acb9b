"""This module lists every key of a configuration with default and meaning, from the schema and its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.loading import section_of
from longnet_dist.config.model import MODEL_NAMES
from longnet_dist.config.schema import Config


class Key(NamedTuple):
    """A Key describes one key of a configuration.

    Attributes:
        name: dotted name, as on a command line.
        default: default value as YAML, or ``required``.
        meaning: first sentence of its documentation, with the unit.
    """

    name: str
    default: str
    meaning: str


def key_lines() -> list[str]:
    """Return a line for each key: name, default and meaning, to be read or searched with grep."""
    table = list(keys())
    names, defaults = (max(len(key[column]) for key in table) for column in (0, 1))
    return [f"{key.name:<{names}}  {key.default:<{defaults}}  {key.meaning}" for key in table]


def keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Yield every key below a section, in the order of the schema.

    Args:
        section: a class of the schema.
        prefix: prefix of the dotted names, with its last dot.
    """
    meanings = _attributes(section)
    if prefix == "model.":
        yield Key("model.name", "null", f"a named size, whose fields the others replace: {', '.join(MODEL_NAMES)}")
        yield Key("model.path", "null", "a Hugging Face model (folder or config.json) to train in place of LongNet")
    for name, field in section.model_fields.items():
        if nested := section_of(field):
            yield from keys(nested, f"{prefix}{name}.")
        else:
            yield _key(prefix + name, field, meanings.get(name, ""))
    if prefix == "model.":
        meanings = _attributes(EncoderConfig)
        for name, field in EncoderConfig.model_fields.items():
            if name not in section.model_fields:
                yield _key(prefix + name, field, f"encoders: {meanings.get(name, '')}")


def _key(name: str, field: FieldInfo, meaning: str) -> Key:
    default = field.get_default(call_default_factory=True)
    return Key(name, "required" if default is PydanticUndefined else _yaml(default), meaning)


def _yaml(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    value = value if isinstance(value, int | float | str | bool | list | dict | None) else str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _attributes(section: type) -> dict[str, str]:
    """Return the first sentence about each attribute in the docstring of a class."""
    text = inspect.getdoc(section) or ""
    _, _, attributes = text.partition("Attributes:\n")
    attributes = re.split(r"\n(?=\S)", attributes)[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.M)
    return {name: re.split(r"(?<=\.)\s", " ".join(meaning.split()))[0].rstrip(".") for name, meaning in entries}
