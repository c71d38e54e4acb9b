import pytest
from pydantic import BaseModel, ValidationError

from longnet_dist.config.model import MODEL_NAMES, LongNetConfig, named_model
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern


class Outer(BaseModel):
    model: LongNetConfig


@pytest.mark.parametrize(
    ("name", "layers", "dim", "heads"),
    [
        ("paper", 12, 768, 12),
        ("125m", 12, 768, 12),
        ("350m", 24, 1024, 16),
        ("760m", 24, 1536, 16),
        ("1.3b", 24, 2048, 32),
        ("2.7b", 32, 2560, 32),
    ],
)
def test_named_sizes(name, layers, dim, heads):
    config = named_model(name)
    assert (config.layers, config.dim, config.heads, config.head_dim) == (layers, dim, heads, dim // heads)
    assert config.pattern == DilatedPattern.paper()
    assert (config.positions, config.xpos_base, config.causal) == ("xpos", 512, True)


def test_every_name_has_a_size():
    assert [named_model(name).layers > 0 for name in MODEL_NAMES] == [True] * 8
    assert named_model("tiny").pattern == DilatedPattern.geometric(base=128, longest=512)


def test_fields_replace_those_of_the_named_size_wherever_the_model_is_nested():
    config = Outer.model_validate({"model": {"name": "125m", "dim": 24, "heads": 4, "kv_heads": 2}}).model
    assert (config.dim, config.layers, config.head_dim, config.kv_heads) == (24, 12, 6, 2)
    assert Outer.model_validate({"model": config.model_dump(mode="json")}).model == config


def test_encoder_has_a_mask_id_and_rope():
    encoder = named_model("tiny", vocab_size=300, causal=False)
    assert (encoder.mask_id, encoder.positions) == (300, "rope")
    assert named_model("tiny").mask_id is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "huge"}, "one of paper, tiny, 125m, .*, 2.7b, 8b, not 'huge'"),
        ({"name": "tiny", "haeds": 2}, "no field 'haeds'; the nearest is 'heads'"),
        ({"dim": 64}, "needs 'layers'"),
        ({"name": "tiny", "layers": 0}, "layers=0: Input should be greater than 0"),
        ({"name": "tiny", "dim": 66}, "heads must divide dim, but dim=66 and heads=4"),
        ({"name": "tiny", "kv_heads": 3}, "heads=4 and kv_heads=3"),
        ({"name": "tiny", "dim": 12}, "dim/heads must be even.*give 3"),
        ({"name": "tiny", "causal": False, "positions": "xpos"}, "causal=false; use positions=rope"),
        ({"name": "tiny", "rope_theta": 0.5}, "rope_theta must be at least 1"),
        ({"name": "tiny", "norm_eps": float("nan")}, "norm_eps"),
        ({"name": "tiny", "dilation_rates": [1]}, "3 segment_lengths .* and 1 dilation_rates"),
        ({"name": "tiny", "segment_lengths": [0, 1, 2]}, "segment_lengths must be positive"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LongNetConfig(**fields)
    with pytest.raises(ValidationError, match=message):  # what the loader of whole configs turns into its own message
        Outer.model_validate({"model": fields})


def test_odd_head_dim_is_allowed_without_positions():
    assert named_model("tiny", dim=12, positions="none").head_dim == 3


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        named_model("tiny").dim = 3


def test_the_attention_of_layers_is_chosen_by_name():
    counts = named_model("tiny", layers=7, layer_offsets=True, full_layers=[0, 4, 5]).pattern_counts
    config = named_model("tiny", layers=7, layer_offsets=True, full_layers=[0, 4, 5])
    patterns = [config.layer_pattern(layer) for layer in range(7)]
    assert counts == {pattern: patterns.count(pattern) for pattern in patterns}
    assert counts[patterns[0]] == 3
    assert named_model("tiny", attention="full").pattern_counts == {patterns[0]: 2}
    deep = named_model("tiny", layers=9, dilation_rates=[1, 2, 3], layer_offsets=True, layer_shift=True)
    own = [deep.layer_pattern(layer) for layer in range(9)]
    assert deep.pattern_counts == {pattern: own.count(pattern) for pattern in own}
    assert [pattern.shift for pattern in own[:2]] == [(0, 0, 0), (40, 168, 168)]  # 512 / 3 rounded down to 168
    assert repr(named_model("tiny", attention="window", window=7).pattern) == "WindowPattern(7)"
    assert named_model("tiny", full_layers=[0, 1]).pattern_counts == {patterns[0]: 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "dense"}, "attention must be one of dilated, full, sparse, window, not 'dense'"),
        ({"attention": "sparse", "causal": False}, "attention=sparse is the fixed pattern"),
        ({"attention": "full", "layer_shift": True}, "leave them out, or use attention=dilated"),
        ({"window": 7}, "window=7 belongs to attention=window"),
        ({"full_layers": [2]}, r"numbers of layers from 0 to 1, not \[2\]"),
        ({"full_layers": [1, 1]}, r"not \[1, 1\]"),
        ({"attention": "full", "full_layers": [1]}, "leave full_layers out"),
        ({"attention": "window", "sinks": True}, "or sinks=false"),
        ({"attention": "full", "segment_lengths": [3, 4]}, "as many of each"),
    ],
)
def test_attention_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        named_model("tiny", **fields)
