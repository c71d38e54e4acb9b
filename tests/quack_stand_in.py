"""What ``longnet_dist/ops/matmul/quack.py`` needs of quack, in torch and on a CPU."""

import importlib
import sys
from functools import lru_cache
from types import ModuleType

import torch


def gemm_epilogue(ops=None, mode="element"):
    """A product that calls the epilogue with whole tensors where quack does it with numbers."""

    def product_with(epilogue):
        def product(a, b, c=None, *, out, config, **operands):
            given = {name: _placed(ops[name], value.float()) for name, value in operands.items()}
            if c is not None:
                given["c"] = c.float()
            if mode == "acc_pair":  # the table is that of one head
                given["table"] = given["table"].repeat(1, b.shape[1] // given["table"].shape[1])
            out["D"].copy_(epilogue(a.float() @ b.float(), **given)["D"])

        return product

    return product_with


def _placed(kind, value):
    return value.T if kind == "column" else value


def unpack(pairs):
    return pairs[:, ::2], pairs[:, 1::2]


def pack(even, odd):
    return torch.stack([even, odd], -1).flatten(1)


@lru_cache(maxsize=1)
def quack_kernels():
    """The module, imported with this in the place of quack; for tests without a GPU."""
    contents = {
        "quack": {},
        "quack.epilogue": {"gemm_epilogue": gemm_epilogue, "pack": pack, "unpack": unpack},
        "quack.epilogue.ops": {"ColVecLoad": lambda _: "column", "RowVecLoad": lambda _: "row"},
        "quack.epilogue.rotary": {"rotary_cos_sin_load": lambda _: "table"},
        "quack.gemm_config": {"GemmConfig": lambda **_: None},
    }
    stand_ins = {}
    for path, content in contents.items():
        stand_ins[path] = module = ModuleType(path)
        module.__path__ = []
        vars(module).update(content)
    before = {path: sys.modules.get(path) for path in stand_ins}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("longnet_dist.ops.matmul.quack")
    finally:
        for path, module in before.items():
            sys.modules.pop(path)
            if module is not None:
                sys.modules[path] = module
