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
    if train.checkpoint_every and train.keep_every % train.checkpoint_every:
        yield (
            f"train.keep_every={train.keep_every} is no multiple of train.checkpoint_every={train.checkpoint_every}: "
            "only checkpoints at multiples of both are kept"
        )


def _without_effect(config: Config) -> Iterator[str]:
    """Yield a line for each key that differs from its default, but that another key makes ineffective."""
    train = config.train
    makes_no_checkpoints = "train.checkpoint_every=0" if not train.checkpoint_every else ""
    validates_never = "train.validate_every=0" if not train.validate_every else ""
    keeps_all = "train.keep_last=0 keeps all checkpoints" if not train.keep_last else ""
    makes_no_sample = makes_no_checkpoints or ("train.sample_tokens=0" if not train.sample_tokens else "")
    makes_no_sample = makes_no_sample or ("model.causal=false" if not config.model.causal else "")
    whole = train.chunk_length is not None and train.chunk_length >= config.data.sequence_length
    reasons = {
        "keep_last": makes_no_checkpoints,
        "keep_every": makes_no_checkpoints or keeps_all,
        "checkpoint_async": makes_no_checkpoints,
        "checkpoint_failures": makes_no_checkpoints,
        "keep_best": makes_no_checkpoints or validates_never,
        "patience": validates_never,
        "validation_tokens": validates_never,
        "sample_prompt": makes_no_sample,
        "chunk_length": f"data.sequence_length={config.data.sequence_length} is not longer" if whole else "",
    }
    for key, reason in reasons.items():
        if reason and getattr(train, key) != TrainConfig.model_fields[key].default:
            yield f"train.{key} has no effect: {reason}"
    if config.data.path is not None and config.data.cache_dir != type(config.data).model_fields["cache_dir"].default:
        yield "data.cache_dir has no effect: data.path is given"
