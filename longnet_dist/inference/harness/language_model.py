"""A LongNet as a model of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.data.tokenizers import ids_with_text
from longnet_dist.errors import ConfigError
from longnet_dist.extras import require_extra
from longnet_dist.inference.decoder import CHUNK_LENGTH
from longnet_dist.inference.generation import Sampling, TextStream, generate
from longnet_dist.inference.harness.scoring import Continuation, score
from longnet_dist.inference.runs import load_trained
from longnet_dist.model.longnet import LongNet

require_extra("eval", "the plug-in for lm-evaluation-harness")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402

NAME = "longnet"
"""Under which lm-evaluation-harness knows the model."""
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
_SAMPLING = ("temperature", "top_k", "top_p")


class LongNetLM(TemplateLM):  # type: ignore[misc]
    """Score and continue texts of any length: nothing is cut off, and no window slides.

    ::

        lm_eval.simple_evaluate(model=LongNetLM("exported"), tasks=["mine"])

    Args:
        pretrained: folder of a run, one of its checkpoints, or an exported model.
        batch_size: texts that are continued together.
        device: such as ``"cuda:0"``; this process's own if not given.
        dtype: ``"float32"`` or ``"bfloat16"``; ``"auto"`` as the model is stored.
        chunk_length: tokens that are computed at once. Short texts are packed to as many; longer ones pass as a stream.
        max_gen_toks: tokens that are added where a task does not say how many.
        prefix_token_id: id before a text without context; the one that separates documents if not given.
        max_batch_size: not used; lm-evaluation-harness gives it.

    Raises:
        LongNetError: no such model, an impossible value, or several processes.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        chunk_length: int = CHUNK_LENGTH,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if LaunchEnvironment().world_size > 1:
            raise ConfigError("the plug-in for lm-evaluation-harness runs in one process; start it without a launcher")
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or chunk_length < 1 or max_gen_toks < 1:
            raise ConfigError(
                f"batch_size, chunk_length and max_gen_toks must be at least 1, but are {batch_size}, {chunk_length} "
                f"and {max_gen_toks}"
            )
        model, self._own_tokenizer = load_trained(Path(pretrained).expanduser())
        if not isinstance(model, LongNet):
            raise ConfigError(
                f"{pretrained} is a model of transformers, which the harness's own hf scores; use python -m "
                f"longnet_dist.inference.harness.command run --model hf --model_args pretrained=FOLDER,max_length=N, "
                f"where FOLDER is it, or for a run its longnet export --to hf"
            )
        self.model = model.to(device=device, dtype=_DTYPES[dtype])
        self._device, self._name = self.model.embedding.weight.device, pretrained
        self.batch_size, self.chunk_length, self.max_gen_toks = int(batch_size), chunk_length, max_gen_toks
        self._prefix = self._own_tokenizer.document_separator if prefix_token_id is None else prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        """Return what tells this tokenizer from others in a cache of requests."""
        return f"{self._own_tokenizer.name}:{self._name}".replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """Return the id that separates documents.

        Raises:
            ConfigError: the tokenizer has none, and none was given.
        """
        if self._prefix is None:
            raise ConfigError(
                f"a text without a context needs a token before it, but {self._own_tokenizer.name} has none that "
                f"separates documents; give prefix_token_id"
            )
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text; what looks like a special token is text."""
        return [int(number) for number in self._own_tokenizer.encode(string.encode())]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        continuations = [Continuation(context, ids) for _, context, ids in requests]
        scores = score(self.model, continuations, self.chunk_length)
        found = []
        for (names, _, _), one in zip(requests, self._shown(scores, len(requests), disable_tqdm), strict=True):
            found.append((one.log_likelihood, one.greedy))
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text as one sequence, whatever its length, nats."""
        texts = [Continuation([self.prefix_token_id], self.tok_encode(*request.args)) for request in requests]
        scores = self._shown(score(self.model, texts, self.chunk_length), len(texts), disable_tqdm)
        found = []
        for request, one in zip(requests, scores, strict=True):
            found.append(one.log_likelihood)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one.log_likelihood)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model adds to each context, up to a stop text, the end of a document or a number of tokens.

        Raises:
            ConfigError: an option that it does not know.
        """
        found: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda number: repr(requests[number].args[1]))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for _, group in groupby(order, key=lambda number: repr(requests[number].args[1])):
                numbers = list(group)
                for first in range(0, len(numbers), self.batch_size):
                    batch = numbers[first : first + self.batch_size]
                    texts = self._continue([requests[number].args[0] for number in batch], requests[batch[0]].args[1])
                    for number, text in zip(batch, texts, strict=True):
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    def _continue(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(options, self.max_gen_toks)
        stop, num_tokens = given.pop("until", None) or [], given.pop("max_gen_toks")
        if not given.pop("do_sample", False):
            given = {name: value for name, value in given.items() if name not in _SAMPLING}
            given["temperature"] = 0.0
        unknown = sorted(set(given) - set(_SAMPLING))
        if unknown:
            raise ConfigError(f"a LongNet is continued with {', '.join(_SAMPLING)}, not {', '.join(unknown)}")
        prompts = [self.tok_encode(context) or [self.eot_token_id] for context in contexts]
        allowed = torch.from_numpy(ids_with_text(self._own_tokenizer, self.model.config.vocab_size))
        streams = [
            TextStream(self._own_tokenizer, prompt, [stop] if isinstance(stop, str) else stop) for prompt in prompts
        ]
        pieces: list[list[str]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        sampling = Sampling(**{"temperature": 1.0, "top_k": 0} | given)
        for step in generate(
            self.model, prompts, num_tokens, sampling, chunk_length=self.chunk_length, allowed=allowed
        ):
            for number, new in enumerate(step):
                ended[number] = ended[number] or new == self._own_tokenizer.document_separator
                if not ended[number]:
                    pieces[number].append(streams[number].push(new))
                    ended[number] = streams[number].stopped
            if all(ended):
                break
        return ["".join(piece) + stream.finish() for piece, stream in zip(pieces, streams, strict=True)]

    def _shown(self, scores: Any, total: int, disable: bool) -> Any:
        return tqdm(scores, total=total, disable=disable, desc="loglikelihood", unit="text")
