"""The kernels for Hopper in place of a backend: what they take is emulated, the rest is interpreted in float32."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import torch

from longnet_dist.attention import functional
from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.hopper import launches
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.attention.kernels.triton import kernel as portable
from longnet_dist.attention.kernels.triton.kernel import TritonKernel
from longnet_dist.attention.kernels.triton.launch import BACKWARD_SIDES, FORWARD_SIDES, Geometry, Problem
from tests.gluon.emulator import Emulated


class EmulatedKernel(TritonKernel):
    """As ``TritonKernel`` on Hopper, launch by launch; the portable kernels get float32.

    Attributes:
        launched: how many launches of each kernel ran in the emulator, and elsewhere.
    """

    def __init__(self, changed=None, seed=0, turns=None):
        self.forward_kernel = Emulated(launches.hopper_forward_kernel, changed, seed)
        self.backward_kernel = Emulated(launches.hopper_backward_kernel, changed, seed)
        self.launched = {"forward": 0, "backward": 0, "portable": 0}
        self._turns = turns

    def _hopper(self):
        stack = {"hopper_forward_kernel": self.forward_kernel, "hopper_backward_kernel": self.backward_kernel}
        if self._turns:  # as if there were many programs
            stack["ENOUGH"] = 0
        return mock.patch.multiple(launches, **stack)

    def forward(self, call, q, k, v, out, lse):
        tensors = (q, k, v, out, out, lse)
        split = launches.takes_tables(call.deterministic)
        for part in Problem(call, Geometry.of(q), Geometry.of(k)).parts(split):
            buffers = part.seen(tuple(map(Geometry.of, (q, k, v, out, lse))), FORWARD_SIDES[:5])
            if launches.takes_forward(part, buffers):
                self.launched["forward"] += 1
                with self._hopper():
                    launches.forward_launch(part, buffers)(*tensors)
            else:
                self.launched["portable"] += 1
                with _float32((q, k, v, out, lse), changed=(3, 4)) as wide:
                    launch = portable._portable_forward(*_of_wide(part, wide, FORWARD_SIDES[:5], 0))
                    launch(*wide[:4], *wide[3:])

    def start_backward(self, dout, out, lse, dq, scratch=None, delta=None, dlse=None):
        delta = (dout.double() * out.double()).sum(-1).float() if delta is None else delta
        dq.zero_()
        return (torch.stack([lse * 1.4426950408889634, delta], -1).transpose(1, 2).contiguous().transpose(1, 2),)

    def backward(self, call, given, sums):
        tensors = (given.dout, given.q, given.k, given.v, *given.statistics, *sums)
        q, k = Geometry.of(given.q), Geometry.of(given.k)
        for part in Problem(call, q, k).parts(launches.takes_tables(call.deterministic)):
            buffers = part.seen(tuple(map(Geometry.of, tensors)), BACKWARD_SIDES)
            if launches.takes_backward(part, buffers):
                self.launched["backward"] += 1
                with self._hopper():
                    launches.backward_launch(part, buffers)(*tensors)
            else:
                self._portable(portable._key_gradients, part, tensors, (5, 6, 7))
            if call.deterministic:
                self._portable(portable._query_gradient, part, tensors, (5,))

    def _portable(self, launch_of, part, tensors, changed):
        self.launched["portable"] += 1
        with _float32(tensors, changed) as wide:
            problem, *seen = _of_wide(part, wide, BACKWARD_SIDES, 1)
            launch_of(problem, tuple(seen))(*wide)


def _of_wide(part, wide, sides, query):
    """The problem of a part, and its buffers, on tensors of other dtypes and strides, ``q`` and ``k`` among them."""
    seen = part.seen(tuple(map(Geometry.of, wide)), sides)
    return Problem(part.call, seen[query], seen[query + 1], part.first_row), *seen


@contextmanager
def _float32(tensors, changed):
    """The tensors in float32; those that changed are written back."""
    wide = [x.float().contiguous() for x in tensors]
    yield wide
    for place in changed:
        tensors[place].copy_(wide[place])


def attended(q, k, v, dout, pattern, kernel, **options):
    """Output, lse and gradients of ``kernel``."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with (
        mock.patch.object(functional, "choose_kernel", return_value=kernel),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        out, lse = dilated_attention(*leaves, pattern, return_lse=True, **options)
        return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]


def expected(q, k, v, dout, pattern, causal=True, edges=None):
    """The same of the oracle in float64, document by document."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = torch.zeros_like(leaves[0]), leaves[0].new_full(q.shape[:3], -torch.inf)
    edges = [0, q.shape[1]] if edges is None else edges
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        out[:, part], lse[:, part] = oracle(*(x[:, part] for x in leaves), pattern, causal=causal)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.double())]


def inputs(rows, heads, kv_heads, dim, batch=1, dtype=torch.bfloat16, seed=0):
    """Random ``q, k, v, dout``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, rows, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
