"""The candidates: which package, which pass, which head dim, which tiles."""

from __future__ import annotations

from typing import Any

F, T = False, True

# Queries, keys, warps, stages, most registers.
FORWARD = {
    64: [
        (64, 64, 4, 3, 128),
        (64, 64, 4, 3, None),
        (64, 64, 4, 2, 128),
        (64, 64, 4, 4, 128),
        (128, 64, 4, 3, None),
        (128, 64, 4, 2, None),
        (64, 128, 4, 2, None),
        (64, 128, 4, 3, None),
        (128, 64, 8, 3, None),
        (128, 64, 8, 3, 128),
        (128, 128, 8, 2, None),
        (64, 32, 4, 4, 128),
    ],
    128: [
        (64, 64, 4, 3, None),
        (64, 64, 4, 2, None),
        (128, 64, 8, 3, None),
        (128, 64, 8, 2, None),
        (64, 128, 4, 2, None),
        (64, 32, 4, 4, None),
        (64, 32, 4, 4, 168),
        (128, 128, 8, 2, None),
    ],
}

# As above, then: K, V held in registers; swizzle of the tile of dQ in bytes; the second scores early.
BACKWARD = {
    64: [
        (128, 128, 8, 3, None, F, F, 128, F),
        (128, 128, 8, 3, None, F, F, 32, F),
        (128, 128, 8, 2, None, F, F, 32, F),
        (128, 128, 8, 3, None, T, T, 32, F),
        (128, 128, 8, 3, None, T, T, 128, F),
        (128, 128, 8, 3, None, F, T, 32, F),
        (128, 128, 8, 3, None, T, F, 32, F),
        (128, 128, 8, 3, None, T, F, 128, F),
        (128, 128, 8, 2, None, F, F, 128, T),
        (128, 128, 8, 3, None, F, F, 32, T),
        (64, 64, 4, 3, 128, F, F, 128, F),
        (64, 64, 4, 3, 128, F, F, 32, F),
        (64, 64, 4, 3, 128, T, T, 32, F),
        (64, 64, 4, 3, 128, T, T, 128, F),
        (64, 64, 4, 2, 128, T, T, 32, F),
        (64, 128, 8, 3, None, T, T, 32, F),
        (64, 128, 8, 3, None, F, F, 32, F),
    ],
    128: [
        (64, 128, 8, 2, None, F, F, 128, F),
        (64, 128, 8, 3, None, F, F, 128, F),
        (64, 128, 8, 2, None, F, F, 32, F),
        (64, 128, 8, 3, None, F, F, 32, F),
        (64, 64, 4, 2, None, F, F, 32, F),
    ],
}

# As above, then: registers of the warps that fetch; programs a multiprocessor (0: one a tile).
LOOP = {
    64: [
        (128, 128, 8, 3, None, F, F, 32, F, 24, 1),
        (128, 128, 8, 3, None, F, F, 32, F, 24, 0),
        (128, 128, 8, 2, None, F, F, 128, F, 24, 1),
        (128, 128, 8, 3, None, F, T, 32, F, 24, 1),
        (64, 64, 4, 3, 128, F, F, 32, F, 24, 2),
        (64, 64, 4, 3, 128, T, T, 32, F, 24, 2),
        (64, 128, 8, 3, None, T, T, 32, F, 24, 1),
        (128, 128, 8, 3, None, T, F, 32, F, 24, 1),
    ],
    128: [(64, 128, 8, 2, None, F, F, 32, F, 24, 1)],
}


def candidates() -> list[dict[str, Any]]:
    """All, the present kernels of ``base`` first."""
    made: list[dict[str, Any]] = []

    def add(package: str, kind: str, dim: int, tiles: tuple[Any, ...] | None) -> None:
        made.append({"id": len(made), "package": package, "kind": kind, "dim": dim, "tiles": tiles})

    for kind in ("forward", "backward"):
        for dim in (64, 128):
            add("base", kind, dim, None)
    for package, kind, table in (
        ("new", "backward", BACKWARD),
        ("new", "forward", FORWARD),
        ("loop", "backward", LOOP),
    ):
        for dim, rows in table.items():
            for tiles in rows:
                add(package, kind, dim, tiles)
    return made


def name_of(candidate: dict[str, Any]) -> str:
    """How a table calls it."""
    tiles = tuple(candidate["tiles"] or ()) or "as it is"
    text = f"{candidate['package']} {candidate['kind']} {candidate['dim']} {tiles}"
    return text.replace("False", "F").replace("True", "T")
