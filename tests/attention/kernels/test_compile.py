"""The kernels compile for Ampere and Hopper on a machine without a GPU, and do not spill where that matters.

This tests the installed Triton; ``python benchmarks/triton_matrix.py --triton FOLDER ...`` tests others.
"""

from collections import Counter

import pytest

pytest.importorskip("triton")

from benchmarks.triton_matrix import build, faults

ROW_WISE = {"_gated_norm_kernel": 2, "_gated_norm_gradients_kernel": 2, "_parts_kernel": 1,
            "_matmul_parts_kernel": 2, "_merge_kernel": 3, "_rotate_and_keep_kernel": 3, "_normed_linear_kernel": 2,
            "_gelu_norm_kernel": 2, "_gelu_norm_gradients_kernel": 2, "_join_gradients_kernel": 5,
            "_norm_gradients_kernel": 15}  # fmt: skip
HOPPER = {
    (80, 64): {},
    (90, 64): {"hopper_backward_kernel": 5},
    (90, 128): {"hopper_backward_kernel": 4, "hopper_forward_kernel": 3},
}


@pytest.mark.parametrize(("capability", "dim"), HOPPER)
def test_kernels_compile_without_a_gpu(capability, dim):
    case = build(None, capability, dim)
    assert faults(case) == []
    compiled = Counter(one["kernel"] for one in case["builds"])
    expected = HOPPER[capability, dim] | (ROW_WISE if dim == 64 else {}) | {"copy_kernel": 2, "add_kernel": 1}
    assert {name: compiled[name] for name in expected} == expected
    assert compiled["key_gradient_kernel"] >= 1
    assert compiled["query_gradient_kernel"] == 2
    assert compiled["statistics_kernel"] == 2


def test_faults_are_named():
    good = {"kernel": "hopper_backward_kernel", "part": "attention", "spill_store_bytes": 0,
            "spills_in_inner_loops": 0, "serialized": False, "shared_bytes": 1000}  # fmt: skip
    case = {"triton": "3.9.0", "capability": 90, "dim": 64, "builds": [good]}
    assert faults(case) == []
    for key, value, words in (
        ("spill_store_bytes", 100, "spills 100 bytes"),
        ("spills_in_inner_loops", 1, "spills in its inner loops"),
        ("serialized", True, "waits for every matrix product"),
        ("shared_bytes", 10**6, "bytes of shared memory"),
    ):
        (fault,) = faults({**case, "builds": [{**good, key: value}]})
        assert words in fault
    assert faults({**case, "dim": 128}) == ["hopper_forward_kernel was not compiled"]
    assert faults({**case, "error": "CompilationError: at 1:1"}) == ["CompilationError: at 1:1"]
