import random

import pytest
import torch

from longnet_dist import DilatedPattern, attention_weights
from longnet_dist.errors import LongNetError, ShapeError
from tests.attention.test_documents import alone, leaves, packed_case
from tests.attention.test_sink import with_sink


@pytest.mark.parametrize("seed", range(60))
def test_weights_times_values_are_the_output(seed):
    """With documents, sinks and shifts; the gradient of the queries as well."""
    case, sink, _, edges = packed_case(seed)
    draw, total = random.Random(seed), case.q.shape[1]
    rows = [draw.randrange(total) for _ in range(draw.randint(1, 2 * total))]
    inputs = leaves(case, sink)
    expected, lse = alone(inputs, edges, case.pattern, case.causal)
    own = None if sink is None else inputs[3] if sink.dim() == 1 else inputs[3][..., rows, :]
    options = {"causal": case.causal, "sink": own, "cu_seqlens": edges}
    weights = attention_weights(inputs[0][:, rows], inputs[1], case.pattern, rows, **options)
    assert weights.shape == (case.q.shape[0], len(rows), case.q.shape[2], total)
    values = inputs[2].repeat_interleave(case.q.shape[2] // case.k.shape[2], 2)
    out = torch.einsum("bmhn,bnhd->bmhd", weights, values)
    torch.testing.assert_close(out, expected[:, rows], rtol=0, atol=1e-9)
    sums = weights.sum(-1)
    missing = 0 if own is None else (own.expand(sums.shape) - lse[:, rows]).exp().nan_to_num(posinf=1.0)
    covered = (weights > 0).any(-1)
    torch.testing.assert_close((sums + missing) * covered, covered.double(), rtol=0, atol=1e-9)
    actual, wanted = (
        torch.autograd.grad((x * x).sum(), inputs[:3], retain_graph=True) for x in (out, expected[:, rows])
    )
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_half_precision_is_summed_in_float32(seed):
    case, sink, _ = with_sink(seed)
    rows = list(range(0, case.q.shape[1], 2))
    own = sink if sink.dim() == 1 else sink[..., rows, :]
    half = attention_weights(case.q[:, rows].bfloat16(), case.k.bfloat16(), case.pattern, rows, sink=own)
    wide = attention_weights(
        case.q[:, rows].bfloat16().double(), case.k.bfloat16().double(), case.pattern, rows, sink=own
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), wide, rtol=1e-4, atol=1e-5)


def test_a_key_of_two_branches_counts_twice():
    q = k = torch.zeros(1, 8, 1, 4)
    weights = attention_weights(q[:, [3]], k, DilatedPattern([4, 8], [1, 3]), [3], causal=False)
    assert weights[0, 0, 0].tolist() == pytest.approx([2 / 7, 1 / 7, 1 / 7, 2 / 7, 0, 0, 1 / 7, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": None}, "must be a DilatedPattern"),
        ({"k": [0.0]}, "k must be a tensor"),
        ({"sink": [0.0, 0.0]}, "sink must be a tensor"),
        ({"causal": None}, "causal must be True or False"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_arguments_of_another_type_are_refused(change, message):
    x = torch.zeros(1, 9, 2, 4)
    with pytest.raises(LongNetError, match=message):
        attention_weights(**{"q_rows": x[:, :1], "k": x, "pattern": DilatedPattern([4], [1]), "rows": [3]} | change)


@pytest.mark.parametrize("rows", [[9], [-1], [0, 1], [0.5], [True], [], 0.5, torch.tensor(True)], ids=str)
def test_wrong_rows_are_refused(rows):
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 9, 2, 4)
    with pytest.raises(ShapeError, match="rows must be as many integers"):
        attention_weights(q, k, DilatedPattern([4], [1]), rows)
    with pytest.raises(ShapeError, match=r"is \(3,\)"):
        attention_weights(q, k, DilatedPattern([4], [1]), [0], sink=torch.zeros(3))
