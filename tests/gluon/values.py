"""Values of an emulated kernel: numbers and blocks with the rules of Triton, where Python's or torch's differ."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import torch


class EmulationError(Exception):
    """The kernel did what the hardware leaves undefined, or what never ends."""


@dataclass(frozen=True)
class DType:
    """An element type; ``rank`` orders types that are mixed: the higher one wins."""

    name: str
    torch: torch.dtype
    rank: int

    @property
    def floating(self):
        return self.torch.is_floating_point

    @property
    def primitive_bitwidth(self):
        return self.torch.itemsize * 8


int1 = DType("int1", torch.bool, 0)
int32 = DType("int32", torch.int32, 2)
int64 = DType("int64", torch.int64, 3)
float16 = DType("float16", torch.float16, 10)
bfloat16 = DType("bfloat16", torch.bfloat16, 11)
float32 = DType("float32", torch.float32, 12)
DTYPES = {dtype.torch: dtype for dtype in (int1, int32, int64, float16, bfloat16, float32)}


@dataclass(frozen=True)
class BlockType:
    """What ``value.type`` and ``descriptor.block_type`` tell."""

    shape: tuple
    dtype: DType
    layout: object = None

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.primitive_bitwidth // 8


def wrapped(number):
    """A number of Python as the scalar that a kernel gets."""
    if isinstance(number, Value | Pointer):
        return number
    if isinstance(number, bool):
        return Value(number, int1)
    if isinstance(number, int):
        return Value(number, int32 if -(2**31) <= number < 2**31 else int64)
    return Value(float(number), float32)


def _whole(x, dtype):
    """``x`` as numbers in which nothing overflows, and checked that the result fits."""
    if dtype is int32:
        least, most = (x, x) if not isinstance(x, torch.Tensor) else (int(x.min()), int(x.max()))
        if not -(2**31) <= least <= most < 2**31:
            raise EmulationError(f"an int32 overflows: {least} … {most}")
    return x


def _truncated_quotient(x, y):
    """Division of integers as in C, towards 0."""
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
        return torch.div(torch.as_tensor(x), torch.as_tensor(y), rounding_mode="trunc")
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def _remainder(x, y):
    return x - _truncated_quotient(x, y) * y


def _minimum(x, y):
    return torch.minimum(*torch.broadcast_tensors(*_tensors(x, y))) if _any_block(x, y) else min(x, y)


def _maximum(x, y):
    return torch.maximum(*torch.broadcast_tensors(*_tensors(x, y))) if _any_block(x, y) else max(x, y)


def _any_block(*xs):
    return any(isinstance(x, torch.Tensor) for x in xs)


def _tensors(x, y):
    """Both as tensors of the dtype of the one that is a block."""
    dtype = x.dtype if isinstance(x, torch.Tensor) else y.dtype
    return [torch.as_tensor(z, dtype=dtype) for z in (x, y)]


COMPARISONS = (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)
INTEGERS_ONLY = (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift)


def _common(x, y):
    """The dtype of an operation on two values; a number of Python takes the other's."""
    if not isinstance(x, Value):
        return y.dtype if y.dtype.floating or not isinstance(x, float) else float32
    if not isinstance(y, Value):
        return x.dtype if x.dtype.floating or not isinstance(y, float) else float32
    return max(x.dtype, y.dtype, key=lambda dtype: dtype.rank)


def binary(operation, x, y):
    """``operation`` of two values or numbers, of which one is a :class:`Value`."""
    for z in (x, y):
        if isinstance(z, Pending):
            return z + 1  # raises
        if not isinstance(z, Value | int | float):
            raise TypeError(f"no operand of a value: {type(z).__name__}")
    common = _common(x, y)
    first, second = (z.data if isinstance(z, Value) else z for z in (x, y))
    if _any_block(first, second):
        shapes = [z.shape for z in (first, second) if isinstance(z, torch.Tensor)]
        if len({len(shape) for shape in shapes}) > 1:
            raise EmulationError(f"blocks of shapes {[tuple(shape) for shape in shapes]} do not meet")
    if not common.floating:
        if operation is operator.truediv:
            common, first, second = float32, first * 1.0, second * 1.0
        if isinstance(first, torch.Tensor) and first.dtype != torch.bool:
            first = first.long()
        if isinstance(second, torch.Tensor) and second.dtype != torch.bool:
            second = second.long()
    else:
        if operation in INTEGERS_ONLY:
            raise TypeError(f"{operation.__name__} of numbers that are not integers")
        first, second = (z.to(common.torch) if isinstance(z, torch.Tensor) else z for z in (first, second))
    result = operation(first, second)
    if operation in COMPARISONS:
        return Value(result, int1)
    if common is int1 and operation not in INTEGERS_ONLY:
        common = int32
    return Value(_whole(result, common) if not common.floating else result, common)


class Value:
    """A scalar (a number of Python) or a block (a tensor), immutable."""

    __slots__ = ("data", "dtype")

    def __init__(self, data, dtype):
        if isinstance(data, torch.Tensor):
            data = data.item() if data.ndim == 0 else data.to(dtype.torch)
        self.data, self.dtype = data, dtype

    @property
    def shape(self):
        return tuple(self.data.shape) if isinstance(self.data, torch.Tensor) else ()

    @property
    def type(self):
        return BlockType(self.shape, self.dtype)

    def __bool__(self):
        if self.shape:
            raise TypeError("a block decides nothing")
        return bool(self.data)

    def __index__(self):
        if self.shape or self.dtype.floating:
            raise TypeError("no integer")
        return int(self.data)

    def to(self, dtype):
        data = self.data
        if not isinstance(data, torch.Tensor):
            data = torch.tensor(data, dtype=self.dtype.torch if not self.dtype.floating else torch.float64)
            if not dtype.floating:
                _whole(int(data), dtype)
            return Value(data.to(dtype.torch) if dtype is not float32 else data, dtype)
        if not dtype.floating and not self.dtype.floating:
            _whole(data, dtype)
        return Value(data.to(dtype.torch), dtype)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if any(x is not None and x != slice(None) for x in index):
            raise TypeError("a block takes None and : as its index")
        if sum(x is not None for x in index) != len(self.shape):
            raise EmulationError(f"an index of {len(index)} places for a block of shape {self.shape}")
        return Value(self.data[index], self.dtype)

    def reshape(self, *shape):
        if math.prod(shape) != math.prod(self.shape):
            raise EmulationError(f"a block of shape {self.shape} has no shape {shape}")
        return Value(self.data.reshape(shape), self.dtype)

    def permute(self, *order):
        return Value(self.data.permute(*order), self.dtype)

    def split(self):
        left, right = self.data.unbind(-1)
        return Value(left, self.dtype), Value(right, self.dtype)

    def __neg__(self):
        return 0 - self


class Pointer:
    """Addresses in a buffer: a scalar or a block of offsets, counted in elements."""

    __slots__ = ("buffer", "offsets")

    def __init__(self, buffer, offsets):
        self.buffer, self.offsets = buffer, offsets

    @property
    def shape(self):
        return self.offsets.shape

    @property
    def dtype(self):
        return PointerType(self.buffer.dtype)

    def __add__(self, other):
        return Pointer(self.buffer, self.offsets + other)

    __radd__ = __add__

    def __getitem__(self, index):
        return Pointer(self.buffer, self.offsets[index])


@dataclass(frozen=True)
class PointerType:
    element_ty: DType


class Pending:
    """The result of a matrix product that nobody waited for."""

    def __init__(self, value, product):
        self.value, self.product = value, product

    def __getattr__(self, name):
        raise EmulationError("the result of a matrix product is used before anybody waited for it")

    def __mul__(self, other):
        raise EmulationError("the result of a matrix product is used before anybody waited for it")

    __add__ = __radd__ = __sub__ = __rsub__ = __rmul__ = __getitem__ = __mul__


def _method(operation, swapped):
    def method(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        return binary(operation, other, self) if swapped else binary(operation, self, other)

    return method


for _name, _operation in {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "floordiv": _truncated_quotient, "mod": _remainder, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "lshift": operator.lshift, "rshift": operator.rshift,
}.items():  # fmt: skip
    setattr(Value, f"__{_name}__", _method(_operation, False))
    setattr(Value, f"__r{_name}__", _method(_operation, True))
for _operation in COMPARISONS:
    setattr(Value, f"__{_operation.__name__}__", _method(_operation, False))


def minimum(x, y):
    return binary(_minimum, wrapped(x), y)


def maximum(x, y):
    return binary(_maximum, wrapped(x), y)
