"""The configurations of runs that travel with the package, by name.

It imports nothing else of the package but errors, so that a command's help names them at once.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from longnet_dist.errors import ConfigError


def run_names() -> list[str]:
    """Return the names of the configurations that this package brings, in ``config/runs``."""
    runs = (files("longnet_dist.config") / "runs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in runs if file.name.endswith(".yaml"))


def find_config(word: str) -> Path | Traversable:
    """Return the file that a command line means: a packaged configuration, by its name, or a path.

    A name of a packaged configuration takes precedence; write ``./name`` for a file of that name.

    Args:
        word: name or path.

    Raises:
        ConfigError: it is neither a name nor a path.
    """
    if word in (names := run_names()):
        return files("longnet_dist.config") / "runs" / f"{word}.yaml"
    path = Path(word)
    if (word and path.exists()) or path.suffix in (".yaml", ".yml"):
        return path
    near = difflib.get_close_matches(word, names, n=1)
    remedy = f"; the nearest is {near[0]}" if near else ""
    if word and (files("longnet_dist.config") / "models" / f"{word}.yaml").is_file():
        remedy = f"; {word} is a size of model: {names[0]} model.name={word}"
    raise ConfigError(f"there is no configuration {word!r}: give a YAML file or one of {', '.join(names)}{remedy}")


@contextmanager
def read_once(word: str | None) -> Iterator[str | None]:
    """Yield a configuration that can be read again and again: a copy of a pipe's content, for the ranks, too.

    Args:
        word: a file, a pipe, ``-`` for standard input, a name, or None for none.
    """
    path, standard_input = Path(word or ""), word in ("-", "/dev/stdin")
    if word is None or not (standard_input or (path.exists() and not path.is_file() and not path.is_dir())):
        yield word
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "standard_input.yaml"
        # Opened by its path, standard input that is a named pipe would wait for another writer.
        with open(0, "rb", closefd=False) if standard_input else open(path, "rb") as pipe:
            copy.write_bytes(pipe.read())
        yield str(copy)
