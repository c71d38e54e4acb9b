"""Implementations that a configuration chooses by name, each in a file of its own.

The file ``adamw.py`` of a registry's folder registers ``"adamw"``, or ``adamw_optimizer.py`` where files end in
``_optimizer``. It is imported when the name is first looked up, so that a list of names costs no import. Code elsewhere
registers further names by being imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from longnet_dist.errors import ConfigError

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


class Registry(Generic[Entry]):
    """Hold the implementations of one kind, by name.

    Args:
        kind: of what is registered, as messages call it.
        package: the folder whose files are known by their names.
        ending: of all file names in it, which is no part of the names that they register.
    """

    def __init__(self, kind: str, package: str, ending: str = "") -> None:
        self.kind, self._package, self._ending = kind, package, ending
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that registers what it is given under ``name``.

        Raises:
            ConfigError: another implementation has the name.
        """

        def add(entry: Registered) -> Registered:
            other: object = self._entries.setdefault(name, entry)  # type: ignore[arg-type]
            if other is not entry:
                raise ConfigError(f"{self.kind} {name!r} is registered already; use another name")
            return entry

        return add

    def names(self) -> tuple[str, ...]:
        """Return all known names, in alphabetical order. Nothing is imported for it."""
        return tuple(sorted({*self._entries, *self._files}))

    def check(self, name: object, key: str = "", *others: str) -> None:
        """Refuse a name that is not known.

        Args:
            name: as given.
            key: of the configuration, for the message; the kind if not given.
            others: further values that the key may have, such as ``"auto"``.

        Raises:
            ConfigError: with the known names.
        """
        if name not in (known := (*others, *self.names())):
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key or self.kind} must be one of {', '.join(known)}, not {name!r}{hint}")

    def __getitem__(self, name: str) -> Entry:
        """Return the implementation of a name, whose file is imported if need be.

        Raises:
            ConfigError: the name is not known.
        """
        if name not in self._entries:
            self.check(name)
            import_module(f"{self._package}.{name}{self._ending}")
            assert name in self._entries, (
                f"{self._package}/{name}{self._ending}.py must register the {self.kind} {name!r}"
            )
        return self._entries[name]

    @cached_property
    def _files(self) -> set[str]:
        spec = find_spec(self._package)
        assert spec is not None
        return {file.name.removesuffix(self._ending) for file in iter_modules(spec.submodule_search_locations)}


ATTENTION_BACKENDS: Registry[Any] = Registry("backend", "longnet_dist.attention.kernels.backends")
"""The registry of that folder, which types it. It is made here since a configuration checks names without torch."""

FEATURE_TASKS: Registry[Any] = Registry("task", "longnet_dist.model.feature_tasks")
"""What encoders learn from features, see that folder; here for the same reason."""
