import subprocess
import sys

import numpy as np
import pytest
import torch

from longnet_dist.comm.records import torch as records
from longnet_dist.comm.records.torch import RecordGroups, accumulate, pack, unpack
from longnet_dist.geometry.exchange_plan import group_by_place

triton = pytest.importorskip("triton")
# The interpreter of Triton 3.6 turns arrays of one element into numbers, which NumPy 1.25 and later warn of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture(params=["torch", "triton"])
def _path(request, monkeypatch):
    """Select the operations of torch, or the Triton kernels in Triton's interpreter."""
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    monkeypatch.setattr(records, "_on_gpu", lambda x: request.param == "triton")


def keys_and_values(batch, rows, heads, dim, dtype=torch.float32):
    """Return keys and values that are views into one fused projection, and 23 places."""
    generator = torch.Generator().manual_seed(rows)
    fused = torch.randn(batch, rows, 3, heads, dim, generator=generator).to(dtype)
    return fused[:, :, 1], fused[:, :, 2], torch.randperm(rows * heads, generator=generator)[:23]


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize(("batch", "rows", "heads", "dim"), [(1, 40, 1, 16), (2, 29, 3, 12), (3, 23, 1, 1)])
def test_unpacking_writes_what_packing_read(batch, rows, heads, dim):
    k, v, places = keys_and_values(batch, rows, heads, dim)
    packed = pack(k, v, places)
    assert packed.is_contiguous()
    for record, place in zip(packed, places.tolist(), strict=True):
        row, head = divmod(place, heads)
        assert torch.equal(record, torch.stack([k[:, row, head], v[:, row, head]], 1))
    others = [torch.full_like(x, torch.nan) for x in (k, v)]
    unpack(packed, *others, places.flip(0))
    assert torch.equal(pack(*others, places.flip(0)), packed)
    assert int(others[0].isnan().sum()) == k.numel() - packed.numel() // 2


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2])
def test_records_of_a_place_are_summed_before_they_are_added(dtype, batch):
    k, v, places = keys_and_values(batch, 31, 2, 12, dtype)
    places = places[torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))]  # up to 60 of 5 places
    packed = torch.randn(60, batch, 2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = [x.double() for x in (k, v)]
    for record, place in zip(packed, places.tolist(), strict=True):
        row, head = divmod(place, 2)
        for x, part in zip(expected, record.unbind(1), strict=True):
            x[:, row, head] += part
    accumulate(packed, k, v, RecordGroups(*map(torch.from_numpy, group_by_place(places.numpy()))))
    for actual, wanted in zip((k, v), expected, strict=True):
        torch.testing.assert_close(actual, wanted.to(dtype), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.usefixtures("_path")
def test_no_records_change_nothing():
    k, v, _ = keys_and_values(1, 5, 2, 4)
    none = torch.empty(0, dtype=torch.int64)
    before, packed = k.clone(), pack(k, v, none)
    assert packed.shape == (0, 1, 2, 4)
    unpack(packed, k, v, none)
    accumulate(packed, k, v, RecordGroups(*map(torch.from_numpy, group_by_place(np.empty(0, np.int64)))))
    assert torch.equal(k, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_gpu_gives_what_a_cpu_gives(dtype):
    k, v, places = keys_and_values(2, 301, 3, 64, dtype)
    gradients = torch.randn(60, 2, 2, 64, generator=torch.Generator().manual_seed(3)).to(
        dtype if k.dtype == torch.float64 else torch.float32
    )
    groups = group_by_place(places[torch.arange(60) % 7].numpy())
    packed, results = pack(k, v, places), []
    for device in ("cpu", "cuda"):
        key, value = (x.clone().to(device) for x in (k, v))
        on_device = pack(key, value, places.to(device))
        assert torch.equal(on_device.cpu(), packed)
        unpack(on_device, key, value, places.flip(0).to(device))
        accumulate(gradients.to(device), key, value, RecordGroups(*(torch.from_numpy(x).to(device) for x in groups)))
        results.append([key.cpu(), value.cpu()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longnet_dist.comm.records.triton import add_kernel, copy_kernel

constants = {"D": 64, "BLOCK_D": 64, "ROWS": 8}
sizes = {"num_places": "i32", "batch": "i32", "heads": "i32"}
strides = {"k_strides": ("i64",) * 3, "v_strides": ("i64",) * 3}
fixed = dict.fromkeys(constants, "constexpr")
places = {"packed": "*fp32", "k": "*bf16", "v": "*bf16", "places": "*i64"}
signature = {**places, "order": "*i64", "starts": "*i64", **strides, **sizes, **fixed}
sources = [ASTSource(add_kernel, {**signature, "CHUNK": "constexpr"}, {**constants, "CHUNK": 8})]
for pack in (False, True):
    signature = {**places, "packed": "*bf16", **strides, **sizes, **fixed, "PACK": "constexpr"}
    sources.append(ASTSource(copy_kernel, signature, {**constants, "PACK": pack}))
for source in sources:
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_the_kernels_compile_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answer = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-2000:]
