"""The folder in which compiled code and kernels survive a process, so that later runs begin sooner."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

from longnet_dist.errors import ConfigError
from longnet_dist.numerics import log_once

FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "QUACK_CACHE_DIR": "quack",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash",
}
"""Variables that name the folders of torch's compiler, Triton, quack and flash-attn 4, and our folders for them."""
_SWITCHES = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1"}


def prepare_compile_cache(where: Path | Literal["auto"] | None, environment: MutableMapping[str, str]) -> None:
    """Name the folders of compiled code in ``environment``, except those that the user has named there.

    Call it before anything is compiled. All of these caches write an entry under another name and rename it, so ranks
    and hosts can share a folder. Entries of other versions and GPUs have other names.

    Args:
        where: the folder; ``"auto"``: ``longnet_dist`` in ``XDG_CACHE_HOME``, or in ``.cache`` in the home folder;
            None: change nothing.
        environment: the environment variables.

    Raises:
        ConfigError: the folder cannot be made. If it is ``"auto"``, a warning says so instead.
    """
    if where is None:
        return
    folder = _usual(environment) if where == "auto" else where.absolute()
    try:
        if folder is None:
            raise OSError("HOME is not set")
        for name in FOLDERS.values():
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"compiled code cannot be kept in {folder or 'a home folder'} ({error})"
        if where != "auto":
            raise ConfigError(f"{text}; use another train.compile_cache, or train.compile_cache=null") from None
        log_once(f"{text}, so later runs compile it again; set train.compile_cache to a folder that can be written")
        return
    for variable, name in FOLDERS.items():
        environment.setdefault(variable, str(folder / name))
    for variable, value in _SWITCHES.items():
        environment.setdefault(variable, value)


def _usual(environment: MutableMapping[str, str]) -> Path | None:
    if place := environment.get("XDG_CACHE_HOME"):
        return Path(place).absolute() / "longnet_dist"
    home = environment.get("HOME")
    return Path(home) / ".cache" / "longnet_dist" if home else None
