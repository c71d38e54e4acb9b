from pathlib import Path

import pytest

from longnet_dist.config.loading import parse_config
from longnet_dist.config.notes import notes


def said(data=None, model=None, **train):
    """The lines about a run of 100 steps."""
    train = {"output_dir": "run", "steps": 100, "warmup_steps": 10} | train
    return notes(parse_config({"model": {"name": "tiny"} | (model or {}), "data": data or {}, "train": train}))


def test_nothing_is_said_of_a_sound_run():
    assert said() == []
    assert (
        said(keep_every=2000, chunk_length=64, sample_prompt="a", validation_tokens=9, data={"path": Path("a")}) == []
    )


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"warmup_steps": 100}, "train.warmup_steps=100 is not shorter than train.steps=100"),
        ({"warmup_steps": 51}, "is more than half of train.steps=100: the learning rate rises in most of the run; use"),
        ({"warmup_steps": 750}, "before the learning rate decays"),
        ({"keep_every": 30, "checkpoint_every": 20}, "train.keep_every=30 is no multiple of train.checkpoint_every=20"),
        (
            {"keep_every": 1000, "keep_last": 0},
            "train.keep_every has no effect: train.keep_last=0 keeps all",
        ),
        ({"keep_last": 9, "checkpoint_every": 0}, "train.keep_last has no effect: train.checkpoint_every=0"),
        ({"checkpoint_async": False, "checkpoint_every": 0}, "train.checkpoint_async has no effect"),
        (
            {"validation_tokens": 9, "validate_every": 0},
            "train.validation_tokens has no effect: train.validate",
        ),
        ({"sample_prompt": "a", "sample_tokens": 0}, "train.sample_prompt has no effect: train.sample_tokens=0"),
        ({"sample_prompt": "a", "model": {"causal": False}}, "train.sample_prompt has no effect: model"),
        ({"chunk_length": 2048}, "train.chunk_length has no effect: data.sequence_length=2048 is not longer"),
        ({"data": {"path": "a", "cache_dir": "b"}}, "data.cache_dir has no effect: data.path is given"),
    ],
)
def test_what_has_no_effect_is_said(settings, line):
    (found,) = said(**settings)
    assert line in found
