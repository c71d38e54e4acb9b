import importlib
import os
import subprocess
import sys
import tempfile

import pytest
import torch

from benchmarks.runs import import_paths
from longnet_dist.attention.functional import AttentionSpec
from longnet_dist.caches import clear_caches
from longnet_dist.geometry.pattern import DilatedPattern

pytest.importorskip("triton")
from longnet_dist.attention.kernels.triton.launch import Geometry, Problem


@pytest.mark.parametrize(("rows", "causal"), [(1000, True), (1000, False), (1024, True), (997, False)])
def test_the_copy_engine_sees_every_part_of_a_long_sequence(rows, causal):
    """Rates that do not divide the rows: the last segment is seen in buffers that begin some rows later."""
    q = torch.empty(1, rows, 12, 4)
    spec = AttentionSpec.of(
        q, q, q, DilatedPattern([16, 64, 128], [1, 6, 12]), causal, None, None, "auto", False, True, None, None
    )
    seen, first_rows = 0, set()
    for call in spec.dense_calls(12):
        for part in Problem(call, Geometry.of(q), Geometry.of(q)).parts():
            assert part.fits
            assert part.q.shape[1] == part.k.shape[1] == rows - part.first_row
            assert part.piece.window_start == part.first_row
            seen += (part.piece.query_stop - part.piece.query_start) * (12 // part.piece.dilation_rate)
            first_rows.add(part.first_row)
    assert first_rows == {0} | {rows % rate for rate in (6, 12)}
    assert seen == rows * (12 + 2 + 1)


TOGETHER = """
import torch, triton
from benchmarks import kernel_builds
from longnet_dist import DilatedPattern
from longnet_dist.attention.functional import AttentionSpec
from longnet_dist.attention.kernels.triton import kernel as module, launch
from longnet_dist.attention.kernels.triton.launch import Geometry
from longnet_dist.attention.kernels.triton.together import compile_together
from longnet_dist.geometry.window import Shards

ROWS, compiled, empty = 1024, [], torch.empty
kernel_builds.compile_instead_of_launching(90, [])
triton.knobs.compilation.listener = lambda **given: compiled.append(given["src"].name)
spec = AttentionSpec(
    DilatedPattern([128, 512, 900], [1, 2, 3]), Shards.even(ROWS, 1), 0, True, 0.125, module.TritonKernel(), True, None,
    False, True, None,
)
calls, gpu, half = spec.dense_calls(2), torch.device("cuda", 0), torch.bfloat16
q = Geometry.new((1, ROWS, 2, 32), half, gpu)
launches = module._launches(calls, q, q, q, True)
torch.empty = lambda *shape, device=None, **options: empty(*shape, **options)
compile_together(launches)
torch.empty = empty
first, compiled[:] = compiled[:], []
launch.TensorDescriptor.__post_init__ = lambda self: None
whole = empty(1, ROWS, 2, 32, dtype=half)
lse, statistics = empty(1, 2, ROWS).transpose(1, 2), empty(1, 2, ROWS, 2).transpose(1, 2)
tensors = {6: [whole] * 5 + [lse], 8: [whole] * 4 + [statistics, whole.float(), whole, whole]}
for one, buffers in launches:
    one(*tensors[len(buffers)])
print(len(launches), len(first), len(compiled))
"""


def test_launches_find_what_was_compiled_side_by_side():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        answer = subprocess.run(
            [sys.executable, "-c", TOGETHER],
            env=environment | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": import_paths()},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    launches, first, later = map(int, answer.stdout.split()[-3:])
    assert launches >= first >= 4
    assert later == 0


def test_what_fails_side_by_side_is_compiled_at_its_launch(monkeypatch, caplog):
    together = importlib.import_module("longnet_dist.attention.kernels.triton.together")

    class Failing:
        def __init__(self, kind):
            self.kind, self.kernel = kind, kind

        def compile(self, buffers, options):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(together, "JITFunction", int)
    monkeypatch.setattr(together, "usable_cores", lambda: 2)
    together.compile_together([(Failing(number), ()) for number in (1, 2)])
    assert "compiled one by one, which takes longer: RuntimeError: no compiler" in caplog.text


def test_a_form_is_compiled_once_and_again_when_caches_are_emptied(monkeypatch):
    kernel, compiled = importlib.import_module("longnet_dist.attention.kernels.triton.kernel"), []
    monkeypatch.setattr(kernel, "_launches", lambda calls, *geometry: calls)
    monkeypatch.setattr(kernel, "compile_together", compiled.append)

    class OnGpu:
        device = torch.device("cuda")

        def __init__(self, tensor):
            self._tensor = tensor

        def __getattr__(self, name):
            return getattr(self._tensor, name)

    pattern = DilatedPattern([16, 64], [1, 4])
    for rows, times in ((64, 1), (128, 1), (256, 1)):
        q = torch.empty(1, rows, 4, 16)
        spec = AttentionSpec.of(q, q, q, pattern, True, None, None, "auto", False, True, None, None)
        kernel.TritonKernel().compile(spec.dense_calls(4), *3 * [OnGpu(q)], backward=True)
        assert len(compiled) == times
    clear_caches()
    kernel.TritonKernel().compile(spec.dense_calls(4), *3 * [OnGpu(q)], backward=True)
    assert len(compiled) == 2
