"""Extras of the distribution: which packages each one brings, and the message where they are absent."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from longnet_dist.errors import MissingExtraError

# Extra to the names under which its packages are imported; setup.cfg has their distributions and versions.
MODULES = {
    "train": ("deepspeed", "matplotlib", "tensorboard"),
    "cuda": ("flash_attn", "quack"),
    "tokenizers": ("tokenizers", "tiktoken"),
    "data": ("pyarrow", "zstandard"),
    "mpi": ("mpi4py",),
    "hf": ("accelerate", "peft", "transformers"),
    "hdf5": ("h5py",),
    "eval": ("lm_eval",),
    "serve": ("fastapi", "uvicorn"),
}

OLDEST = {"transformers": (5, 24)}
"""Releases below which a package gives wrong results, without an error of its own: ModernBERT loses its padding."""

DESTRUCTIVE_DEEPSPEED = ("0.19.5", "0.19.6", "0.19.7")
"""Versions in which a gradient that is not finite makes every weight NaN, while the step counts as skipped."""


def require_extra(extra: str, purpose: str, only: str | None = None) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Call it before any other work, on every rank: then all ranks end alike, and nothing has been written.

    Args:
        extra: a key of ``MODULES``.
        purpose: who needs the packages; the message begins with it.
        only: the one package of the extra that is needed; None: all.

    Raises:
        MissingExtraError: at least one of them is absent, or older than ``OLDEST``.
    """
    needed = [name for name in MODULES[extra] if only in (None, name)]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {', '.join(missing)}, which this Python does not have; install the extra: "
            f"{install_command(extra)}"
        )
    for name in needed:
        if name in OLDEST and tuple(map(int, version(name).split(".")[:2])) < OLDEST[name]:
            oldest = ".".join(map(str, OLDEST[name]))
            raise MissingExtraError(
                f"{purpose} needs {name} {oldest} or newer, because older releases give wrong results, but this Python "
                f"has {version(name)}; install the extra: {install_command(extra)}"
            )


def install_command(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'longnet-dist[{extra}]'"
