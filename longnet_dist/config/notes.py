"""Settings that are valid but do nothing, or not what their name promises, in a given configuration."""

from __future__ import annotations

from collections.abc import Iterator

from longnet_dist.config.schema import Config, TrainConfig


def notes(config: Config) -> list[str]:
    """Return a line for each setting that a user should hear about, with the reason.

    Args:
        config: the run.
    """
    return [*_of_schedule(config.train), *_without_effect(config)]


def _of_schedule(train: TrainConfig) -> Iterator[str]:
    if train.warmup_steps >= train.steps:
        yield (
            f"train.warmup_steps={train.warmup_steps} is not shorter than train.steps={train.steps}: the run ends "
            "before the learning rate decays"
        )
    elif 2 * train.warmup_steps > train.steps:
        yield (
            f"train.warmup_steps={train.warmup_steps} is more than half of train.steps={train.steps}: the learning "
            f"rate rises in most of the run; use fewer, such as train.warmup_steps={train.steps // 20}"
        )
    if train.checkpoint_every and train.keep_every % train.checkpoint_every:
        yield (
            f"train.keep_every={train.keep_every} is no multiple of train.checkpoint_every={train.checkpoint_every}: "
            "only checkpoints at multiples of both are kept"
        )


def _without_effect(config: Config) -> Iterator[str]:
    """Yield a line for each key that differs from its default, but that another key makes ineffective."""
    train, fields = config.train, type(config.train).model_fields
    for key, reason in (*_of_checkpoints(config), *_of_validation(train), *_of_length(config)):
        if reason and getattr(train, key) != fields[key].default:
            yield f"train.{key} has no effect: {reason}"
    if config.data.path is not None and config.data.cache_dir != type(config.data).model_fields["cache_dir"].default:
        yield "data.cache_dir has no effect: data.path is given"


def _of_checkpoints(config: Config) -> Iterator[tuple[str, str]]:
    """Yield keys that need checkpoints, each with the reason why it has no effect, if there is one."""
    train = config.train
    none = "" if train.checkpoint_every else "train.checkpoint_every=0"
    for key in ("keep_last", "keep_best", "checkpoint_async", "checkpoint_parts", "checkpoint_failures"):
        yield key, none
    yield "keep_every", none or ("" if train.keep_last else "train.keep_last=0 keeps all checkpoints")
    no_sample = none or ("" if train.sample_tokens else "train.sample_tokens=0")
    yield "sample_prompt", no_sample or ("" if config.model.causal else "model.causal=false")


def _of_validation(train: TrainConfig) -> Iterator[tuple[str, str]]:
    for key in ("validation_tokens", "keep_best", "patience"):
        yield key, "" if train.validate_every else "train.validate_every=0"


def _of_length(config: Config) -> Iterator[tuple[str, str]]:
    yield "shortest_length", "" if config.train.length_warmup else "train.length_warmup=0"
    length, chunk = config.data.sequence_length, config.train.chunk_length
    whole = chunk is not None and chunk >= length
    yield "chunk_length", f"data.sequence_length={length} is not longer" if whole else ""
