"""The web application: a completions endpoint over a batcher."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from anyio import to_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import Receive, Scope, Send

from longnet_dist import __version__
from longnet_dist.data.tokenizers import Tokenizer
from longnet_dist.errors import LongNetError
from longnet_dist.inference.generation import Sampling, TextStream
from longnet_dist.serving.batcher import Batcher
from longnet_dist.serving.batcher import Request as Decoded
from longnet_dist.serving.protocol import Choice, Completion, CompletionRequest, Usage, error_body, mistake

MOST_THREADS = 1024
STOPPED = "the model has stopped; the server's log says why. Start the server again"


def application(batcher: Batcher, tokenizer: Tokenizer, name: str) -> FastAPI:
    """Return the application, which closes the batcher at its end.

    Args:
        batcher: of the model.
        tokenizer: of the model's text.
        name: of the model, as clients see it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A request waits for its ids on a thread.
        to_thread.current_default_thread_limiter().total_tokens = MOST_THREADS
        yield
        batcher.close()

    app = FastAPI(title="longnet", version=__version__, lifespan=lifespan)
    created = int(time.time())

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(mistake(error.errors()[0])), 400)

    @app.exception_handler(LongNetError)
    async def refused(_: Request, error: LongNetError) -> JSONResponse:
        return JSONResponse(error_body(str(error)), 400)

    @app.exception_handler(AnyHTTPException)
    async def failed(_: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.detail), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def stopped(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(STOPPED, "server_error"), 500)

    # These two need no thread, so they answer while all threads wait.
    @app.get("/health")
    async def health() -> dict[str, str]:
        if not batcher.open:
            raise HTTPException(503, STOPPED)
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": created, "owned_by": "longnet"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest, request: Request) -> Completion | StreamingResponse:
        if asked.model not in (None, name):
            raise HTTPException(404, f"the model is {name}, and there is no {asked.model}")
        answer = await to_thread.run_sync(Answer.begin, asked, batcher, tokenizer, name)
        if asked.stream:
            return Events(answer)
        async with _wanted(answer, request.receive):
            return await to_thread.run_sync(answer.whole)

    return app


@dataclass
class Answer:
    """An Answer turns the ids of a request's texts into what is sent.

    Attributes:
        asked: the request.
        tokenizer: of the ids.
        model: name of the model.
        prompts: ids of each prompt.
        texts: the texts that are being decoded, those of a prompt next to each other.
    """

    asked: CompletionRequest
    tokenizer: Tokenizer
    model: str
    prompts: list[list[int]]
    texts: list[Decoded]
    number: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    drawn: int = 0

    @classmethod
    def begin(cls, asked: CompletionRequest, batcher: Batcher, tokenizer: Tokenizer, model: str) -> Answer:
        """Queue all texts of a request.

        Raises:
            ConfigError: a prompt that is empty, too long, or has an id that the tokenizer does not know.
        """
        prompts = [_ids(prompt, tokenizer) for prompt in asked.prompts]
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        texts: list[Decoded] = []
        try:
            for number in range(len(prompts) * asked.n):
                sampling = Sampling(asked.temperature, asked.top_k, (seed + number) % 2**63, asked.top_p)
                texts.append(batcher.submit(prompts[number // asked.n], asked.max_tokens, sampling))
        except LongNetError:
            for text in texts:
                text.cancel()
            raise
        return cls(asked, tokenizer, model, prompts, texts)

    def whole(self) -> Completion:
        """Return the answer once all texts are complete."""
        choices = []
        for index in range(len(self.texts)):
            parts = list(self._choices(index))
            text = "".join(part.text for part in parts)
            choices.append(Choice(text=text, index=index, finish_reason=parts[-1].finish_reason))
        return self._completion(choices, self._usage())

    def events(self) -> Iterator[str]:
        """Yield the server-sent events of a stream: the pieces of one text, then those of the next."""
        try:
            for index in range(len(self.texts)):
                for choice in self._choices(index):
                    yield f"data: {self._completion([choice]).model_dump_json()}\n\n"
            if self.asked.with_usage:
                yield f"data: {self._completion([], self._usage()).model_dump_json()}\n\n"
        except LongNetError as error:
            yield f"data: {json.dumps(error_body(str(error)))}\n\n"
        except Exception:  # the batcher's, which its thread raises too
            yield f"data: {json.dumps(error_body(STOPPED, 'server_error'))}\n\n"
        yield "data: [DONE]\n\n"

    def _choices(self, index: int) -> Iterator[Choice]:
        """Yield the pieces of a text; the last one has the reason of its end."""
        prompt, text = self.prompts[index // self.asked.n], self.texts[index]
        stream = TextStream(self.tokenizer, prompt, self.asked.stops)
        if self.asked.echo:
            yield Choice(text=self.tokenizer.decode(prompt).decode("utf-8", errors="replace"), index=index)
        ended = False
        for number in text:
            self.drawn += 1
            ended = number == self.tokenizer.document_separator
            if not ended and (piece := stream.push(number)):
                yield Choice(text=piece, index=index)
            if ended or stream.stopped:
                text.cancel()
                break
        rest = stream.finish()
        yield Choice(text=rest, index=index, finish_reason="stop" if ended or stream.stopped else "length")

    def cancel(self) -> None:
        """Free the places of texts that nobody waits for: the client has gone, or one of the texts failed."""
        for text in self.texts:
            text.cancel()

    def _usage(self) -> Usage:
        prompt_tokens = sum(map(len, self.prompts))
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=self.drawn, total_tokens=prompt_tokens + self.drawn)

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.number, created=self.created, model=self.model, choices=choices, usage=usage)


class Events(StreamingResponse):
    """Events send an answer piece by piece.

    Args:
        answer: the answer, which is cancelled at the end.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, or those until the client has gone."""
        async with _wanted(self._answer, receive):
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def _wanted(answer: Answer, receive: Receive) -> AsyncIterator[None]:
    """Cancel an answer at the end, and as soon as its client has gone, so that its places are free for others.

    A thread that waits for the answer's ids is not interrupted; cancelling ends its wait.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        answer.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        answer.cancel()


def _ids(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return [int(number) for number in tokenizer.encode(prompt.encode("utf-8", errors="replace"))]
    tokenizer.decode(prompt)  # raises if an id is unknown
    return prompt
