"""Which blocks the engine can run: those whose forward is exactly the mathematics that it knows.

The engine reads weights by name and never calls a block's modules. So a module that was replaced or wrapped, that has
hooks, or whose weights are computed on access would be passed over in silence. Such a block runs as plain modules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from longnet_dist.attention.module import DilatedAttention, HeadNorm
from longnet_dist.config.block_style import BlockStyle
from longnet_dist.model.block import Block
from longnet_dist.model.feed_forward import FeedForward
from longnet_dist.private_interfaces import has_global_hook, has_hooks, own_module, own_parameters

_PLAIN = BlockStyle()
STYLES = (_PLAIN, BlockStyle(gated=True, activation="silu"))
"""The styles of blocks that the engine can run."""

_PARTS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("self_attn_layer_norm", (nn.LayerNorm,)),
    ("self_attn", (DilatedAttention,)),
    ("self_attn.q_proj", (nn.Linear,)),
    ("self_attn.k_proj", (nn.Linear,)),
    ("self_attn.v_proj", (nn.Linear,)),
    ("self_attn.q_norm", (nn.Identity, HeadNorm)),
    ("self_attn.k_norm", (nn.Identity, HeadNorm)),
    ("self_attn.inner_attn_ln", (nn.LayerNorm,)),
    ("self_attn.out_proj", (nn.Linear,)),
    ("final_layer_norm", (nn.LayerNorm,)),
    ("ffn", (FeedForward,)),
    ("ffn.fc1", (nn.Linear,)),
    ("ffn.ffn_layernorm", (nn.LayerNorm,)),
    ("ffn.fc2", (nn.Linear,)),
)


def obstacle(block: Block) -> str:
    """Return why the engine cannot run ``block``, or an empty string if it can.

    Hooks on the block itself are no obstacle: the engine runs inside the block's call. DeepSpeed's ZeRO 3 gathers a
    block's weights with such hooks.
    """
    if type(block) is not Block:
        return f"the block is a {_type(block)}"
    if block.style not in STYLES:
        differing = (f"{name}={value}" for name, value in vars(block.style).items() if value != vars(_PLAIN)[name])
        return f"the style of the block is not LongNet's own, but has {', '.join(differing)}"
    if has_global_hook():
        return "hooks for all modules are registered"
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return next(_obstacles(block), "")


def _obstacles(block: Block) -> Iterator[str]:
    attention = block.self_attn
    if type(attention) is not DilatedAttention:
        yield f"self_attn is a {_type(attention)}"
        return
    if attention.phantom_keys is not None:
        yield "the attention has phantom keys"
    eps = attention.norm_eps
    for name, types in _PARTS:
        module: nn.Module = block
        for part in name.split("."):
            module = own_module(module, part)
        if type(module) not in types:
            yield f"{name} is a {_type(module)}"
        elif has_hooks(module):
            yield f"{name} has hooks"
        elif "forward" in module.__dict__:
            yield f"the forward of {name} was replaced"
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.eps != eps:
            yield f"eps of {name} is {module.eps}, but {eps} elsewhere"
        else:
            yield from _weight_obstacles(name, module)


def _weight_obstacles(name: str, module: nn.Module) -> Iterator[str]:
    for kind, weight in own_parameters(module).items():
        if weight is None and not (kind == "bias" and isinstance(module, nn.RMSNorm)):
            yield f"{name} has no {kind}"
        elif weight is not None and type(weight) is not nn.Parameter:
            yield f"{kind} of {name} is a {_type(weight)}"


def _type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
