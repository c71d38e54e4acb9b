"""A Batcher decodes the texts of all requests together, and lets new ones join between two tokens."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from longnet_dist.errors import ConfigError
from longnet_dist.inference.decoder import Decoder
from longnet_dist.inference.generation import Sampling, draw


@dataclass(eq=False)
class Request:
    """A Request is a text that is being continued; iterating over it waits for its ids, one by one.

    Attributes:
        prompt: ids, at least one.
        num_tokens: how many to add, at most.
        sampling: how to draw them.
    """

    prompt: Sequence[int]
    num_tokens: int
    sampling: Sampling
    _answers: SimpleQueue[int | BaseException | None] = field(default_factory=SimpleQueue)
    _cancelled: bool = False

    def __iter__(self) -> Iterator[int]:
        """Yield the ids as they are drawn.

        Raises:
            BaseException: what ended the batcher.
        """
        while (answer := self._answers.get()) is not None:
            if isinstance(answer, BaseException):
                raise answer
            yield answer

    def cancel(self) -> None:
        """Want no more ids; what waits for them ends."""
        self._cancelled = True
        self._answers.put(None)

    def answer(self, answer: int | BaseException | None) -> None:
        """Hand over an id, an error, or None at the end."""
        self._answers.put(answer)

    @property
    def cancelled(self) -> bool:
        """Say whether nobody waits for ids."""
        return self._cancelled


class Batcher:
    """Decode requests on a thread of its own. A request that finds no free place waits for its turn.

    Args:
        decoder: its places are shared by all requests.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._waiting: deque[Request] = deque()
        self._active: dict[int, tuple[Request, torch.Generator, int]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def open(self) -> bool:
        """Say whether requests are taken."""
        return not self._closed

    def submit(self, prompt: Sequence[int], num_tokens: int, sampling: Sampling) -> Request:
        """Queue a text.

        Raises:
            ConfigError: an empty prompt, ids that the model does not have, a text that would be too long, or a closed
                batcher.
        """
        self.decoder.check(prompt, num_tokens)
        request = Request(prompt, num_tokens, sampling)
        with self._changed:
            if self._closed:
                raise ConfigError("the server is closing and takes no more requests; ask again when it is back")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        """End the thread, and all requests with what they have."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
            self._end(None)
        except BaseException as error:
            self._end(error)  # whoever waits must hear of it
            raise

    def _wait_for_work(self) -> bool:
        """Give free places to waiting requests, waiting for one if there is none; return False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
            if self._closed:
                return False
            free = [place for place in range(self.decoder.texts) if place not in self._active]
            joining = [(place, self._waiting.popleft()) for place in free if self._waiting]
        for place, request in joining:
            if not request.cancelled:
                self.decoder.load(request.prompt, [place])
                self._active[place] = request, request.sampling.generator(self.decoder.device), request.num_tokens
        return True

    def _step(self) -> None:
        """Draw the next id of every active text, and hand it over."""
        for place in [place for place, (request, _, _) in self._active.items() if request.cancelled]:
            self._free(place)
        if not self._active:
            return
        logits = self.decoder.step().float()
        ids = torch.zeros(self.decoder.texts, dtype=torch.int64, device=logits.device)
        for place, (request, generator, _) in self._active.items():
            ids[place : place + 1] = draw(logits[place : place + 1], request.sampling, generator)
        self.decoder.follow(ids)
        drawn = ids.tolist()
        for place, (request, generator, left) in list(self._active.items()):
            request.answer(drawn[place])
            self._active[place] = request, generator, left - 1
            if left == 1:
                request.answer(None)
                self._free(place)

    def _free(self, place: int) -> None:
        del self._active[place]
        self.decoder.clear(place)

    def _end(self, answer: BaseException | None) -> None:
        with self._changed:
            self._closed = True
            requests = [*(request for request, _, _ in self._active.values()), *self._waiting]
        for request in requests:
            request.answer(answer)
