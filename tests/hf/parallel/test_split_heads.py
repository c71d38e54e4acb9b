"""Heads that another library splits over ranks would get offsets of other heads: that is an error on all ranks."""

import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError
from longnet_dist.train.deepspeed_engine import prepare_deepspeed
from tests.distributed import run_distributed
from tests.hf.models import hf, make, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
REMEDY = "longnet_dist.hf.sequence_parallel"


def with_ulysses(kv_heads):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    prepare_deepspeed(LaunchEnvironment(rank, ranks, rank, ranks), torch.device("cpu"))
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed("gloo")
    model = make("llama", num_key_value_heads=kv_heads)
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation="dilated", sequence_parallel_size=ranks, micro_batch_size=1, seq_length=32
    )
    mine = slice(rank * 16, rank * 16 + 16)
    try:
        model(tokens(32, 1)[:, mine], position_ids=torch.arange(32)[None, mine])
    except ConfigError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_ulysses_is_refused(kv_heads):
    messages = run_distributed(with_ulysses, 2, kv_heads)
    assert messages[0] == messages[1]
    assert "do not split heads over ranks (tensor parallelism, Ulysses)" in messages[0]
    assert REMEDY in messages[0]


@pytest.mark.parametrize(("heads", "kv_heads", "positions"), [(2, 1, 8), (4, 1, 8), (2, 2, 8), (4, 2, 16)])
def test_parts_of_heads_and_positions_are_refused(heads, kv_heads, positions):
    module = make("llama").model.layers[0].self_attn
    q, k = torch.randn(1, heads, 8, 8), torch.randn(1, kv_heads, 8, 8)
    attention = hf.dilation.dilated_forward
    attention(module, torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8), torch.randn(1, 2, 8, 8), None)
    with pytest.raises(ConfigError, match=REMEDY):
        attention(module, q, k, k, None, position_ids=torch.arange(positions)[None])
