"""An encoder is its parts: embedding, positions, blocks in their style, norm, pool; padding takes no part."""

import itertools
import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from longnet_dist import EncoderConfig, LongNet, LongNetEncoder, dilated_attention, named_model, numerics, phantom_keys
from longnet_dist.engine.execution import Execution
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.geometry.window import Shards
from longnet_dist.model.position_embedding import sincos
from longnet_dist.model.stochastic_depth import stochastic_depth
from tests.distributed import run_distributed

SIZES = {"dim": 16, "layers": 3, "heads": 4, "segment_lengths": [8, 16, 32], "dilation_rates": [1, 2, 4]}
LENGTHS = [40, 13, 29]
VARIANTS = {
    "own": {},
    "cls": {"cls_token": True, "pool": "cls", "pool_norm_eps": 1e-6},
    "sincos": {
        "cls_token": True, "pool": "mean", "position_embedding": "sincos", "coordinates": 2, "tile_size": 4.0,
        "phantom_keys": True,
    },
    "learned": {"pool": "mean", "position_embedding": "learned", "max_positions": 50, "position_offset": 2},
    "counted": {"cls_token": True, "pool": "cls", "position_embedding": "sincos", "positions": "rope"},
    "deepnorm": {
        "deepnorm": True, "pre_norm": False, "sub_norm": False, "final_norm": False, "activation": "silu",
        "positions": "xpos", "embedding_norm": True,
    },
}  # fmt: skip


def make(seed=0, execution=None, group=None, **fields):
    torch.manual_seed(seed)
    config = EncoderConfig(**{**SIZES, **fields})
    model = LongNetEncoder(config, execution=execution, group=group).double()
    with torch.no_grad():
        for vector in (parameter for parameter in model.parameters() if parameter.dim() == 1):
            vector += torch.randn_like(vector) / 4  # norms and biases would be 1 and 0
    return model


def features(rows=40, batch=3, width=7):
    return torch.randn(batch, rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def coordinates(name, rows=40, batch=3):
    if VARIANTS[name].get("coordinates") != 2:
        return None
    places = torch.stack([torch.arange(batch * rows) % 11, torch.arange(batch * rows) // 11], -1)
    return places.view(batch, rows, 2).double() * 4 + 1.5


def by_hand(model, x):
    """All hidden states of embedded rows ``(1, n, E)``, in plain torch around the attention."""
    config, states = model.config, [x]
    alpha = (2 * config.layers) ** 0.25 if config.deepnorm else 1
    activation = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[config.activation]
    sink = phantom_keys(config.pattern, x.shape[1], config.heads) if config.phantom_keys else None

    def attend(block, x):
        q, k, v = (
            layer(x).unflatten(-1, (config.heads, -1))
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        if model.positions:
            q, k = model.positions(q, k, config.pattern, 0, x.shape[1])
        out = dilated_attention(q, k, v, config.pattern, causal=False, sink=sink, backend="reference")
        return block.self_attn.out_proj(block.self_attn.inner_attn_ln(out.flatten(2)))

    def feed(block, x):
        return block.ffn.fc2(block.ffn.ffn_layernorm(activation(block.ffn.fc1(x))))

    for block in model.blocks:
        for layer, norm in ((attend, block.self_attn_layer_norm), (feed, block.final_layer_norm)):
            y = layer(block, norm(x) if config.pre_norm else x)
            x = x * alpha + y if config.pre_norm else norm(x * alpha + y)
        states.append(x)
    return states


@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_are_those_of_the_equations_and_padding_takes_no_part(name):
    model, x, coords = make(feature_dim=7, **VARIANTS[name]), features(), coordinates(name)
    out = model(features=x, coords=coords, lengths=torch.tensor(LENGTHS), hidden_states=True)
    front = int(model.config.cls_token)
    assert out.last_hidden_state.shape == (3, 40 + front, 16)
    assert len(out.hidden_states) == 4
    for item, length in enumerate(LENGTHS):
        part = slice(item, item + 1)
        place = None if coords is None else coords[part, :length]
        alone = model(features=x[part, :length], coords=place, hidden_states=True)
        states = by_hand(model, alone.hidden_states[0])
        for packed, single, expected in zip(out.hidden_states, alone.hidden_states, states, strict=True):
            torch.testing.assert_close(packed[part, : length + front], single)
            torch.testing.assert_close(single, expected)
        last = model.norm(states[-1])
        torch.testing.assert_close(out.last_hidden_state[part, : length + front], last)
        assert not out.last_hidden_state[item, length + front :].any()
        if model.config.pool != "none":
            pooled = last[:, 0] if model.config.pool == "cls" else last[:, front:].mean(1)
            torch.testing.assert_close(out.pooled[part], model.pool_norm(pooled))
            torch.testing.assert_close(out.pooled[part], alone.pooled)
            assert [h.shape for h in out.pooled_states] == [(3, 16)] * 4


def test_positions_are_sines_then_cosines_with_the_last_coordinate_first():
    coords = torch.tensor([[3.0, 70001.0, 5.0]], dtype=torch.float64)
    vector = sincos(coords, 14, torch.float64)[0]
    expected = []
    for place in (5.0, 70001.0, 3.0):
        angles = [place / 10000 ** (i / 2) for i in range(2)]
        expected += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(vector, torch.tensor([*expected, 0.0, 0.0], dtype=torch.float64))


def test_what_is_added_to_the_rows():
    x = features()
    model = make(feature_dim=7, position_embedding="learned", max_positions=50, position_offset=2)
    embedded = model(features=x, hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embedded, model.projection(x) + model.learned_positions.weight[2:42])
    with pytest.raises(ShapeError, match="learned positions for 48 rows, but the sequence has 49"):
        model(features=features(49))

    name = "sincos"
    model, coords = make(feature_dim=7, **VARIANTS[name]), coordinates(name)
    embedded = model(features=x, coords=coords, hidden_states=True).hidden_states[0]
    tiles = torch.floor(coords / 4)
    torch.testing.assert_close(embedded[:, 1:], model.projection(x) + sincos(tiles, 16, torch.float64))
    torch.testing.assert_close(embedded[:, :1], model.cls_token.expand(3, 1, 16))

    model = make(feature_dim=7, **VARIANTS["counted"])
    embedded = model(features=x, hidden_states=True, lengths=LENGTHS).hidden_states[0]
    numbers = torch.arange(13).view(1, -1, 1)
    torch.testing.assert_close(
        embedded[1, 1:14], (model.projection(x[1:2, :13]) + sincos(numbers, 16, torch.float64))[0]
    )


def test_tokens_labels_and_packed_documents():
    model = make(vocab_size=30, outputs=20, scale_embedding=True)
    tokens = torch.arange(80).view(2, 40) * 7 % 30
    labels = tokens % 20
    labels[:, ::3] = -100
    out = model(tokens)
    torch.testing.assert_close(model(tokens, hidden_states=True).hidden_states[0], model.embedding(tokens) * 4)
    torch.testing.assert_close(out.logits, out.last_hidden_state @ model.head.weight.T)
    loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(tokens, labels).loss, loss)
    kept = F.cross_entropy(
        torch.cat([out.logits[0], model(tokens[1:, :9]).logits[0]]), torch.cat([labels[0], labels[1, :9]])
    )
    torch.testing.assert_close(model(tokens, labels, lengths=[40, 9]).loss, kept)

    shared = model(tokens, cu_seqlens=[0, 11, 40]).last_hidden_state
    torch.testing.assert_close(shared[:, 11:], model(tokens[:, 11:]).last_hidden_state)
    own = model(tokens, cu_seqlens=[[0, 11, 40], [3, 30]], hidden_states=True)
    torch.testing.assert_close(own.last_hidden_state[0], shared[0])
    torch.testing.assert_close(
        own.hidden_states[3][1:, 3:30], model(tokens[1:, 3:30], hidden_states=True).hidden_states[3]
    )


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointing_changes_no_gradient_and_says_what_it_cannot_run(mode, caplog):
    numerics.log_once.cache_clear()
    fields = {"feature_dim": 7, "dropout": 0.3, "drop_path": 0.5, "activation_dropout": 0.2, **VARIANTS["deepnorm"]}
    found = []
    for execution in (None, Execution(mode)):
        model = make(execution=execution, **fields)
        torch.manual_seed(3)
        with caplog.at_level(logging.WARNING):
            model(features=features(), lengths=LENGTHS).last_hidden_state.square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found)
    assert [record.message for record in caplog.records if "style of the block is not LongNet's own" in record.message]


def test_the_engine_runs_an_encoder_of_longnets_own_style(caplog):
    numerics.log_once.cache_clear()
    out = []
    for execution in (None, Execution("selective", tile=5)):
        model = make(execution=execution, feature_dim=7, pool="mean")
        out.append(model(features=features(), lengths=LENGTHS).pooled)
    torch.testing.assert_close(*out)
    assert not caplog.records


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_engine_runs_a_gated_encoder_with_its_default_activation(activation, caplog):
    numerics.log_once.cache_clear()
    fields = {"feature_dim": 7, "pool": "mean", "ffn": "gated"} | (
        {} if activation is None else {"activation": activation}
    )
    models = [make(execution=execution, **fields) for execution in (None, Execution("selective", tile=5))]
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(*(model(features=features(), lengths=LENGTHS).pooled for model in models))
    assert models[0].config.activation == (activation or "silu")
    assert ["has gated=True" in record.message for record in caplog.records] == ([True] if activation else [])


def test_dropout_and_stochastic_depth_act_in_training_alone():
    model, x = make(feature_dim=7, dropout=0.5, drop_path=0.5), features()
    first, second = (model(features=x).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(model(features=x).last_hidden_state, make(feature_dim=7)(features=x).last_hidden_state)
    assert [block.style.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    torch.manual_seed(0)
    ones = torch.ones(4000, 2, 3)
    kept = stochastic_depth(ones, 0.25, None, None, None)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
    assert abs(kept.mean() - 1) < 0.05


def test_clear_refusals():
    with pytest.raises(ConfigError, match="attention_dropout is not supported"):
        EncoderConfig(**SIZES, attention_dropout=0.1)
    with pytest.raises(ConfigError, match="cls_token=false"):
        EncoderConfig(**SIZES, pool="cls")
    with pytest.raises(ConfigError, match="no field 'tile_sizes'; the nearest is 'tile_size'"):
        EncoderConfig(**SIZES, tile_sizes=3)
    model = make(feature_dim=7, cls_token=True)
    for arguments, message in (
        ({}, "takes tokens or features"),
        ({"features": features(width=6)}, r"must be \(batch, rows, 7\)"),
        ({"tokens": torch.zeros(1, 4, dtype=torch.int64)}, "has no embedding for tokens; give features"),
        (
            {"features": features(), "labels": torch.zeros(3, 40, dtype=torch.int64)},
            "has no head for labels; set outputs",
        ),
        ({"features": features(), "coords": torch.zeros(3, 40, 2)}, "belong to position_embedding=sincos"),
        ({"features": features(), "padding_mask": torch.zeros(3, 40, dtype=torch.bool)}, "give lengths"),
        ({"features": features(), "lengths": [41, 1, 1]}, "at most the 40 rows"),
        ({"features": features(), "lengths": [4, 1]}, "for each of the 3 batch items"),
        ({"features": features(), "lengths": 40}, r"for each of the 3 batch items, but are \[40\]"),
        ({"features": features().half()}, r"float16, but the encoder is float64; use features.to\(torch.float64\)"),
        ({"features": features().long()}, "must be floating-point, but are int64; use features.float"),
        ({"features": features(), "cu_seqlens": [0, 40]}, "has a cls row before each sequence; give lengths"),
    ):
        with pytest.raises(ShapeError, match=message):
            model(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_ids_of_another_dtype_are_refused(dtype):
    model, tokens = make(vocab_size=9, outputs=9), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"tokens must be int64, but are \w+; convert them with tokens.long\(\)"):
        model(tokens.to(dtype))
    with pytest.raises(ShapeError, match=r"labels must be int64, but are \w+; convert them with labels.long\(\)"):
        model(tokens, tokens.to(dtype))


def test_autocast_takes_features_of_any_precision():
    model = make(feature_dim=7).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = [model(features=features().to(dtype)).last_hidden_state for dtype in (torch.float32, torch.bfloat16)]
    torch.testing.assert_close(*found, atol=0.1, rtol=0.1)


def test_coordinates_that_coincide_are_counted():
    model = make(feature_dim=7, **VARIANTS["sincos"])
    coords = coordinates("sincos")
    coords[1, 5:8] = coords[1, 4]
    with pytest.warns(UserWarning, match="3 of 13 coordinates land on a place"):
        model(features=features(), coords=coords, lengths=LENGTHS)


def test_a_language_model_takes_embeddings_and_returns_hidden_states():
    torch.manual_seed(0)
    model = LongNet(named_model("tiny", causal=False)).double()
    tokens = torch.arange(62).view(2, 31)
    for edges in (None, [0, 9, 31], [[0, 9, 31], [2, 20]]):
        out = model(tokens, hidden_states=True, cu_seqlens=edges)
        assert len(out.hidden_states) == model.config.layers + 1
        assert all(h.shape == (2, 31, 64) for h in out.hidden_states)
        torch.testing.assert_close(out.hidden_states[0], model.embedding(tokens))
        torch.testing.assert_close(out.last_hidden_state, model.norm(out.hidden_states[-1]))
        torch.testing.assert_close(out.logits, model.head(out.last_hidden_state))
        again = model(inputs_embeds=model.embedding(tokens), cu_seqlens=edges)
        assert torch.equal(again.logits, out.logits)
        assert again.hidden_states is None
    assert model(tokens, tokens).last_hidden_state is None
    with pytest.raises(ShapeError, match="give one of them"):
        model(tokens, inputs_embeds=model.embedding(tokens))
    with pytest.raises(ShapeError, match=r"must be \(batch, rows, 64\)"):
        model(inputs_embeds=torch.zeros(2, 31, 63))


def over_ranks(calls):
    """Pools, rows and summed gradients of this rank."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    found = []
    for name, kwargs in calls:
        model = make(group=group, feature_dim=7, **VARIANTS[name])
        front = int(model.config.cls_token)
        rows = -(-(40 + front) // ranks)  # of a rank, cls row included
        start, stop = max(rank * rows - front, 0), min((rank + 1) * rows - front, 40)
        coords = coordinates(name)
        place = None if coords is None else coords[:, start:stop]
        out = model(features=features()[:, start:stop], coords=place, **kwargs)
        loss = out.last_hidden_state.square().sum()
        if out.pooled is not None:
            loss = loss + out.pooled.square().sum() / ranks
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
        found.append((out.last_hidden_state.detach(), out.pooled, [p.grad for p in model.parameters()]))
    return found


def test_ranks_compute_what_one_device_does():
    calls = [(name, {}) for name in VARIANTS] + [("sincos", {"total_rows": 41}), ("own", {"lengths": [31] * 3})]
    results = run_distributed(over_ranks, 3, calls)
    for number, (name, kwargs) in enumerate(calls):
        model = make(feature_dim=7, **VARIANTS[name])
        lengths = kwargs.get("lengths")
        out = model(features=features(), coords=coordinates(name), lengths=lengths)
        loss = out.last_hidden_state.square().sum() + (0 if out.pooled is None else out.pooled.square().sum())
        ranks = [result[number] for result in results]
        rows = torch.cat([rank[0] for rank in ranks], 1)
        count = rows.shape[1] if lengths is None else lengths[0]
        torch.testing.assert_close(rows[:, :count], out.last_hidden_state[:, :count])
        for rank in ranks:
            torch.testing.assert_close(rank[1], out.pooled)
        if lengths is None:  # else the padding of ranks has finite, unspecified states
            loss.backward()
            expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            torch.testing.assert_close(ranks[0][2], expected)


def packed_inputs(name):
    """Rows of three sequences, one behind the other."""
    x, coords = features(), coordinates(name)
    parts = [x[item, :length] for item, length in enumerate(LENGTHS)]
    places = None if coords is None else torch.cat([coords[i, :length] for i, length in enumerate(LENGTHS)])
    return torch.cat(parts)[None], None if places is None else places[None]


def packed_over_ranks(names):
    results, (ranks, rank) = [], (dist.get_world_size(), dist.get_rank())
    for name in names:
        model = make(feature_dim=7, group=dist.group.WORLD, **VARIANTS[name])
        x, coords = packed_inputs(name)
        cls = int(model.config.cls_token)
        edges = [0, *itertools.accumulate(length + cls for length in LENGTHS)]
        start, stop = Shards.even(edges[-1], ranks).window(rank)
        rows = [row - edges.index(max(e for e in edges if e <= row)) * cls - cls for row in range(start, stop)]
        own = [n for row, n in zip(range(start, stop), rows, strict=True) if not (cls and row in edges)]
        out = model(features=x[:, own], coords=None if coords is None else coords[:, own], packed=LENGTHS)
        loss = out.last_hidden_state.square().sum()
        loss = loss if out.pooled is None else loss + out.pooled.square().sum() / ranks
        loss.backward()
        gradients = []
        for p in model.parameters():
            gradients.append(torch.zeros_like(p) if p.grad is None else p.grad)
            dist.all_reduce(gradients[-1])
        results.append((out.last_hidden_state.detach(), None if out.pooled is None else out.pooled.detach(), gradients))
    return results


@pytest.mark.parametrize("ranks", [1, 3])
def test_packed_sequences_are_what_each_is_alone(ranks):
    names = list(VARIANTS)
    results = run_distributed(packed_over_ranks, ranks, names)
    for number, name in enumerate(names):
        model = make(feature_dim=7, **VARIANTS[name])
        out = model(features=features(), coords=coordinates(name), lengths=LENGTHS)
        loss = out.last_hidden_state.square().sum() + (0 if out.pooled is None else out.pooled.square().sum())
        loss.backward()
        cls = int(model.config.cls_token)
        expected = torch.cat([out.last_hidden_state[i, : length + cls] for i, length in enumerate(LENGTHS)])
        torch.testing.assert_close(torch.cat([r[number][0] for r in results], 1)[0], expected)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        for result in results:
            torch.testing.assert_close(result[number][1], out.pooled)
            torch.testing.assert_close(result[number][2], gradients)


def test_packed_sequences_that_do_not_fit_are_refused():
    model, x = make(feature_dim=7, cls_token=True, pool="cls"), features(40, 1)
    for packed, message in (
        ([], "at least one sequence"),
        ([40, 0], "lengths must be at least 1"),
        ([30, 9], r"rows \[0, 41\) of 41, of which 39 are no cls rows, but 40 rows are given"),
    ):
        with pytest.raises(ShapeError, match=message):
            model(features=x, packed=packed)
    with pytest.raises(ShapeError, match="leave lengths and cu_seqlens out"):
        model(features=x, packed=[40], lengths=[40])
