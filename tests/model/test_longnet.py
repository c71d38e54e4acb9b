import pytest
import torch
from torch.nn import functional as F

from longnet_dist.config.model import named_model
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.model.longnet import LongNet

SMALL = {"dim": 32, "heads": 4, "vocab_size": 20, "segment_lengths": [8, 32], "dilation_rates": [1, 2]}


def model(seed=0, **fields):
    torch.manual_seed(seed)
    return LongNet(named_model("tiny", **(SMALL | fields))).double()


def batch(rows=45, vocab=20):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab, (2, rows + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


VARIANTS = [
    {},
    {"positions": "rope", "qk_norm": True, "kv_heads": 2, "tie_embeddings": True, "loss_chunk": 7, "sinks": True},
    {"positions": "none", "ffn_dim": 48},
    {"causal": False, "tie_embeddings": True},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_loss_is_the_mean_over_labelled_rows_and_every_parameter_learns(fields):
    network, (tokens, labels) = model(**fields), batch()
    labels = labels.clone()
    labels[:, ::3] = -100
    logits = network(tokens).logits
    assert logits.shape == (2, 45, 20)
    out = network(tokens, labels)
    assert out.logits is None
    assert out.num_labels == (labels != -100).sum()
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(out.loss_sum, out.loss * out.num_labels)
    out.loss.backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    # Without positions a key's bias adds one number to all scores of a query, which the softmax forgets.
    unused = [f"blocks.{i}.self_attn.k_proj.bias" for i in range(2)] if network.positions is None else []
    assert silent == unused


def test_a_causal_model_sees_no_later_row_and_an_encoder_does():
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 20
    for causal in (True, False):
        network = model(causal=causal)
        difference = (network(tokens).logits - network(changed).logits).abs().amax((0, 2))
        assert (difference[:30].max() == 0) == causal
        assert difference[30] > 0


def test_encoder_takes_the_mask_id_and_never_predicts_it():
    network, (tokens, labels) = model(causal=False), batch()
    masked = tokens.clone()
    masked[:, 5] = network.config.mask_id
    assert network(masked).logits.shape[-1] == 20
    network(masked, labels).loss.backward()
    assert network.embedding.weight.grad[20].any()


def test_only_the_order_of_rows_matters_with_positions():
    tokens = torch.full((1, 8), 3)
    for positions in ("xpos", "rope"):
        logits = model(positions=positions)(torch.tensor([[1, 2, 3, 4]])).logits[:, -1]
        swapped = model(positions=positions)(torch.tensor([[2, 1, 3, 4]])).logits[:, -1]
        assert (logits - swapped).abs().max() > 1e-6
    logits = model(positions="none")(tokens).logits
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))


def test_seed_alone_decides_the_weights():
    first, again, other = (model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    assert first["embedding.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert first["head.weight"].std().item() == pytest.approx(32**-0.5, rel=0.1)


def test_tied_weights_are_one_parameter():
    network = model(tie_embeddings=True)
    assert network.head.weight is network.embedding.weight
    assert sum(p.numel() for p in model().parameters()) - sum(p.numel() for p in network.parameters()) == 20 * 32


def test_bf16_model_trains_with_a_float32_loss():
    network, (tokens, labels) = model().bfloat16(), batch()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        out = network(tokens, labels)
        assert out.loss_sum.dtype == torch.float32
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_batch_without_labels_has_loss_zero():
    tokens, labels = batch()
    out = model()(tokens, torch.full_like(labels, -100))
    assert (out.loss.item(), out.num_labels.item()) == (0, 0)


def test_what_does_not_fit_is_refused():
    network, (tokens, labels) = model(), batch()
    with pytest.raises(ShapeError, match=r"\(2, 45\) and \(2, 44\)"):
        network(tokens, labels[:, 1:])
    with pytest.raises(ShapeError, match=r"\(45,\) and none"):
        network(tokens[0])
    with pytest.raises(ShapeError, match="start is 45"):
        network(tokens, labels, start=45)
    with pytest.raises(ConfigError, match="xpos_base=2 or more, or rope"):
        model(xpos_base=1, segment_lengths=[400], dilation_rates=[1]).float()(tokens.repeat(1, 3))


def test_few_and_many_ids_get_the_same_rows():
    embedding = model().embedding
    ids = torch.arange(20).repeat(3)
    many, few = embedding(ids), torch.cat([embedding(part) for part in ids.split(7)])
    assert torch.equal(many, few)
    gradients = [torch.autograd.grad(rows.square().sum(), embedding.weight)[0] for rows in (many, few)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(many, embedding.weight[ids] * 32**0.5)


def test_a_name_is_no_configuration():
    with pytest.raises(ConfigError, match=r"use LongNet\(named_model\('tiny'\)\)"):
        LongNet("tiny")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": torch.zeros(1, 4)}, "tokens must be a tensor of int64, but are torch.float32; use"),
        ({"tokens": [[0]]}, "tokens must be a tensor of int64, but are list; use"),
        ({"labels": torch.zeros(1, 4)}, "labels must be a tensor of int64, but are torch.float32; use"),
    ],
    ids=str,
)
def test_tokens_of_another_type_are_refused(given, message):
    model = LongNet(named_model("tiny"))
    with pytest.raises(ShapeError, match=message):
        model(**{"tokens": torch.zeros(1, 4, dtype=torch.int64)} | given)
