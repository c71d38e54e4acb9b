"""The formulas agree with counted bytes, for the CPU's kernel and for the buffers of the GPU's kernel."""

from typing import Any

import pytest
import torch

from longnet_dist.attention import functional
from longnet_dist.engine.execution import Execution
from longnet_dist.estimate.activations import backward_peak_of_block, saved_by_block, saved_qkv
from longnet_dist.model.block import Block
from longnet_dist.model.longnet import LongNet, positions_of
from tests.estimate.layouts import small_layout
from tests.estimate.live_bytes import LiveBytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS: tuple[dict[str, Any], ...] = ({}, {"kv_heads": 1}, {"ffn_dim": 200}, {"positions": "none"}, {"qk_norm": True},
                                      {"ffn": "gated", "ffn_dim": 200}, {"sinks": True})  # fmt: skip


class BuffersOfTriton:
    """This kernel allocates the buffers of the Triton kernel, which needs a GPU, and computes nothing."""

    starts_fresh = True
    merges_overlaps = False

    def accumulator_dtype(self, dtype):
        return dtype

    def gradient_dtypes(self, dtype):
        return torch.float32, dtype

    def compile(self, calls, q, k, v, backward):
        pass

    def forward(self, call, q, k, v, out, lse):
        out.zero_()
        lse.zero_()

    def start_backward(self, dout, out, lse, dq, scratch=None, delta=None, dlse=None):
        dq.zero_()
        return (torch.cat([lse, lse]) if scratch is None else scratch,)

    def backward(self, call, given, sums):
        sums.dk.zero_()
        sums.dv.zero_()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_bytes_that_autograd_saves_of_a_block(precision, model):
    """The bytes are those of all storages saved for backward, each once, without parameters and tables."""
    layout = small_layout(rows=512, device_type="cpu", model=model, train={"precision": precision})
    config, saved = layout.config.model, {}
    block = Block(config, positions_of(config), None).to(DTYPES[precision])
    x = torch.randn(1, 512, config.dim, dtype=DTYPES[precision], requires_grad=True)
    block(x, None, None)  # which makes the tables

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, None, None)
    others = [*block.parameters(), *(block.self_attn.positions._cached[1] if config.positions != "none" else [])]
    known = {tensor.untyped_storage()._cdata for tensor in others}
    counted = sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in known)
    assert saved_by_block(layout) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("mode", "tile", "model", "kept"),
    [
        ("none", None, {}, 0),
        ("none", 256, {"kv_heads": 1}, 0),
        ("selective", None, {}, 0),
        ("selective", 256, {"kv_heads": 1}, 0),
        ("selective", 256, {}, 2),
        ("full", None, {"kv_heads": 1}, 0),
        ("full", 256, {}, 0),
        ("none", None, {"ffn": "gated"}, 0),
        ("selective", None, {"ffn": "gated"}, 0),
        ("selective", 256, {"ffn": "gated", "kv_heads": 1}, 2),
        ("full", None, {"ffn": "gated"}, 0),
    ],
)
def test_the_peak_of_a_model_on_a_gpu(monkeypatch, mode, tile, model, kept):
    """The peak is that of the bytes of all living tensors in a forward and backward of all blocks."""
    monkeypatch.setattr(functional, "choose_kernel", lambda *_: BuffersOfTriton())
    train = {"activation_checkpointing": mode, "feed_forward_tile": tile, "cache_qkv": kept, "compile": False}
    layout = small_layout(rows=2048, model=model, train=train)
    network = LongNet(layout.config.model, execution=Execution.of(layout.config.train, "cpu")).to(torch.bfloat16)
    tokens = torch.randint(0, 256, (1, 2048))
    network(tokens, tokens).loss.backward()  # so that tables and gradients exist
    with LiveBytes() as live:
        tables = network.positions._cached[1] if network.positions else []
        live.add([*network.parameters(), *(p.grad for p in network.parameters()), tokens, *tables])
        before = live.now
        network(tokens, tokens).loss.backward()
    planned = layout.config.model.layers * saved_by_block(layout) + backward_peak_of_block(layout)
    planned += kept * saved_qkv(layout)
    assert planned == pytest.approx(live.peak - before, rel=0.05)


def test_compiled_blocks_make_the_gelu_again():
    sizes = {
        compiled: saved_by_block(
            small_layout(rows=512, train={"compile": compiled, "activation_checkpointing": "none"})
        )
        for compiled in (True, False, "auto")
    }
    assert sizes["auto"] == sizes[True]
    layout = small_layout(rows=512)
    assert sizes[False] - sizes[True] == 512 * layout.config.model.inner_dim * layout.itemsize
