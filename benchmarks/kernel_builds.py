"""Compile every Triton kernel of the package for a GPU that need not be there.

    python benchmarks/kernel_builds.py CAPABILITY HEAD_DIM OUTPUT.json

A process of its own for each Triton, because only one can be imported: ``triton_matrix.py`` starts them. The launches
are those of the package. Only Triton's last step, which needs a GPU, is left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.machine_code import innermost_loops

ROWS = 2**19  # never touched; so many that a program of the Hopper forward takes several tiles of queries
HALF = torch.bfloat16
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class NoDevice:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        """Return what is compiled for."""
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return the default stream."""
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Return ``kind``: no launcher is compiled."""
        return kind


def compile_instead_of_launching(capability: int, found: list[dict[str, Any]]) -> None:
    """From now on a launch compiles its kernel and adds what became of it to ``found``."""
    driver.set_active(NoDevice(capability))
    launch = JITFunction.run
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if log.getvalue():  # else it was compiled before
            found.append(_what_became(self.__name__, kernel, log.getvalue()))

    JITFunction.run = compile_only


def _what_became(name: str, kernel: Any, log: str) -> dict[str, Any]:
    spills, registers = _SPILLS.search(log), re.search(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise ValueError(f"no report of the assembler on {name} in {log!r}")
    stack, stores, loads = map(int, spills.groups())
    return {
        "kernel": name,
        "registers": int(registers[1]),
        "shared_bytes": kernel.metadata.shared,
        "stack_bytes": stack,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "spills_in_inner_loops": sum(loop.local for loop in innermost_loops(_disassembled(kernel.asm["cubin"]))),
        "serialized": "serialized" in log,  # ptxas warns so where it has to wait for every matrix product
    }


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def attention(capability: int, dim: int) -> None:
    """Launch the kernels of attention: dense pieces, and on Hopper what changes its kernels most."""
    from longnet_dist.attention.kernels.contract import BackwardInputs, Call, Gradients
    from longnet_dist.attention.kernels.triton import launch
    from longnet_dist.attention.kernels.triton.kernel import TritonKernel
    from longnet_dist.attention.kernels.triton.launch import Geometry
    from longnet_dist.geometry.pattern import DilatedPattern
    from longnet_dist.geometry.window import compact_piece, dense_pieces, shared_segments

    of = Geometry.of
    Geometry.of = lambda x: of(x)._replace(device=torch.device("cuda"))  # type: ignore[method-assign]
    q, k, v, out, dout, dk, dv = (torch.empty(1, ROWS, 2, dim, dtype=HALF) for _ in range(7))
    lse, dq = torch.empty(1, 2, ROWS).transpose(1, 2), torch.empty(1, ROWS, 2, dim)
    pattern, kernel = DilatedPattern([4096], [2]), TritonKernel()
    for deterministic in (False, True):
        call = Call(dense_pieces(pattern, 0, ROWS, ROWS, True)[0], (0, 1), True, 0.1, deterministic, head_block=1)
        kernel.forward(call, q, k, v, out, lse)
        statistics = kernel.start_backward(dout, out, lse, dq, None, lse)
        statistics = kernel.start_backward(dout, out, lse, dq)
        kernel.backward(call, BackwardInputs(dout, q, k, v, statistics), Gradients(dq, dk, dv))
    if dim == 64 or capability == 90:  # a table of segments, and heads of a larger model
        pattern = DilatedPattern([4096], [2], shift=[1024])
        piece = replace(dense_pieces(pattern, 0, ROWS, ROWS, True)[0], overlap_rates=(2,))
        call = Call(piece, (1, 0), True, 0.1, head_block=1, heads_before=1)
        launch._device_table = lambda table, device: torch.empty(len(table), 3, dtype=torch.int64)  # type: ignore[assignment]
        if capability == 90:
            from longnet_dist.attention.kernels.hopper import tables

            tables._on_device = lambda integers, device: torch.from_numpy(integers)
        kernel.forward(call, q, k, v, out, lse)
        for deterministic in (False, True):  # where a table is for the portable kernels alone
            call = replace(call, deterministic=deterministic)
            kernel.backward(call, BackwardInputs(dout, q, k, v, statistics), Gradients(dq, dk, dv))
    if capability < 90:
        return
    # Keys of a segment that other ranks share, as the exchange leaves them, with gradients in float32; grouped heads;
    # pairs that other branches leave to this one. At head dim 64 causal, and the other mask in a call of its own; at
    # 128 all in one, for the sake of time.
    pattern, causal = DilatedPattern([8192], [2]), dim == 64
    (segment,) = shared_segments(pattern, 4096, 8192, 8192, causal)
    piece = replace(compact_piece(pattern, segment, 4096, 8192), overlap_rates=(2, 4))
    call = Call(piece, (0,), causal, 0.1, fresh=not causal, head_block=1)
    (key, value), (dkey, dvalue) = (torch.empty(2, 1, 4096, 1, dim, dtype=x) for x in (HALF, torch.float32))
    kernel.backward(call, BackwardInputs(dout, q, key, value, statistics), Gradients(dq, dkey, dvalue))
    kernel.forward(call, q, key, value, out, lse)
    if dim == 64:
        call = Call(
            dense_pieces(DilatedPattern([4096], [1]), 0, ROWS, ROWS, False)[0],
            (0, 0),
            False,
            0.1,
            fresh=True,
            head_block=1,
        )
        kernel.backward(call, BackwardInputs(dout, q, k, v, statistics), Gradients(dq, dk, dv))


def row_wise() -> None:
    """Launch the row-wise kernels in widths of models from 768 to 4,096."""
    from longnet_dist.attention.kernels.triton.decode import attend_to_slots, block_size, visible_blocks
    from longnet_dist.attention.kernels.triton.keep import rotate_and_keep
    from longnet_dist.attention.positions import RotaryTable
    from longnet_dist.ops.gated_norm import triton as gated_norm
    from longnet_dist.ops.gelu_norm.triton import gelu_norm, gelu_norm_gradients
    from longnet_dist.ops.join_gradients import triton as join_gradients
    from longnet_dist.ops.norm_gradients import triton as norm_gradients
    from longnet_dist.ops.normed_linear.triton import normed_linear

    for length in (3072, 12288):
        wide, inner = torch.empty(4, 2 * length, dtype=HALF), torch.empty(4, length, dtype=HALF)
        gated_norm.gated_norm(wide, None, None, 1e-5)
        gated_norm.gated_norm_gradients(inner, wide, 1e-5)
    for group in (1, 3, 4):
        cache, seen = torch.empty(2, 2, 4, 999, 64, dtype=HALF), torch.ones(2, 4, 999, dtype=torch.bool)
        q, blocks = torch.empty(2, 4, group, 64, dtype=HALF), visible_blocks(seen, block_size(group, 64))
        attend_to_slots(q, cache[0], cache[1], seen, ~seen[..., :1], blocks)
        table, row = torch.empty(2, 1, 32, 2), torch.empty(2, 1, 4, 64, dtype=HALF)
        slots = torch.zeros(3, 2, 4, dtype=torch.int64)
        rotate_and_keep(q.view(2, 1, -1, 64), row, row, cache, slots, (table, table))
    for rows in (1, 64):
        norm, layer = torch.nn.LayerNorm(768, dtype=HALF), torch.nn.Linear(768, 768, dtype=HALF)
        normed_linear(torch.empty(rows, 768, dtype=HALF), norm, [layer] * 3)
    for length in (3072, 8192):
        inner = torch.empty(4, length, dtype=HALF)
        gelu_norm(inner, None, None, 1e-5)
        gelu_norm_gradients(inner, inner, 1e-5)
    join_gradients.processors = lambda device: 132  # type: ignore[attr-defined]
    for heads, kv_heads, width in ((12, 12, 64), (12, 4, 64), (16, 16, 96), (32, 32, 64), (32, 32, 80)):
        dq, table = torch.empty(64, heads, width), torch.empty(64, 1, width // 2, 2)
        dk = torch.empty(64, kv_heads, width, dtype=HALF)
        join_gradients.join_gradients(dq, dk, dk, RotaryTable(table, table), HALF)
    norm_gradients.processors = lambda device: 132  # type: ignore[attr-defined]
    for length in (768, 1536, 2048, 2560, 4096):
        x, y, dx = torch.empty(3, 4000, length, dtype=HALF)
        norm_gradients.norm_gradients(y, x, x, 1e-5, True, True, dx, None)
        norm_gradients.norm_gradients(y, x, x, 1e-5, False, True, dx, None)
        norm_gradients.norm_gradients(y, x, None, 1e-5, False, True, dx, torch.empty(4000, length // 64))


def records(dim: int) -> None:
    """Launch the kernels of the exchange: records to and fro, and the sums of gradients in float32."""
    from longnet_dist.comm.records import torch as records

    on_gpu, records._on_gpu = records._on_gpu, lambda x: True
    k, v = torch.empty(2, 1, 4096, 3, dim, dtype=HALF)
    places = torch.arange(1000)
    records.unpack(records.pack(k, v, places), k, v, places)
    groups = records.RecordGroups(places, places, torch.arange(1001))
    records.accumulate(torch.empty(1000, 1, 2, dim), k, v, groups)
    records._on_gpu = on_gpu


def main() -> None:
    """Compile for the capability and head dim that the command line names, and write what became of each kernel."""
    capability, dim, output = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    if os.environ.get("TRITON_INTERPRET") or not os.environ.get("TRITON_DUMP_PTXAS_LOG"):
        raise SystemExit("set TRITON_DUMP_PTXAS_LOG=1, and do not set TRITON_INTERPRET; triton_matrix.py does so")
    found: list[dict[str, Any]] = []
    compile_instead_of_launching(capability, found)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("attention", lambda: attention(capability, dim)),
        ("records", lambda: records(dim)),
    ]
    if dim == 64:  # they know no head dim, or take several at once
        parts.append(("row-wise", row_wise))
    for part, launch_all in parts:
        before = len(found)
        launch_all()
        for build in found[before:]:
            build["part"] = part
    output.write_text(json.dumps({"triton": triton.__version__, "capability": capability, "dim": dim, "builds": found}))


if __name__ == "__main__":
    main()
