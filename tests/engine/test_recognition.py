"""Blocks whose modules were changed run as modules, with the engine attached or not."""

import logging
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from longnet_dist import numerics
from longnet_dist.attention.module import DilatedAttention
from longnet_dist.engine.execution import Execution
from longnet_dist.engine.recognition import obstacle
from longnet_dist.model.feed_forward import FeedForward
from longnet_dist.model.longnet import LongNet
from tests.engine.test_block_run import model_config

ENGINE = Execution("selective", tile=7)
EXECUTIONS = {"plain": Execution(), "engine": ENGINE, "full": Execution("full")}
TOKENS = torch.arange(2 * 31).reshape(2, 31) % 256
# Only the modules that compute something else than their part of the engine's mathematics.
PARTS = [
    "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.inner_attn_ln",
    "self_attn.out_proj", "self_attn_layer_norm", "final_layer_norm", "ffn", "ffn.fc1", "ffn.ffn_layernorm", "ffn.fc2",
    "self_attn.q_norm", "self_attn.k_norm",
]  # fmt: skip


def make(execution, **fields):
    torch.manual_seed(0)
    model = LongNet(model_config(qk_norm=True, **fields), execution=execution).double()
    with torch.no_grad():
        for vector in (parameter for parameter in model.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4  # norms and biases would be 1 and 0
    return model


def loss_of(model):
    loss = model(TOKENS, TOKENS.roll(-1, 1)).loss
    assert loss is not None
    return loss


@pytest.fixture(autouse=True)
def fresh_notices():
    numerics.log_once.cache_clear()


@pytest.mark.parametrize("name", EXECUTIONS)
def test_hooks_fire_on_every_module(name):
    model, seen = make(EXECUTIONS[name]), {kind: set() for kind in ("before", "after", "backward")}
    modules = {path: module for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)}
    for path, module in modules.items():
        module.register_forward_pre_hook(lambda *_, path=path: seen["before"].add(path))
        module.register_forward_hook(lambda *_, path=path: seen["after"].add(path))
        if path != "embedding":  # its input, ids, has no gradient
            module.register_full_backward_hook(lambda *_, path=path: seen["backward"].add(path))
    loss_of(model).backward()
    assert seen["before"] == seen["after"] == modules.keys()
    assert seen["backward"] == modules.keys() - {"embedding"}
    assert len(modules) > 40


def test_the_engine_takes_plain_blocks_only(caplog):
    model = make(ENGINE)
    assert [obstacle(block) for block in model.blocks] == [""] * 3
    with caplog.at_level(logging.WARNING):
        loss_of(model).backward()
    assert not caplog.records


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_that_changes_a_result_counts(part, caplog):
    expected = loss_of(make(Execution()))
    results = []
    for execution in EXECUTIONS.values():
        model = make(execution)
        model.blocks[1].get_submodule(part).register_forward_hook(lambda module, given, out: 1.5 * out + 0.1)
        with caplog.at_level(logging.WARNING):
            results.append(loss_of(model))
    assert abs(results[0] - expected) > 1e-8
    torch.testing.assert_close(results[1:], results[:1] * 2, rtol=1e-12, atol=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"blocks run as plain modules, without tiles, offloading and compiled parts: {part} has hooks"
    ]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Gated(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gate, self.out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        gate, value = self.gate(x).chunk(2, -1)
        return self.out(gate.sigmoid() * value)


class OtherFeedForward(FeedForward):
    def forward(self, x):
        return -super().forward(x)


def replace_ffn(block):
    torch.manual_seed(1)
    block.ffn = Gated(16).double()


def subclass_ffn(block):
    block.ffn.__class__ = OtherFeedForward


def replace_forward(block):
    block.final_layer_norm.forward = lambda x: 2 * x


def parametrize_a_weight(block):
    parametrize.register_parametrization(block.ffn.fc2, "weight", Doubled())


def change_eps(block):
    block.self_attn_layer_norm.eps = 0.5


def drop_a_bias(block):
    block.ffn.fc1.bias = None


def global_hook(block):
    return nn.modules.module.register_module_forward_hook(
        lambda module, given, out: 1.5 * out if isinstance(module, FeedForward) else None
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_ffn, "ffn is a tests.engine.test_recognition.Gated"),
        (subclass_ffn, "ffn is a tests.engine.test_recognition.OtherFeedForward"),
        (replace_forward, "the forward of final_layer_norm was replaced"),
        (parametrize_a_weight, "ffn.fc2 is a "),
        (change_eps, "eps of self_attn_layer_norm is 0.5"),
        (drop_a_bias, "ffn.fc1 has no bias"),
        (global_hook, "hooks for all modules are registered"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_module_counts(change, reason):
    unchanged = loss_of(make(Execution()))
    results = []
    for execution in EXECUTIONS.values():
        model = make(execution)
        handle = change(model.blocks[1])
        try:
            assert obstacle(model.blocks[1]).startswith(reason)
            loss = loss_of(model)
            loss.backward()
        finally:
            if handle is not None:
                handle.remove()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    assert abs(results[0][0] - unchanged) > 1e-7
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-12)


def test_autocast_runs_the_modules():
    losses = []
    for execution in (Execution(), ENGINE):
        model = make(execution).float()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    assert abs(losses[0] - loss_of(make(Execution()))) < 0.05


def test_full_checkpointing_of_plain_modules_saves_less():
    """torch recomputes a block that the engine does not take; the step is the same."""

    def saved_bytes(execution):
        model, sizes = make(execution), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        for block in model.blocks:
            block.ffn.__class__ = OtherFeedForward
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(model)
        return sum(sizes.values())

    assert saved_bytes(Execution("full")) < 0.5 * saved_bytes(Execution())


@pytest.mark.parametrize(("name", "ffn"), [("plain", "plain"), ("engine", "plain"), ("engine", "gated")])
def test_lora_trains_and_leaves_base_weights(name, ffn, caplog):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        model = make(EXECUTIONS[name], ffn=ffn)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=True))
    base = {key: value.detach().clone() for key, value in model.named_parameters() if not value.requires_grad}
    adapters = [value for value in model.parameters() if value.requires_grad]
    assert len(adapters) == 3 * 2 * len(targets)
    optimizer, losses = torch.optim.Adam(adapters, lr=1e-2), []
    with caplog.at_level(logging.WARNING):
        for _ in range(8):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert losses == sorted(losses, reverse=True)
    for key, value in base.items():
        assert torch.equal(value, model.get_parameter(key)), key
    said = [record.getMessage() for record in caplog.records if "plain modules" in record.getMessage()]
    assert len(said) == (name == "engine")


def test_int8_linear_layers_of_torchao_compute_as_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        losses = []
        for execution in (Execution(), ENGINE):
            model = make(execution, dim=64, ffn_dim=128).float()
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, _: isinstance(module, nn.Linear))
            assert "weight of self_attn.q_proj is a" in obstacle(model.blocks[0])
            with torch.no_grad():
                losses.append(loss_of(model))
    assert losses[0] == losses[1] != loss_of(make(Execution(), dim=64, ffn_dim=128).float())


def test_dynamic_int8_of_torch_computes_as_modules():
    """Another library's linear layer: torch's own dynamically quantized one replaces the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = []
        for execution in (Execution(), ENGINE):
            model = make(execution, dim=64, ffn_dim=128).float().eval()
            for block in model.blocks:
                block.ffn.fc1 = Fake8Bit(block.ffn.fc1)
            with torch.no_grad():
                losses.append(loss_of(model))
    assert losses[0] == losses[1] != loss_of(make(Execution(), dim=64, ffn_dim=128).float())


class Fake8Bit(nn.Linear):
    """Round the weight to 8 bits for each output, as weight-only quantization does."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())

    def forward(self, x):
        scale = self.weight.abs().amax(1, keepdim=True) / 127
        return nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)


def test_every_part_of_a_block_is_checked():
    """A new module of a block must be entered in the table of recognised parts."""
    from longnet_dist.engine.recognition import _PARTS

    block = make(ENGINE).blocks[0]
    assert sorted(name for name, _ in block.named_modules() if name) == sorted(name for name, _ in _PARTS)
    assert type(block.self_attn) is DilatedAttention


def test_compiled_parts_meet_many_shapes(monkeypatch, caplog):
    """torch stops at the 9th shape of a function unless told otherwise; far behind that, parts run uncompiled."""
    from longnet_dist.ops import compiled

    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiled, "MOST_SHAPES", 12)
    with caplog.at_level(logging.WARNING, logger="longnet_dist"):
        for rows in range(3, 20):
            x = torch.ones(rows, 2)
            assert torch.equal(compiled.run(_double, True, x), 2 * x)
            notices = [record for record in caplog.records if "12 shapes" in record.getMessage()]
            assert len(notices) == (rows - 2 > 12)
    compiled._compiled.cache_clear()


def _double(x):
    return x * 2
