"""How many cases there are, and what they are drawn from.

pytest tests/fuzz                    about 150 cases
FUZZ_CASES=500 pytest tests/fuzz -s  as many in all, and their number
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES", "150"))
KINDS = 6  # of tests, which share the cases evenly
PROFILE = settings(
    max_examples=CASES // KINDS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 70),
    st.sampled_from(
        [0, 1, 2, 3, 16, 64, 1e-30, 1e30, 1e400, -0.0, float("nan"), "auto", "fp32", "bf16", "never", ".", "/"]
    ),
    st.floats(),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LENGTHS = st.lists(st.one_of(st.integers(1, 80), st.sampled_from([0, -1, 2**31, 2**63, 2**64])), max_size=5)
