"""The rates that a run is planned with on this machine: those of the attention kernels that will run."""

from __future__ import annotations

import torch

from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.registry import describe_kernels
from longnet_dist.estimate.devices import Device, device_of
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.numerics import dtype_of, log_once


def planned_device(device: torch.device, layout: RunLayout) -> Device:
    """Return what a device of this machine can do for a run, with the attention kernels that run there.

    The rates of a Hopper GPU are those of the kernels written for it. Where others run, the plan is slower, and a
    warning says once why, if the user can do something about it.

    Args:
        device: a device of this machine.
        layout: of the run, which decides dtype and head dim.
    """
    found = device_of(device)
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != support.COMPUTE_CAPABILITY:
        return found  # no other device has kernels of its own
    head_dim, train = layout.config.model.head_dim, layout.config.train
    dtype = dtype_of(layout.precision)
    model, tables = layout.config.model, layout.config.data.documents
    choice = describe_kernels(
        device,
        dtype,
        head_dim,
        backend=train.attention_backend,
        deterministic=train.deterministic,
        tables=tables or model.layer_shift or model.layer_offsets,
    )
    if choice.remedy:
        log_once(f"planned with slower attention kernels than this GPU has: {choice.reason}; {choice.remedy}")
    return found.with_kernels(choice.forward, choice.backward, head_dim)
