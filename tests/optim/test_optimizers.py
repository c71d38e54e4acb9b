import copy

import pytest
import torch

from longnet_dist.checkpoint.parameter_roles import parameter_roles
from longnet_dist.config.loading import parse_config
from longnet_dist.config.model import LongNetConfig, named_model
from longnet_dist.config.schema import TrainConfig
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.model_cost import num_parameters, optimizer_numbers, parameter_shapes
from longnet_dist.model.longnet import LongNet
from longnet_dist.optim.optimizers import OPTIMIZERS, ParameterOf
from longnet_dist.optim.orthogonal_momentum import orthogonal

TINY = {"dim": 16, "layers": 2, "heads": 2, "segment_lengths": (8, 16), "dilation_rates": (1, 2), "vocab_size": 32}


def trained(model, optimizer, steps=3):
    for step in range(steps):
        tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(step))
        model(tokens, tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def parameters_of(model):
    roles = parameter_roles(model)
    return [ParameterOf(roles[name], parameter) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_roles_and_shapes_are_those_of_a_model(tied, causal):
    config = LongNetConfig(**TINY, tie_embeddings=tied, causal=causal, kv_heads=1, ffn_dim=24, qk_norm=True, sinks=True)
    model = LongNet(config)
    roles = parameter_roles(model)
    assert {name for name, role in roles.items() if role == "embedding"} == {"embedding.weight"}
    assert {name for name, role in roles.items() if role == "head"} == (set() if tied else {"head.weight"})
    assert all(
        name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) == (role == "matrix")
        for name, role in roles.items()
    )
    found, planned = {}, {}
    for name, parameter in model.named_parameters():
        shape = (1,) if roles[name] == "vector" else tuple(parameter.shape)
        found[roles[name], shape] = found.get((roles[name], shape), 0) + parameter.numel() // torch.Size(shape).numel()
    for role, shape, count in parameter_shapes(config):
        planned[role, shape] = planned.get((role, shape), 0) + count
    assert planned == found
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_states_are_those_that_the_optimizer_keeps(name):
    torch.manual_seed(0)
    config = LongNetConfig(**TINY)
    model = LongNet(config)
    optimizer = OPTIMIZERS[name].build(parameters_of(model), TrainConfig(output_dir="run", steps=1, optimizer=name))
    trained(model, optimizer, steps=1)
    numbers, roles = 0, parameter_roles(model)
    for key, parameter in model.named_parameters():
        kept = {state: tuple(value.shape) for state, value in optimizer.state[parameter].items() if state != "step"}
        assert kept == OPTIMIZERS[name].states(roles[key], tuple(parameter.shape)), key
        numbers += sum(torch.Size(shape).numel() for shape in kept.values())
    assert optimizer_numbers(config, name) == numbers


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    train = TrainConfig(output_dir="run", steps=1, optimizer="muon", learning_rate=0.01, weight_decay=0.1)
    model = LongNet(LongNetConfig(**TINY))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    twin = copy.deepcopy(model)
    ours = OPTIMIZERS["muon"].build(parameters_of(model), train)
    parameters = parameters_of(twin)
    matrices = [parameter.tensor for parameter in parameters if parameter.role == "matrix"]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p.tensor for p in parameters if p.role == "head"], "weight_decay": 0.1},
        {"params": [p.tensor for p in parameters if p.role in ("embedding", "vector")], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=train.adam_betas, eps=train.adam_eps)

    # The same gradients for both: where weights differ in the last bit, gradients of a model soon differ in bfloat16.
    for _ in range(3):
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for (name, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(value, start[name])


def test_orthogonal_has_nearly_equal_singular_values():
    matrix = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    kept = matrix.clone()
    values = torch.linalg.svdvals(orthogonal(matrix)) / (0.2 * 24**0.5)
    assert values.min() > 0.5
    assert values.max() < 1.5
    assert torch.equal(matrix, kept)
    cosine = torch.nn.functional.cosine_similarity(orthogonal(matrix).flatten(), matrix.flatten(), dim=0)
    assert cosine > 0.8


BASE = {"model": {"name": "tiny"}, "train": {"output_dir": "run", "steps": 1}}


@pytest.mark.parametrize(
    ("train", "deepspeed", "message"),
    [
        (
            {"optimizer": "adam"},
            {},
            r"train\.optimizer must be one of adafactor, adamw, muon, not 'adam'; did you mean",
        ),
        ({"optimizer": "adafactor"}, {}, r"needs deepspeed\.zero_stage 0, not 1, .*train\.precision=fp32, or .*=adamw"),
        ({"optimizer": "adafactor", "adam_eps": 1e-6}, {"zero_stage": 0}, r"adam_eps belongs to .*=adamw or muon"),
        ({"muon_momentum": 0.9}, {}, r"muon_momentum belongs to train\.optimizer=muon, but the optimizer is adamw"),
        ({"optimizer": "muon"}, {"offload_optimizer": True}, r"use deepspeed\.offload_optimizer=false"),
        ({}, {"extra": {"optimizer": {}}}, r"use train\.optimizer"),
    ],
)
def test_what_an_optimizer_cannot_do_is_refused(train, deepspeed, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(BASE | {"train": BASE["train"] | train, "deepspeed": deepspeed})


def test_configurations_with_every_optimizer_are_accepted():
    for name in OPTIMIZERS.names():
        for stage in OPTIMIZERS[name].zero_stages:
            parse_config(BASE | {"train": BASE["train"] | {"optimizer": name}, "deepspeed": {"zero_stage": stage}})
    assert OPTIMIZERS.names() == ("adafactor", "adamw", "muon")
    assert named_model("tiny") == parse_config(BASE).model
