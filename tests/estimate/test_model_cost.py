import pytest
import torch

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.model import MODEL_NAMES, named_model
from longnet_dist.estimate.model_cost import flops_per_token, forward_flops, matrix_weights, num_parameters
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.longnet import LongNet

VARIANTS = (
    {"kv_heads": 1},
    {"qk_norm": True, "ffn_dim": 100, "sinks": True},
    {"ffn": "gated", "ffn_dim": 44},
    {"tie_embeddings": True, "vocab_size": 1000},
    {"causal": False},
    {"causal": False, "tie_embeddings": True},
)


def built(config):
    with torch.device("meta"):
        return LongNet(config)


@pytest.mark.parametrize(("name", "fields"), [*((n, {}) for n in MODEL_NAMES), *(("tiny", v) for v in VARIANTS)])
def test_parameters_are_those_of_the_built_model(name, fields):
    config = named_model(name, **fields)
    model = built(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = config.vocab_size * config.dim
    assert matrix_weights(config) == sum(matrix.numel() for matrix in matrices) + head


ENCODERS = (
    {"feature_dim": 7},
    {"vocab_size": 30, "outputs": 30, "tie_embeddings": True, "position_embedding": "learned", "max_positions": 9},
    {"vocab_size": 30, "outputs": 20, "position_embedding": "learned", "max_positions": 9, "position_offset": 2},
    {"feature_dim": 7, "cls_token": True, "pool": "cls", "pool_norm_eps": 1e-6, "embedding_norm": True},
    {"sub_norm": False, "final_norm": False, "kv_heads": 1, "ffn_dim": 24},
)


@pytest.mark.parametrize("fields", ENCODERS)
def test_parameters_of_encoders_are_those_of_the_built_ones(fields):
    sizes = {"dim": 16, "layers": 3, "heads": 2, "segment_lengths": [8], "dilation_rates": [1]}
    config = EncoderConfig(**(sizes | fields))
    with torch.device("meta"):
        model = LongNetEncoder(config)
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert matrix_weights(config) == sum(x.numel() for x in matrices) + config.num_outputs * config.dim


def test_flops_are_six_a_weight_and_twelve_a_pair_and_channel():
    config = named_model("tiny", layers=3, segment_lengths=[8], dilation_rates=[1])
    pairs = 8 * 9 // 2 * 4  # of each of the 2 segments, for 4 heads
    assert forward_flops(config, 16) == 2 * 16 * matrix_weights(config) + 3 * 4 * 16 * 2 * pairs
    assert flops_per_token(config, 16) == 6 * matrix_weights(config) + 12 * 3 * 16 * 2 * pairs / 16


def test_flops_are_those_of_each_layers_attention():
    fields = {"layers": 3, "segment_lengths": [8], "dilation_rates": [1]}
    linear = 2 * 16 * matrix_weights(named_model("tiny", **fields))
    pairs = {"full": 16 * 17 // 2, "dilated": 2 * 8 * 9 // 2, "window": 1 + 2 + 14 * 3}
    for kind in ("full", "dilated"):
        assert forward_flops(named_model("tiny", attention=kind, **fields), 16) == linear + 3 * 4 * 16 * 4 * pairs[kind]
    hybrid = named_model("tiny", attention="window", window=3, full_layers=[1], **fields)
    assert forward_flops(hybrid, 16) == linear + 4 * 16 * 4 * (2 * pairs["window"] + pairs["full"])


def test_flops_of_a_row_do_not_grow_with_the_sequence():
    config = named_model("paper")
    assert flops_per_token(config, 2**20) == flops_per_token(config, 2**30)
