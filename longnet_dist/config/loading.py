"""A YAML file and ``key=value`` words are read and checked into a :class:`Config`."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterator, Sequence
from importlib.resources.abc import Traversable
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from longnet_dist.config.schema import Config
from longnet_dist.errors import ConfigError


def load_config(path: Path | Traversable, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, replace single values and check the result.

    Args:
        path: a YAML file, as from :func:`~longnet_dist.config.packaged.find_config`.
        overrides: ``section.key=value`` words with YAML values, which replace those of the file.

    Raises:
        ConfigError: the file cannot be read or is no YAML mapping; a key is unknown or given twice; a value is invalid.
    """
    values = read_yaml(path)
    given: set[str] = set()
    for word in overrides:
        key = _override(values, word)
        if key in given:
            raise ConfigError(f"every key may be given once, but {key} is given twice on the command line")
        given.add(key)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Check nested values against the schema.

    Raises:
        ConfigError: a value is invalid. The message has a line for each fault: key, value and rule, or for an unknown
            key the nearest known one.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error))) from None


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader, which creates no Python objects, and refuse duplicate keys.

    Raises:
        ConfigError: the file cannot be read, is no valid YAML, or is no mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must be a YAML mapping of sections (model, data, train, …), not {values!r}")
    return values


def parse_yaml(text: str) -> Any:
    """Parse a YAML text with the safe loader and return its value.

    Raises:
        ConfigError: a key is given twice.
        yaml.YAMLError: the text is no valid YAML.
    """
    return yaml.load(text, Loader=_UniqueKeyLoader)


class _UniqueKeyLoader(yaml.SafeLoader):
    """This safe loader raises on a duplicate key, where yaml's own would use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"the key {key.value!r} is given twice, the second time in line {line}")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _override(values: dict[str, Any], word: str) -> str:
    """Put ``a.b=value`` into nested values; return ``a.b``."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"a setting must read section.key=value, not {word!r}")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} is no valid YAML: {error}") from None
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key} cannot be set: {section} is {values!r} and no section")
    values[last] = value
    return key


def _faults(error: ValidationError) -> Iterator[str]:
    """Yield one line for each invalid key."""
    rules: dict[str, list[str]] = {}
    for fault in error.errors():
        key = _known_part(fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, [*Config.model_fields, *known_keys(Config)], n=1, cutoff=0.0)[0]
            rules[key] = [f"there is no key {key}; the nearest is {near}"]
        elif fault["type"] == "missing":
            rules[key] = [f"{key} must be given"]
        elif "error" in fault.get("ctx", {}):
            rules[key] = [f"{key}: {fault['ctx']['error']}".removeprefix(": ")]
        else:
            rules.setdefault(key, [f"{key}={fault['input']!r}"]).append(fault["msg"].removeprefix("Input "))
    for first, *others in rules.values():
        yield f"{first} {', or '.join(others)}".rstrip()


def _known_part(location: tuple[int | str, ...]) -> str:
    """Return the dotted key of a fault, without the parts that pydantic adds for the types that a key may have."""
    keys = list(accumulate(map(str, location), "{}.{}".format))
    return next((key for key in keys if key in known_keys(Config)), keys[-1] if keys else "")


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys below a section, after ``prefix``."""
    for name, field in section.model_fields.items():
        if nested := section_of(field):
            yield from known_keys(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a field that is a section of its own, None for a key."""
    classes = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    return next((kind for kind in classes if issubclass(kind, BaseModel)), None)
