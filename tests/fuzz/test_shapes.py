"""Random patterns and tensors: an output like the queries, or an error of ours that says what does not fit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_dist import DilatedPattern, dilated_attention
from longnet_dist.errors import LongNetError
from tests.fuzz.cases import LENGTHS, PROFILE

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4), st.integers(1, 16))
OTHER_SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
OTHER_DTYPES = st.sampled_from([torch.float16, torch.int64, torch.bool, torch.complex64])
BACKENDS = st.sampled_from(["auto", "reference", "sdpa"])
OTHER_BACKENDS = st.sampled_from(["triton", "flash", "fast", ""])


@PROFILE
@given(data=st.data())
def test_patterns_and_tensors(outcomes, data):
    """Two of the arguments at most are drawn from what need not fit."""
    names = st.sampled_from(["q", "k", "v", "dtype", "dtype of v", "lengths", "rates", "offsets", "backend"])
    wrong = data.draw(st.lists(names, max_size=2, unique=True), "what need not fit")

    def draw(name, fitting, other):
        return data.draw(other if name in wrong else fitting, name)

    shape = draw("q", SHAPES, OTHER_SHAPES)
    dtype = draw("dtype", DTYPES, OTHER_DTYPES)
    k, v = (draw(name, st.just(shape), OTHER_SHAPES) for name in ("k", "v"))
    v_dtype = draw("dtype of v", st.just(dtype), DTYPES)
    lengths = draw("lengths", st.lists(st.integers(1, 40), min_size=1, max_size=3), LENGTHS)
    rates = draw("rates", st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths)), LENGTHS)
    offsets = draw("offsets", st.sampled_from(["modulo", "blocked"]), st.text(max_size=5))
    options = {
        "causal": data.draw(st.booleans(), "causal"),
        "scale": data.draw(st.none() | st.floats(-2, 2), "scale"),
        "backend": draw("backend", BACKENDS, OTHER_BACKENDS),
        "deterministic": data.draw(st.booleans(), "deterministic"),
        "return_lse": True,
    }
    tensors = torch.ones(shape, dtype=dtype), torch.ones(k, dtype=dtype), torch.ones(v, dtype=v_dtype)
    try:
        out, lse = dilated_attention(*tensors, DilatedPattern(lengths, rates, offsets), **options)
    except LongNetError:
        assert wrong
        outcomes[2] += 1
    else:
        assert (out.shape, out.dtype, lse.shape) == (shape, dtype, shape[:3])
        outcomes[0] += 1
