"""The ranks of a run compare what each of them sees, as they meet and before they compute."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError, DataError, LongNetError

Result = TypeVar("Result")
READ_SECONDS = 10.0  # for which rank 0, which may keep the store, waits until all have read why the run ends
SHOWN_CHARACTERS = 60


def agreed(
    store: Any,
    launch: LaunchEnvironment,
    name: str,
    prepare: Callable[[], Result],
    facts: Callable[[Result], Mapping[str, str]],
) -> Result:
    """Prepare something on every rank and compare it. Every rank must call; nothing but the store is needed.

    Args:
        store: rendezvous store of the run.
        launch: which process this one is.
        name: of the comparison, another one for each.
        prepare: what each rank does alone; an error of it ends all ranks.
        facts: what must be equal on all ranks of what ``prepare`` returns, by name.

    Returns:
        What ``prepare`` returned on this rank.

    Raises:
        ConfigError: a rank cannot prepare it, or a fact differs; the message is the same on all ranks.
        LongNetError, OSError: all ranks have this error.
    """
    error: BaseException | None = None
    mine: dict[str, Any] = {"host": socket.gethostname()}
    try:
        result = prepare()
        mine["facts"] = dict(facts(result))
    except BaseException as raised:
        error = raised
        mine["error"] = str(raised) or type(raised).__name__
    try:
        verdict = settle(store, launch, name, mine, difference)
    except ConfigError:
        if error is None:
            raise
        raise error from None  # what this rank can say of itself helps more than that others do not come
    if error is not None and (verdict == mine["error"] or not isinstance(error, LongNetError | OSError)):
        raise error
    if verdict:
        raise ConfigError(verdict) from None
    return result


def refuse_together(faults: Sequence[str], device: torch.device) -> None:
    """Raise what any rank found in the data that it has read. Every rank of the world must call.

    Args:
        faults: messages of this rank.
        device: of the collectives.

    Raises:
        DataError: the first fault of the first rank that has one; on all ranks.
    """
    number = torch.tensor(len(faults), device=device)
    dist.all_reduce(number)
    if int(number):
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, list(faults))
        raise DataError(next(fault for rank in found for fault in rank))


def settle(
    store: Any, launch: LaunchEnvironment, name: str, mine: Any, judge: Callable[[list[Any]], str | None]
) -> str | None:
    """Let rank 0 judge what all ranks have; return its verdict on every rank. Every rank must call.

    Args:
        store: rendezvous store of the run.
        launch: which process this one is.
        name: of the question, another one for each.
        mine: what this rank has, a JSON value.
        judge: called on rank 0 with the values of all ranks, in order; its verdict is why the run ends, if it does.

    Raises:
        ConfigError: a rank does not answer within the time-out of the store.
    """
    try:
        store.set(f"{name}/{launch.rank}", json.dumps(mine))
        if launch.rank == 0:
            verdict = judge([json.loads(store.get(f"{name}/{rank}")) for rank in range(launch.world_size)])
            store.set(f"{name}/verdict", json.dumps(verdict))
        verdict = json.loads(store.get(f"{name}/verdict"))
    except dist.DistError as error:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} waits for ranks that do not come: {error}; check that every "
            "rank was started"
        ) from None
    if verdict is not None:
        _let_others_read(store, launch, name)
    return verdict  # type: ignore[no-any-return]


def difference(ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why ranks cannot run together, None if nothing stands against it.

    Args:
        ranks: of each its ``host`` and either its ``facts`` or its ``error``.
    """
    errors = {rank: seen["error"] for rank, seen in enumerate(ranks) if "error" in seen}
    if errors:
        message = next(iter(errors.values()))
        if len(errors) == len(ranks) and set(errors.values()) == {message}:
            return str(message)
        return f"{_place(ranks, list(errors))} cannot start: {message}"
    for name in dict.fromkeys(key for seen in ranks for key in seen["facts"]):
        values = [seen["facts"].get(name, "missing") for seen in ranks]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            here, there = (_shown(values[rank]) for rank in (0, others[0]))
            return (
                f"all ranks must start with the same settings, data, checkpoint and code, but {name} is {there} for "
                f"{_place(ranks, others)} and {here} for rank 0 on host {ranks[0]['host']}; use the same files and the "
                "same command on all hosts"
            )
    return None


def _place(ranks: Sequence[Mapping[str, Any]], some: Sequence[int]) -> str:
    """Name the first of some ranks with its host, and say how many more there are."""
    more = f" and {len(some) - 1} more" if len(some) > 1 else ""
    return f"rank {some[0]}{more} on host {ranks[some[0]]['host']}"


def _shown(value: str) -> str:
    return value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "…"


def _let_others_read(store: Any, launch: LaunchEnvironment, name: str) -> None:
    """Keep rank 0 alive until the others have read the verdict, since its store ends with it."""
    with suppress(RuntimeError):  # rank 0, and so the store, may have ended
        store.add(f"{name}/read", 1)
        deadline = time.monotonic() + READ_SECONDS
        while launch.rank == 0 and store.add(f"{name}/read", 0) < launch.world_size and time.monotonic() < deadline:
            time.sleep(0.01)
