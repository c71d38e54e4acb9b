"""Run the kernels of ``longnet_dist/attention/kernels/hopper`` on a CPU, without Triton's compiler.

The Python functions behind ``@gluon.jit`` run as they are; only the names by which they call the hardware
(``language.STAND_INS``) are others. Numbers in registers are computed in the same dtypes. An error is what the
hardware leaves undefined: an address out of bounds, a read of shared memory that nobody wrote or waited for, a write to
what somebody may still read, a program that never ends. Layouts of registers are ignored, those of shared memory are
kept.
"""

from __future__ import annotations

import random
import types

import torch

from tests.gluon.language import RUNNING, STAND_INS
from tests.gluon.memory import Buffer, Descriptor, pointer_to
from tests.gluon.program import Program
from tests.gluon.values import wrapped


class _Translation:
    """Functions whose global names are stand-ins; ``changed`` has other stand-ins, by name."""

    def __init__(self, changed):
        self._changed, self._modules = changed, {}

    def of(self, jitted):
        """The Python function behind a jitted one."""
        plain = jitted.fn
        names = self._modules.setdefault(id(plain.__globals__), {"__builtins__": __builtins__})
        found = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
        names[plain.__name__] = found
        for name in _names(plain.__code__):
            if name not in names and (name in plain.__globals__ or name in STAND_INS):
                names[name] = self._global(name, plain.__globals__)
        return found

    def _global(self, name, module):
        if name in self._changed or name in STAND_INS:
            return self._changed.get(name, STAND_INS.get(name))
        found = module[name]
        if type(found).__name__ == "constexpr":
            return found.value
        if hasattr(found, "fn"):
            return self.of(found)
        if (getattr(found, "__module__", None) or "").startswith("triton"):
            raise NotImplementedError(f"the emulator has no stand-in for {name}")
        return found


def _names(code):
    """All names of a function and of the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


class Emulated:
    """Take the place of a jitted kernel in a launch.

    Args:
        kernel: what ``@gluon.jit`` made.
        changed: other stand-ins by name, for tests of the emulator.
        seed: of the order in which groups of warps run.
    """

    def __init__(self, kernel, changed=None, seed=0):
        self.arg_names = kernel.arg_names
        self._function, self._seed, self.programs = _Translation(changed or {}).of(kernel), seed, 0

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, **constants):
            given = dict(zip(self.arg_names, arguments, strict=False)) | {
                name: value for name, value in constants.items() if name in self.arg_names
            }
            buffers = {}
            given = {name: value if name in constants else _argument(value, buffers) for name, value in given.items()}
            order = list(range(grid[0]))
            random.Random(self._seed).shuffle(order)  # no program may need another one
            for number in order:
                RUNNING.program = Program(number, 32 * num_warps, self._seed)
                self._function(**given)
                self.programs += 1

        return launch


def _argument(value, buffers):
    if isinstance(value, torch.Tensor):
        return pointer_to(_buffer(value, buffers))
    if hasattr(value, "block_shape"):
        return Descriptor(value, _buffer(value.base, buffers))
    if isinstance(value, tuple):
        return tuple(_argument(x, buffers) for x in value)
    return None if value is None else wrapped(value)


def _buffer(tensor, buffers):
    key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
    if key not in buffers:
        buffers[key] = Buffer(tensor)
    return buffers[key]
