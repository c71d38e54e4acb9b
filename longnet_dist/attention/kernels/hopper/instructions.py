# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Instructions of Hopper that Gluon has no name for."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin


@builtin
def reduce_add(descriptor, position, source, _semantic=None):
    """Let the copy engine add a tile in shared memory to global memory."""
    coordinates = _semantic._convert_to_ir_values(position, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )


@builtin
def copies_read(_semantic=None):
    """Wait until the copy engine has read what this thread told it to."""
    _assembly("cp.async.bulk.wait_group.read 0;", [], _semantic)


@builtin
def arrive(barrier, threads, _semantic=None):
    """Arrive at a barrier of the hardware, for ``threads`` in all, without waiting."""
    _barrier("bar.arrive", barrier, threads, _semantic)


@builtin
def meet(barrier, threads, _semantic=None):
    """Wait at a barrier of the hardware for ``threads`` in all."""
    _barrier("bar.sync", barrier, threads, _semantic)


@builtin
def opaque_zero(_semantic=None):
    """0 that only the last compiler knows: what hangs on it is not computed before the loop, for want of registers."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1, _semantic=_semantic
    )


@builtin
def lane_bit(like, bit, _semantic=None):
    """A bit of the number of the thread, as int32 of the shape of ``like``; read anew, not kept in a register."""
    bit = gl._core._unwrap_if_constexpr(bit)
    text = f"{{ .reg .u32 lane; mov.u32 lane, %laneid; bfe.u32 $0, lane, {bit}, 1; }}"
    return gl.inline_asm_elementwise(text, "=r,r", [like], dtype=gl.int32, is_pure=False, pack=1, _semantic=_semantic)


@builtin
def uniform(value, _semantic=None):
    """``value``, which is the same in all threads, in a form that tells the last compiler so."""
    text = "shfl.sync.idx.b32 $0, $1, 0, 31, -1;"
    return gl.inline_asm_elementwise(text, "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1, _semantic=_semantic)


def _barrier(instruction, number, threads, semantic):
    number, threads = gl._core._unwrap_if_constexpr(number), gl._core._unwrap_if_constexpr(threads)
    if isinstance(number, int):
        _assembly(f"{instruction} {number}, {threads};", [], semantic)
    else:
        _assembly(f"{instruction} $1, {threads};", [number], semantic)


def _assembly(text, given, semantic):
    """An instruction without a result, which Gluon wants of every one: 0."""
    constraints = ",".join(["=r", *["r"] * len(given), "~{memory}"])
    text = "mov.u32 $0, 0; " + text
    gl.inline_asm_elementwise(text, constraints, given, dtype=gl.int32, is_pure=False, pack=1, _semantic=semantic)
