import pytest
import torch

from longnet_dist.attention import functional
from longnet_dist.attention.kernels.backends import flash
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.kernels.registry import choose_kernel
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern


class CpuEngine:
    """torch's flash attention for CPUs behind the interface of the GPU engines; counts the problems of a launch."""

    def __init__(self):
        self.most = 0

    def forward(self, q, k, v, causal, scale):
        self.most = max(self.most, len(q))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal, scale=scale)
        return out.transpose(1, 2), lse

    def backward(self, dout, q, k, v, out, lse, causal, scale, deterministic):
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return tuple(part.transpose(1, 2) for part in parts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "offsets"), [(5, 5, "modulo"), (4, 2, "modulo"), (5, 5, "blocked")])
def test_engines_results_are_merged_exactly(monkeypatch, causal, heads, kv_heads, offsets):
    engine = CpuEngine()
    monkeypatch.setattr(flash, "MOST_PROBLEMS", 2)
    monkeypatch.setattr(functional, "choose_kernel", lambda *_: flash.FlashKernel(engine))
    pattern = DilatedPattern([8, 12, 24], [1, 3, 4], offsets)
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 50, heads, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 50, kv_heads, 8, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected, _ = oracle(*leaves, pattern, causal=causal)
    out = functional.dilated_attention(*leaves, pattern, causal=causal, backend="flash")
    wanted = [expected, *torch.autograd.grad(expected, leaves, dout)]
    for a, b in zip([out, *torch.autograd.grad(out, leaves, dout)], wanted, strict=True):
        assert (a - b).abs().max() < 1e-12
    assert engine.most == 2


def test_needs_a_gpu():
    with pytest.raises(ConfigError, match="runs on a GPU"):
        choose_kernel("flash", torch.device("cpu"), torch.bfloat16)
