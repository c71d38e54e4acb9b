import shutil
import sys
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from longnet_dist import numerics
from longnet_dist.attention.positions import Positions, rotate
from longnet_dist.config.loading import load_config
from longnet_dist.engine.rows import RowParts
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.model.longnet import LongNet
from longnet_dist.ops import matmul as package
from longnet_dist.ops.compiled import _compiled
from longnet_dist.ops.matmul import choice
from longnet_dist.ops.matmul.choice import FEWEST_ROWS, REFERENCE, Matmul, choose_matmul
from tests.engine.test_block_run import model_config
from tests.quack_stand_in import quack_kernels

CUDA = torch.device("cuda")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def table_of(rows, head_dim, dtype=torch.float64, device="cpu"):
    place = DilatedPattern([64], [1]), 3, rows, 10**5, head_dim
    return Positions(xpos_base=10**5).table(*place, dtype, torch.device(device))


# On a GPU the tests with the real one say more.
FOLDED = REFERENCE if torch.cuda.is_available() else Matmul(*(*quack_kernels().FUNCTIONS, True))


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_norm_behind_a_product_computes_the_same(monkeypatch, compile, fields):
    torch.manual_seed(0)
    block = LongNet(model_config(dim=128, heads=2, kv_heads=1, **fields)).blocks[0]
    with torch.no_grad():
        for vector in (parameter for parameter in block.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4
    weights, table = dict(block.named_parameters()), table_of(20, 64, torch.float32)
    x, dz, dx = torch.randn(3, 20, 128) + 1
    out, dq, dk, dv = (torch.randn(20, number, 64) for number in (2, 2, 1, 1))

    def results(*execution, kept=True):
        parts, total = RowParts(weights, table, 64, 1e-5, *execution), dx.clone()
        z, moments = parts.output(x, out)
        first, dout, _, gradients = parts.output_gradients(x, out, dz, moments if kept else [])
        before = parts.add_projection_gradients(x, (dq, dk, dv), total)
        return [*parts.projections(x), z, first, dout, *gradients, *before, total]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    _compiled.cache_clear()
    actual, again = results(7, compile, FOLDED), results(7, compile, FOLDED, kept=False)
    _compiled.cache_clear()
    torch._dynamo.reset()
    torch.testing.assert_close(actual, results(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, actual, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.?torch.jit.script_method:DeprecationWarning")  # of torch's compiler itself
@pytest.mark.parametrize("matmul", [REFERENCE, FOLDED], ids=["torch", "norm behind"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_bias_too_small_to_matter_does_not_matter(compile, matmul):
    """The sum of two numbers in bfloat16 is often half-way between two others.

    Rounded once together with a bias, however small, it would go where the bias points: by a thousand times the bias.
    """
    torch.manual_seed(0)
    block = LongNet(model_config(dim=64, ffn_dim=128)).blocks[0].bfloat16()
    x, out = torch.randn(500, 64).bfloat16(), torch.randn(500, 4, 16).bfloat16()

    def result(bias):
        weights = dict(block.named_parameters()) | {"ffn.fc2.bias": torch.full((64,), bias, dtype=torch.bfloat16)}
        return RowParts(weights, None, 16, 1e-5, None, compile, matmul).output(x, out)[0].float()

    assert (result(8e-7) - result(0)).mean().abs() < 5e-6
    assert (result(0.1) - result(0)).mean() == pytest.approx(0.1, rel=0.02)


def test_the_choice_of_a_backend(monkeypatch, caplog):
    cpu, bf16, widths = torch.device("cpu"), torch.bfloat16, (768, 3072)
    assert choose_matmul("auto", cpu, bf16, 2**20, widths) is REFERENCE
    assert choose_matmul("torch", CUDA, bf16, 2**20, widths) is REFERENCE
    assert choose_matmul("quack", CUDA, bf16, FEWEST_ROWS - 1, widths) is REFERENCE
    with pytest.raises(ConfigError, match=r"train.matmul=quack runs on a Hopper GPU, not on cpu; .*matmul=auto"):
        choose_matmul("quack", cpu, bf16, 2**20, widths)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match="Hopper"):
        choose_matmul("quack", CUDA, bf16, 2**20, widths)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"not torch\.float32"):
        choose_matmul("quack", CUDA, torch.float32, 2**20, widths)
    with pytest.raises(ConfigError, match=r"multiple of 8 numbers, not of 768, 1001"):
        choose_matmul("quack", CUDA, bf16, 2**20, (768, 1001))
    choice._quack.cache_clear()
    monkeypatch.setitem(sys.modules, "quack", None)  # so that its import fails
    monkeypatch.delitem(sys.modules, "longnet_dist.ops.matmul.quack", raising=False)
    monkeypatch.delattr(package, "quack", raising=False)
    with pytest.raises(ConfigError, match=r"needs the package quack-kernels: pip install .*cuda"):
        choose_matmul("quack", CUDA, bf16, 2**20, widths)
    with caplog.at_level("WARNING"):
        numerics.log_once.cache_clear()
        assert choose_matmul("auto", CUDA, bf16, 2**20, widths) is REFERENCE
        assert choose_matmul("auto", CUDA, bf16, 2**20, widths) is REFERENCE
    assert [record.message.count("quack-kernels") for record in caplog.records] == [1]
    choice._quack.cache_clear()


def test_a_configuration_chooses_them(tmp_path):
    given = ["model.name=tiny", "train.output_dir=x", "train.steps=1", "train.matmul=quack"]
    path = tmp_path / "config.yaml"
    path.write_text("model: {}\n")
    assert load_config(path, given).train.matmul == "quack"
    with pytest.raises(ConfigError, match="matmul"):
        load_config(path, [*given, "train.matmul=cublas"])
    with pytest.raises(ConfigError, match=r"train.compile is false; use train.compile=auto or train.matmul=auto"):
        load_config(path, [*given, "train.compile=false"])


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "numbers", "outputs"), [(5000, 768, 768), (4101, 768, 3072), (4097, 2048, 1000)])
def test_quack_agrees_with_float64(rows, numbers, outputs, dtype):
    pytest.importorskip("quack")
    torch.manual_seed(0)
    functions = choose_matmul("quack", CUDA, dtype, rows, (numbers, outputs))
    x = torch.randn(rows, numbers, device="cuda").to(dtype) + 1
    weight = (torch.randn(outputs, numbers, device="cuda") / numbers**0.5).to(dtype)
    bias, added = torch.randn(outputs, device="cuda").to(dtype), torch.randn(rows, outputs, device="cuda").to(dtype)
    normed, (wx, ww, wb, wa) = functions.normed(x, None, None, 1e-5), (y.double() for y in (x, weight, bias, added))
    with_norm = F.layer_norm(wx, wx.shape[-1:], eps=1e-5) @ ww.T + wb
    expected = {
        "norm": (functions.linear(normed, weight, bias, None), with_norm),
        "norm and sum": (functions.linear(normed, weight, bias, added), with_norm + wa),
        "bias": (functions.linear((x,), weight, bias, None), wx @ ww.T + wb),
        "sum": (functions.linear((x,), weight, bias, added), wx @ ww.T + wb + wa),
        "product": (functions.matmul(added, weight), wa @ ww),
    }
    functions.write_linear((x,), weight, bias, added, added)
    expected["in place"] = (added, wx @ ww.T + wb + wa)
    for name, (actual, wanted) in expected.items():
        assert (actual - wanted).norm() < 0.003 * wanted.norm(), name


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head_dim", [64, 96])
def test_quack_turns_heads(head_dim):
    pytest.importorskip("quack")
    torch.manual_seed(0)
    rows, numbers, outputs = 4101, 768, 6 * head_dim
    functions, table = (
        choose_matmul("quack", CUDA, torch.bfloat16, rows, (768,)),
        table_of(rows, head_dim, device="cuda"),
    )
    assert head_dim in functions.rotated_dims
    x = torch.randn(rows, numbers, device="cuda").bfloat16() + 1
    weight = (torch.randn(outputs, numbers, device="cuda") / numbers**0.5).bfloat16()
    bias, out = torch.randn(outputs, device="cuda").bfloat16(), torch.empty(rows, outputs, device="cuda").bfloat16()
    functions.write_rotated(functions.normed(x, None, None, 1e-5), weight, bias, table.key.float(), out)
    heads = F.layer_norm(x.double(), (numbers,), eps=1e-5) @ weight.double().T + bias.double()
    _, expected = rotate(*(2 * [heads.unflatten(1, (-1, head_dim))]), table)
    assert (out - expected.flatten(1)).norm() < 0.003 * expected.norm()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.filterwarnings("ignore")
def test_a_block_computes_the_same_with_quack():
    """As near to float64 as with torch's."""
    pytest.importorskip("quack")
    torch.manual_seed(0)
    with CUDA:
        block = LongNet(model_config(dim=256, ffn_dim=1024, layers=1)).blocks[0].bfloat16()
    weights, rows = dict(block.named_parameters()), 5000
    table = table_of(rows, 64, torch.float32, "cuda")
    x, dz, dx = torch.randn(3, rows, 256, device="cuda", dtype=torch.bfloat16)
    out, dq, dk, dv = (torch.randn(rows, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 4, 2, 2))

    def results(given, matmul, compile):
        weights, x, out, dz, dx, *gradients = given
        parts, total = RowParts(weights, table, 64, 1e-5, 3000, compile, matmul), dx.clone()
        z, moments = parts.output(x, out)
        first, dout, _, after = parts.output_gradients(x, out, dz, moments)
        before = parts.add_projection_gradients(x, tuple(gradients), total)
        return [*parts.projections(x), z, first, dout, *after, *before, total]

    given = weights, x, out, dz, dx, dq, dk, dv
    wide = {name: weight.detach().double() for name, weight in weights.items()}, *(y.double() for y in given[1:])
    exact = results(wide, REFERENCE, False)
    quack = choose_matmul("quack", CUDA, torch.bfloat16, rows, (256, 128, 1024))
    for ours, plain, wanted in zip(results(given, quack, True), results(given, REFERENCE, True), exact, strict=True):
        allowed = 1.2 * (plain - wanted).norm() + 0.002 * wanted.norm()
        assert (ours - wanted).norm() <= allowed
