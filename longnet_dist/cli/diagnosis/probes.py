"""The questions that must be asked in a process of their own: each imports or runs what may be broken.

``python -m longnet_dist.cli.diagnosis.probes NAME ARGUMENTS`` prints an answer a line, as soon as it is known.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

ANSWER = "@answer "  # begins a line that is one, among those that imported packages print
DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32", "bfloat16")}
HEAD_DIMS = (32, 64, 96, 128, 256)
CHECKED = {"cuda": (("bfloat16", 64), ("bfloat16", 128), ("float32", 32)), "cpu": (("float32", 32), ("float32", 64))}
ROWS, HEADS, KV_HEADS = 384, 4, 2
# Roundings of the dtype that the norm of an error may have, as a share of the norm of the result. Right kernels have
# less than one; TF32 in place of float32, or a key that is left out, have hundreds.
ALLOWED_ROUNDINGS = {"float32": 32.0, "bfloat16": 4.0, "float16": 4.0}
COLLECTIVE_SECONDS = 60


def tell(**answers: Any) -> None:
    """Print answers for the process that asked."""
    print(ANSWER + json.dumps(answers), flush=True)


def imports(*modules: str) -> None:
    """Import modules one by one; tell of each an empty string, or the error."""
    for name in modules:
        try:
            importlib.import_module(name)
            tell(**{name: ""})
        except BaseException as error:  # a package may even exit as it is imported
            tell(**{name: _line(error)})


def torch_build() -> None:
    """Tell what torch was built for, and the GPUs that it sees."""
    import torch
    import torch.distributed as dist

    from longnet_dist.estimate.devices import match_device

    tell(cuda=torch.version.cuda, hip=torch.version.hip, gloo=dist.is_available() and dist.is_gloo_available())
    tell(nccl=dist.is_available() and dist.is_nccl_available())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    tell(available=available, warning=" ".join(str(said[0].message).split()) if said else "")
    gpus = []
    for index in range(torch.cuda.device_count() if available else 0):
        properties = torch.cuda.get_device_properties(index)
        known = match_device(properties.name)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": [properties.major, properties.minor],
                "planned_as": known.name if known else None,
            }
        )
    tell(gpus=gpus)
    if available and dist.is_nccl_available():
        tell(nccl_version=".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def kernels(device_name: str) -> None:
    """Tell which kernels run on a device: attention by dtype and head dim, linear layers, other row functions."""
    import torch

    from longnet_dist.attention.kernels.registry import describe_kernels, takes_triton
    from longnet_dist.ops.matmul.choice import describe_matmul

    device = torch.device(device_name)
    choices = []
    for dtype in DTYPES[device.type]:
        for head_dim in HEAD_DIMS:
            choice = describe_kernels(device, getattr(torch, dtype), head_dim)
            choices.append({"dtype": dtype, "head_dim": head_dim, **{k: getattr(choice, k) for k in choice.__slots__}})
    tell(kernels=choices)
    half = torch.bfloat16
    tell(row_functions="triton" if takes_triton(device, half) else "torch")
    backend, reason = describe_matmul(device, half)
    tell(matmul={"backend": backend, "reason": reason})


def attention(device_name: str, dtype_name: str, head_dim: str) -> None:
    """Run a small dilated attention, forward and backward, and tell its error against the definition in float64."""
    import torch

    from longnet_dist.attention.functional import dilated_attention
    from longnet_dist.attention.kernels.reference import oracle
    from longnet_dist.geometry.pattern import DilatedPattern

    device, dtype, dim = torch.device(device_name), getattr(torch, dtype_name), int(head_dim)
    pattern = DilatedPattern([ROWS // 4, ROWS // 2, ROWS], [1, 2, 4])
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    tensors = [torch.randn(1, ROWS, h, dim, generator=generator).to(device, dtype) for h in heads]
    inputs = [x.clone().requires_grad_() for x in tensors[:3]]
    exact_inputs = [x.double().cpu().requires_grad_() for x in tensors[:3]]
    (q, k, v), (exact_q, exact_k, exact_v) = inputs, exact_inputs
    out = dilated_attention(q, k, v, pattern)
    expected, _ = oracle(exact_q, exact_k, exact_v, pattern)
    assert isinstance(out, torch.Tensor)
    found = [out, *torch.autograd.grad(out, inputs, tensors[3])]
    wanted = [expected, *torch.autograd.grad(expected, exact_inputs, tensors[3].double().cpu())]
    errors = [
        float((a.detach().double().cpu() - b.detach()).norm() / b.detach().norm())
        for a, b in zip(found, wanted, strict=True)
    ]
    # A NaN is no number of JSON, and greater than nothing.
    error = max(errors) if all(map(_is_number, errors)) else 1.0
    tell(error=error, allowed=ALLOWED_ROUNDINGS[dtype_name] * torch.finfo(dtype).eps)


def collective(backend: str, rank: str, num_ranks: str, meeting_file: str) -> None:
    """Add a number of each rank to those of the others, and tell the sum."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", int(rank)) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting_file}",
        rank=int(rank),
        world_size=int(num_ranks),
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        device_id=device if backend == "nccl" else None,
    )
    numbers = torch.full((4,), float(rank) + 1, device=device)
    dist.all_reduce(numbers)
    tell(sum=float(numbers[0]))
    dist.destroy_process_group()


PROBES: dict[str, Callable[..., None]] = {
    probe.__name__: probe for probe in (imports, torch_build, kernels, attention, collective)
}


def _is_number(value: float) -> bool:
    return abs(value) < float("inf")


def _line(error: BaseException) -> str:
    """The class and message of an error, in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def main() -> None:
    """Answer what the command line asks."""
    # DeepSpeed would look for an accelerator; and ranks that a launcher started are not meant here.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    name, *arguments = sys.argv[1:]
    try:
        PROBES[name](*arguments)
    except Exception as error:
        traceback.print_exc()
        tell(failure=_line(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
