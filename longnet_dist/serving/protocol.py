"""The bodies of requests and answers: those of OpenAI's completions endpoint."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NOT_OFFERED: dict[str, Any] = {
    "suffix": "",
    "logprobs": None,
    "best_of": 1,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Fields of the endpoint that are refused unless they have the value at which they do nothing."""
WITHOUT_EFFECT = ("user",)
"""Fields that say nothing about the text."""
BODY = """the body must be a JSON object such as {"prompt": "def "}, sent with Content-Type: application/json"""
MUST_BE = {"prompt": "a text, a list of texts, a list of ids, or a list of such lists", "stop": "a text or up to four"}


class StreamOptions(BaseModel):
    """StreamOptions say what a stream sends beside the texts.

    Attributes:
        include_usage: a last event without texts counts the tokens.
    """

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """A CompletionRequest asks for texts that continue one prompt or several; null is the default of a field.

    Attributes:
        prompt: a text, a list of texts, a list of ids, or a list of such lists.
        model: name of the model; None: the one that is served.
        max_tokens: how many to add, at most.
        temperature, top_p, seed: as in :class:`~longnet_dist.inference.generation.Sampling`; without a seed the draws
            differ from request to request.
        top_k: the same, an extension of the protocol.
        n: texts for each prompt.
        stop: up to four texts that end a text, and are no part of it.
        stream: send each text as it is drawn, as server-sent events.
        stream_options: of such a stream.
        echo: let the answer begin with the prompt.
    """

    model_config = ConfigDict(extra="allow")

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    echo: bool = False
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        for name, value in (self.model_extra or {}).items():
            if name in NOT_OFFERED and value != NOT_OFFERED[name]:
                raise ValueError(f"{name} is not offered; leave it out")
            known = [*type(self).model_fields, *NOT_OFFERED, *WITHOUT_EFFECT]
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(f"there is no field {name}; {f'the nearest is {near[0]}' if near else 'leave it out'}")
        if len(self.stops) > 4:
            raise ValueError(f"there can be at most 4 stop strings, not {len(self.stops)}")
        if not self.prompt and not isinstance(self.prompt, str):
            raise ValueError("there is no prompt in the list; give at least one")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options are those of a stream; leave them out, or use stream=true")
        return self

    @property
    def with_usage(self) -> bool:
        """Say whether a stream ends with a count of the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[number for number in self.prompt if isinstance(number, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]


class Choice(BaseModel):
    """A Choice is one text of an answer, or a piece of it.

    Attributes:
        text: what was added.
        index: number of the text.
        finish_reason: ``"stop"`` after a stop string or the end of a document, ``"length"`` after ``max_tokens``; None
            while more is to come.
    """

    text: str
    index: int
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class Usage(BaseModel):
    """A Usage counts tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """A Completion is an answer, or an event of a stream."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    object: Literal["text_completion"] = "text_completion"
    usage: Usage | None = None


def error_body(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """Return the body of an answer that refuses a request."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def mistake(fault: Mapping[str, Any]) -> str:
    """Return a message about the first fault that was found in a request's body."""
    place = [str(part) for part in fault["loc"][1:]]
    if fault["type"] == "json_invalid":
        return f"{BODY}, but it is no JSON: {fault['ctx']['error']} at character {place[0]}"
    if fault["loc"] == ("body",) and fault["type"] != "value_error":
        return BODY
    if place and place[0] in MUST_BE and fault["type"] != "missing":
        return f"{place[0]} must be {MUST_BE[place[0]]}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{'.'.join(place)}: {message}" if place else message
