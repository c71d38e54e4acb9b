"""A YAML file and ``key=value`` words are read and checked into a :class:`Config`."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from importlib.resources.abc import Traversable
from itertools import accumulate
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.hf_model import FAMILIES
from longnet_dist.config.model import LongNetConfig, own_fields
from longnet_dist.config.schema import Config
from longnet_dist.errors import ConfigError


def load_config(path: Path | Traversable | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, replace single values and check the result.

    Args:
        path: a YAML file, as from :func:`~longnet_dist.config.packaged.find_config`; None: the words say all.
        overrides: ``section.key=value`` words, which replace values of the file. The value of a key that is text or a
            path is the text as it is; ``null`` leaves out one that may be. Other values are YAML.

    Raises:
        ConfigError: the file cannot be read or is no YAML mapping; a key is unknown or given twice; a value is invalid.
    """
    values = {} if path is None else read_yaml(path)
    given: list[str] = []
    for word in overrides:
        key = set_override(values, word)
        if key in given:
            raise ConfigError(f"every key may be given once, but {key} is given twice on the command line")
        for section, part in (pair for other in given for pair in ((key, other), (other, key))):
            if part.startswith(f"{section}."):
                raise ConfigError(
                    f"every key may be given once, but {section} on the command line has the place of {part}, which is "
                    f"given too; put {part.removeprefix(f'{section}.')} into {section}={{...}}, or give single keys"
                )
        given.append(key)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Check nested values against the schema.

    Raises:
        ConfigError: a value is invalid. The message has a line for each fault: key, value and rule, or for an unknown
            key the nearest known one.
    """
    if faults := list(_misleading(values)):
        raise ConfigError("\n".join(faults))
    try:
        return Config.model_validate(_with_model_of_init(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error))) from None


_PLACES = ("model.path", "train.resume")
"""Keys whose value is a path, though their type does not say so."""


def _misleading(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line for each value that pydantic would take for another one than was meant.

    These are numbers given as true or false (in YAML also yes, no, on, off), which it takes for 1 and 0, and empty
    paths, which it takes for the current folder. A variable of the shell that is not set leaves such a path.
    """
    for name, value in values.items() if isinstance(values, dict) else ():
        key = f"{prefix}{name}"
        field = _field(key)
        if field and section_of(field):
            yield from _misleading(value, f"{key}.")
            continue
        leaves = set(_leaves(field.annotation)) if field else set()
        if value == "" and (Path in leaves or key in _PLACES):
            optional = key == "model.path" or type(None) in leaves
            yield f"{key} is empty; give a path{', or null for none' if optional else ''}"
        elif truth := _truth_for_a_number(value, leaves):
            yield f"{key} should be a number, not {truth}{_meaning(key)}"


def _truth_for_a_number(value: Any, leaves: set[Any]) -> str:
    """Return the truth value, as YAML writes it, in a value of a key whose types are numbers; empty if there is none.

    Args:
        value: of the key; a list is searched.
        leaves: types that the value may have.
    """
    kinds = {part for leaf in leaves for part in (leaf, *get_args(leaf))}
    if not kinds & {int, float} or bool in kinds:
        return ""
    given = value if isinstance(value, list) else [value]
    return next((str(one).lower() for one in given if isinstance(one, bool)), "")


def _with_model_of_init(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in a model without sizes from ``train.init``; the given fields replace its own."""
    model, train = values.get("model") or {}, values.get("train")
    init = train.get("init") if isinstance(train, dict) else None
    if (
        not isinstance(model, dict)
        or {"dim", "name", "path", "config"} & model.keys()
        or not isinstance(init, str | Path)
    ):
        return values
    return values | {"model": model_fields_of(Path(init).expanduser()) | model}


def model_fields_of(path: Path) -> dict[str, Any]:
    """Return the fields of the model in an exported folder, a checkpoint, or the newest checkpoint of a run.

    Raises:
        ConfigError: there is none.
    """
    newest = sorted((path / "checkpoints").glob("step_*/state.json"))
    for file in (path / "config.json", path / "state.json", *newest[-1:]):
        if not file.is_file():
            continue
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            fields = fields if file.name == "config.json" else fields["model"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"cannot read the model of train.init={path} in {file}: {error}") from None
        if isinstance(fields, dict) and "dim" in fields:
            return own_fields(fields)
        if isinstance(fields, dict) and fields.get("model_type") in FAMILIES:
            raise ConfigError(
                f"train.init={path} is a model of transformers, which a run trains as its own; give model.path={path} "
                "with model.segment_lengths and model.dilation_rates in place of train.init"
            )
    raise ConfigError(
        f"the model has no sizes, so they are those of train.init={path}, but that is no folder that longnet convert "
        "or longnet export wrote, no checkpoint and no run; give model.dim and the other sizes, or another train.init"
    )


def read_yaml(path: Path | Traversable) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader, which creates no Python objects, and refuse duplicate keys.

    Raises:
        ConfigError: the file cannot be read, is no valid YAML, or is no mapping.
    """
    if path.is_dir():
        raise ConfigError(
            f"a configuration must be a YAML file, but {path} is a folder; for a model of transformers give "
            f"model.path={path}"
        )
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
    """This safe loader raises on a duplicate key, where yaml's own would use the last value.

    Its numbers are decimal or hexadecimal, as in YAML 1.2: 010 is ten, and 1:30 and 2026-11-30 are no numbers or dates.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"the key {key.value!r} is given twice, the second time in line {line}")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_NOT_YAML_1_2 = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_YAML_1_2]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def set_override(values: dict[str, Any], word: str) -> str:
    """Put ``a.b=value`` into nested values; return ``a.b``.

    Raises:
        ConfigError: the word is no setting, its value no YAML, or ``a`` is no section.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"a setting must read section.key=value without spaces, not {word!r}")
    try:
        word.encode()
        value = _as_it_is(key, text) if _is_text(key) else parse_yaml(text)
    except UnicodeEncodeError:
        raise ConfigError(_not_utf8(key, os.fsencode(text))) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key} is no valid YAML: {error}") from None
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key} cannot be set: {section} is {values!r} and no section")
    values[last] = value
    return key


def _not_utf8(key: str, value: bytes) -> str:
    """Return why bytes that Python could not read are refused."""
    fault = f"the value of {key} must be UTF-8, but is the bytes {value!r}; write it as UTF-8"
    with suppress(UnicodeDecodeError):
        value.decode("utf-8")  # it is, but Python was told that the command line is not
        fault = (
            f"the value of {key} is {value!r}, which Python reads as {sys.getfilesystemencoding()} here; set "
            "PYTHONUTF8=1, or a locale of UTF-8 such as LC_ALL=C.UTF-8"
        )
    return fault


def _as_it_is(key: str, text: str) -> str | None:
    """Return the text of a value, or None where it leaves out a key that may be."""
    if "\0" in text:
        raise ConfigError(f"the value of {key} must not have a zero byte")
    field = _field(key)
    optional = field is not None and type(None) in _leaves(field.annotation)
    return None if optional and text == "null" else text


def _is_text(key: str) -> bool:
    """Say whether the value of a key is a text or a path."""
    field = _field(key)
    if field is None:
        return key in ("model.name", "model.path")
    kinds = set(_leaves(field.annotation)) - {type(None)}
    return bool(kinds) and kinds <= {str, Path}


def _field(key: str) -> FieldInfo | None:
    """Return the field of a dotted key, None if there is none."""
    section: type[BaseModel] | None = Config
    field = None
    for name in key.split("."):
        field = section.model_fields.get(name) if section else None
        section = section_of(field) if field else None
    return field


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of; of a literal, those of its values."""
    if get_origin(annotation) is Literal:
        yield from map(type, get_args(annotation))
    elif get_origin(annotation) is Annotated:
        yield from _leaves(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _leaves(part)
    else:
        yield annotation


def _faults(error: ValidationError) -> Iterator[str]:
    """Yield one line for each invalid key."""
    rules: dict[str, list[str]] = {}
    for fault in error.errors():
        key = _known_part(fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, [*Config.model_fields, *known_keys(Config)], n=1, cutoff=0.0)[0]
            rules[key] = [f"there is no key {key}; the nearest is {near}"]
        elif fault["type"] == "missing" and isinstance(fault["loc"][-1], int):
            rules[key] = [f"{key}={list(fault['input'])} is too short{_meaning(key)}"]
        elif fault["type"] == "missing":
            rules[key] = [f"{' and '.join(_required(key))} must be given"]
        elif "error" in fault.get("ctx", {}):
            rules[key] = [f"{key}: {fault['ctx']['error']}".removeprefix(": ")]
        else:
            value = "null" if fault["input"] is None else repr(fault["input"])
            rules.setdefault(key, [f"{key}={value}"]).append(_rule(key, fault))
    for key, (first, *others) in rules.items():
        remedy = _meaning(key) if first == f"{key}=null" else ""
        yield f"{first} {', or '.join(others)}{remedy}".rstrip()


def _rule(key: str, fault: Any) -> str:
    """Return the rule that a value breaks, in the words of a configuration file where pydantic has Python's."""
    if fault["type"] == "tuple_type":
        return f"should be a list, such as [{fault['input']}]"
    if fault["type"] == "model_type":
        first = next(known for known in known_keys(Config) if known.startswith(f"{key}."))
        return f"should be a section: give its keys, such as {first}"
    message: str = fault["msg"]
    return message.removeprefix("Input ")


def _meaning(key: str) -> str:
    """Return what a key means and its default, for a message about a value that leaves it out."""
    from longnet_dist.config.keys import keys  # which imports this module

    found = next((one for one in keys() if one.name == key), None)
    return "" if found is None else f"; {key} is: {found.meaning} (default {found.default})"


def _required(key: str) -> list[str]:
    """Return a key, or of a section the keys in it that have no default."""
    section = section_of(field) if (field := _field(key)) else None
    needed = [name for name, part in section.model_fields.items() if part.is_required()] if section else []
    return [f"{key}.{name}" for name in needed] or [key]


def _known_part(location: tuple[int | str, ...]) -> str:
    """Return the dotted key of a fault, without the parts that pydantic adds for the types that a key may have."""
    keys = list(accumulate(map(str, location), "{}.{}".format))
    return next((key for key in keys if key in known_keys(Config)), keys[-1] if keys else "")


def known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys below a section, after ``prefix``."""
    if section is LongNetConfig:
        yield f"{prefix}path"  # which takes the place of the others
    for name, field in section.model_fields.items():
        if nested := section_of(field):
            yield from known_keys(nested, f"{prefix}{name}.")
        else:
            yield prefix + name
    if section is LongNetConfig:
        yield from (prefix + name for name in EncoderConfig.model_fields if name not in section.model_fields)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a field that is a section of its own, None for a key."""
    classes = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
    return next((kind for kind in classes if issubclass(kind, BaseModel)), None)
