"""Batches are encoded by worker processes, and come back in order."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

from longnet_dist.data.encoding.pieces import Batch, Encoded, Encoder
from longnet_dist.data.tokenizers import HuggingFaceTokenizer, TiktokenTokenizer, Tokenizer
from longnet_dist.errors import DataError


class InProcess:
    """Encode in this process, one batch after the other."""

    def __init__(self, tokenizer: Tokenizer, dtype: str) -> None:
        self._encode = Encoder(tokenizer, dtype)

    def put(self, batch: Batch) -> Iterator[tuple[Batch, Encoded]]:
        """Take a batch; yield what is encoded."""
        yield batch, self._encode(batch)

    def finish(self) -> Iterator[tuple[Batch, Encoded]]:
        """Yield what was taken and not yielded yet."""
        yield from ()

    def close(self) -> None:
        """Do nothing."""


class Workers:
    """Encode in worker processes. At most two batches for each are on their way, so memory is bounded.

    A thread for each worker waits for its answers. A worker is a Python of its own that is told what to do through
    pipes, so the program that calls needs no guard, and no thread or lock is inherited.

    Args:
        tokenizer: one that its JSON rebuilds.
        dtype: of the token file.
        num_workers: number of processes.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, num_workers: int) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "longnet_dist.data.encoding.worker"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(num_workers)
        ]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(num_workers)
        self._pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        self._most = 2 * num_workers
        try:
            for process in self._processes:
                _send(process, (tokenizer.to_json(), dtype))
                self._idle.put(process)
        except DataError:
            self.close()
            raise

    def put(self, batch: Batch) -> Iterator[tuple[Batch, Encoded]]:
        """Take a batch; yield what is encoded of earlier ones, in order."""
        self._pending.append((batch, self._threads.submit(self._encode, batch)))
        while len(self._pending) > self._most:
            yield self._next()

    def finish(self) -> Iterator[tuple[Batch, Encoded]]:
        """Yield what was taken and not yielded yet, in order."""
        while self._pending:
            yield self._next()

    def close(self) -> None:
        """End the workers."""
        self._pending.clear()
        for process in self._processes:
            process.kill()  # it holds nothing that must be written
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe.close()  # type: ignore[union-attr]
                except OSError:  # what a killed worker did not read cannot be flushed
                    continue

    def _next(self) -> tuple[Batch, Encoded]:
        batch, answer = self._pending.popleft()
        return batch, answer.result()

    def _encode(self, batch: Batch) -> Encoded:
        process = self._idle.get()
        try:
            _send(process, batch)
            answer = _receive(process)
        finally:
            self._idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Encoded)
        return answer


def encoding_by(tokenizer: Tokenizer, dtype: str, num_workers: int) -> InProcess | Workers:
    """Choose what encodes: worker processes where a tokenizer takes longer than a pipe, and more than one is wanted."""
    if num_workers > 1 and type(tokenizer) in (HuggingFaceTokenizer, TiktokenTokenizer):
        return Workers(tokenizer, dtype, num_workers)
    return InProcess(tokenizer, dtype)


def _send(process: subprocess.Popen[bytes], message: object) -> None:
    assert process.stdin is not None
    try:
        pickle.dump(message, process.stdin, pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()
    except OSError as error:
        raise _ended(process) from error


def _receive(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise _ended(process) from error


def _ended(process: subprocess.Popen[bytes]) -> DataError:
    return DataError(
        f"a worker process of longnet prepare ended with status {process.wait()}; if the memory was too small, use "
        "fewer --workers"
    )
