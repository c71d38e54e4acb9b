"""torchscale's LongNet encoders and decoders, name for name."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longnet_dist.config.block_style import Activation
from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.interop.state_dicts import StateDict, load_model, shown_sizes, state_dict_of, without_prefix
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.numerics import log_once

FIRST_KEY = "layers.0.self_attn.q_proj.weight"
_LONGEST_SHOWN = 80
POSITION_OFFSET = 2
"""torchscale counts learned positions from 2, as fairseq does."""
REFUSED = {
    "encoder_attn": "cross-attention is not supported",
    "moe_layer": "experts are not supported",
    ".A.": "multiway layers are not supported",
    ".B.": "multiway layers are not supported",
    "relative_position": "relative positions do not work with dilated attention",
    "xpos.scale": "it belongs to xpos_rel_pos=True",
}
_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "relu": "relu", "swish": "silu"}
_SIDES = {"embed_dim": 768, "attention_heads": 12, "ffn_embed_dim": 3072, "layers": 12, "normalize_before": True}
_SIZES = {"layers": "layers", "dim": "embed_dim", "ffn_dim": "ffn_embed_dim"}
"""What torchscale calls the sizes that weights show."""
_DEFAULTS: dict[str, Any] = {
    "activation_fn": "gelu", "dropout": 0.0, "drop_path_rate": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "no_scale_embedding": True, "layernorm_embedding": False, "deepnorm": False, "subln": True,
    "no_output_layer": False, "layernorm_eps": 1e-5, "vocab_size": -1, "normalize_output": True,
    "xpos_rel_pos": False, "xpos_scale_base": 512, "segment_length": None, "dilated_ratio": None,
    "multiway": False, "moe_freq": 0, "use_xmoe": False, "rel_pos_buckets": 0, "max_rel_pos": 0,
}  # fmt: skip
_WITHOUT_EFFECT = {
    "moe_top1_expert", "moe_expert_count", "moe_gating_use_fp32", "moe_eval_capacity_token_fraction",
    "moe_second_expert_policy", "moe_normalize_gate_prob_before_dropping", "bert_init", "max_source_positions",
    "max_target_positions", "img_size", "patch_size", "in_chans", "checkpoint_activations", "fsdp", "ddp_rank",
    "flash_attention", "sequence_parallel", "seq_parallel",
}  # fmt: skip


def from_torchscale(state_dict: Any, config: Mapping[str, Any], decoder: bool = False) -> LongNetEncoder:
    """Build the model of a torchscale checkpoint, in evaluation mode, float32 (float64 if the weights are).

    ::

        model = from_torchscale(state_dict, {"encoder_embed_dim": 768, "segment_length": "[1024]", …})
        rows = model(features=features).last_hidden_state
        logits = model(tokens, padding_mask=mask).logits

    Bidirectional models attend to torchscale's zero keys (:func:`~longnet_dist.phantom_keys`). Where torchscale
    misplaces rows, which it does if ``r`` does not divide ``w`` and there are several segments, the model warns and
    differs.

    Args:
        state_dict: tensors by torchscale's names, also behind one common prefix, or inside a key such as ``model``; or
            a file that holds them. Learned positions follow from the keys.
        config: keyword arguments of torchscale's ``EncoderConfig`` or ``DecoderConfig``; without sizes, these are those
            of the weights.
        decoder: whether it is a decoder, which is causal.

    Raises:
        ConfigError: a configuration that cannot work here.
        CheckpointError: sizes or keys do not fit.
    """
    side = "decoder" if decoder else "encoder"
    state = without_prefix(state_dict_of(state_dict), FIRST_KEY)
    values = _values(config, side, shown_sizes(state))
    ours = _config_of(values, state, decoder)
    if values["xpos_rel_pos"]:
        state = _without_scales(state, ours)
    if ours.tie_embeddings:
        state = _untied(state)
    settings = {ours: f"{side}_{theirs}" for ours, theirs in _SIZES.items()}
    return load_model(ours, state, torchscale_names(ours), {}, REFUSED, settings)


def to_torchscale(model: LongNetEncoder) -> tuple[StateDict, dict[str, Any]]:
    """Return state dict and configuration of a model for torchscale: the way back of :func:`from_torchscale`.

    Raises:
        ConfigError: the model has a part that torchscale's encoders and decoders do not have.
    """
    config = model.config
    _check_exportable(config)
    names = torchscale_names(config)
    state = {names[name]: x.detach().cpu().contiguous() for name, x in model.named_parameters()}
    if config.tie_embeddings:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    if config.positions == "xpos":
        for layer in range(config.layers):
            state[f"layers.{layer}.self_attn.xpos.scale"] = xpos_scale(config.head_dim)
    return state, config_for_torchscale(config)


def torchscale_names(config: EncoderConfig, prefix: str = "") -> dict[str, str]:
    """Return the name in torchscale of each parameter of an encoder, behind a prefix."""
    names = {"embedding.weight": "embed_tokens.weight", "learned_positions.weight": "embed_positions.weight"}
    names["head.weight"] = "output_projection.weight"
    pair = ("weight", "bias")
    for kind in pair:
        names[f"embedding_norm.{kind}"] = f"layernorm_embedding.{kind}"
        names[f"norm.{kind}"] = f"layer_norm.{kind}"
    attention = (f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj", "inner_attn_ln"))
    parts = (*attention, "self_attn_layer_norm", "ffn.fc1", "ffn.ffn_layernorm", "ffn.fc2", "final_layer_norm")
    for layer in range(config.layers):
        names |= {f"blocks.{layer}.{part}.{kind}": f"layers.{layer}.{part}.{kind}" for part in parts for kind in pair}
    return {name: prefix + theirs for name, theirs in names.items()}


def branches(value: Any, name: str) -> tuple[int, ...]:
    """Return the integers of a list, or of a string that shows one: ``"[1024, np.int64(5792)]"``.

    Raises:
        ConfigError: it is neither.
    """
    try:
        found = ast.literal_eval(re.sub(r"\w+\.\w+\((\d+)\)", r"\1", value)) if isinstance(value, str) else value
        return tuple(x.__index__() for x in found)
    except (ValueError, SyntaxError, TypeError, AttributeError, RecursionError, MemoryError):
        raise ConfigError(
            f'{name} must be a list of integers, such as "[1024, 5792]", also as a string, but is {_short(value)}'
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} …"


def xpos_scale(head_dim: int) -> Tensor:
    """Return the buffer ``xpos.scale (D/2,)`` that torchscale stores with every layer."""
    return (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)


def _values(config: Mapping[str, Any], side: str, shown: Mapping[str, int]) -> dict[str, Any]:
    """Return all settings by the names of torchscale, without the side in them; ``shown`` are sizes of the weights."""
    if not isinstance(config, Mapping) and not hasattr(config, "__dict__"):
        raise ConfigError(
            f"the configuration must be the keyword arguments of torchscale's {side.capitalize()}Config by name, or "
            f"such an object, but is {type(config).__name__}; give a dictionary"
        )
    given = dict(config if isinstance(config, Mapping) else vars(config))
    share = f"share_{side}_input_output_embed"
    defaults = {**_DEFAULTS, **{f"{side}_{name}": value for name, value in _SIDES.items()}, share: False}
    if unknown := sorted(given.keys() - defaults.keys() - _WITHOUT_EFFECT):
        log_once(f"torchscale's configuration has no {', '.join(unknown)}; torchscale ignores them, and so does this")
    defaults |= {f"{side}_{theirs}": shown[ours] for ours, theirs in _SIZES.items() if ours in shown}
    values = {name: given.get(name, default) for name, default in defaults.items()}
    _check_switches(values, defaults)
    values = {name.removeprefix(f"{side}_"): value for name, value in values.items()}
    values["share"] = values.pop(share)
    refused = {
        "multiway": values["multiway"],
        "moe_freq": values["moe_freq"],
        "use_xmoe": values["use_xmoe"],
        "rel_pos_buckets": values["rel_pos_buckets"] and values["max_rel_pos"],
    }
    if wrong := [name for name, value in refused.items() if value]:
        raise ConfigError(f"torchscale models with {', '.join(wrong)} are not supported")
    if values["activation_fn"] not in _ACTIVATIONS:
        raise ConfigError(f"activation_fn must be one of {', '.join(_ACTIVATIONS)}, not {values['activation_fn']!r}")
    return values


def _check_switches(values: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse a text in place of true or false: torchscale takes ``"False"`` for true."""
    for name, value in values.items():
        if isinstance(defaults[name], bool) and not (isinstance(value, int) and value in (0, 1)):
            raise ConfigError(f"{name} must be true or false, but is {value!r}; a text such as 'False' counts as true")


def _norms(values: dict[str, Any], decoder: bool) -> dict[str, Any]:
    """Return where norms are.

    torchscale's order: deepnorm takes subln away, else subln takes deepnorm away. Both set encoder_normalize_before,
    also in DecoderConfig, and decoders do not read that.
    """
    deepnorm, subln = values["deepnorm"], values["subln"] and not values["deepnorm"]
    before = values["normalize_before"] if decoder or not (deepnorm or subln) else subln
    last = before and (decoder or values["normalize_output"])
    return {"pre_norm": before, "sub_norm": subln, "final_norm": last, "deepnorm": deepnorm}


def _vocabulary(values: dict[str, Any], state: StateDict) -> dict[str, Any]:
    """Return the fields of embedding, learned positions and head: caller's objects in torchscale, so keys show them."""
    tokens, places, head = (
        state.get(f"{name}.weight") for name in ("embed_tokens", "embed_positions", "output_projection")
    )
    vocab = None if tokens is None else len(tokens)
    projects = not values["no_output_layer"] and values["vocab_size"] > 0
    outputs = values["vocab_size"] if projects else None
    shared = values["share"] and projects
    if shared:
        vocab = outputs = vocab or outputs
    elif outputs is None and head is not None:
        outputs = len(head)
    fields = {"vocab_size": vocab, "outputs": outputs, "tie_embeddings": shared}
    if places is None:
        return fields
    return fields | {
        "position_embedding": "learned",
        "max_positions": len(places),
        "position_offset": POSITION_OFFSET,
    }


def _config_of(values: dict[str, Any], state: StateDict, decoder: bool) -> EncoderConfig:
    return EncoderConfig(
        dim=values["embed_dim"],
        layers=values["layers"],
        heads=values["attention_heads"],
        ffn_dim=values["ffn_embed_dim"],
        segment_lengths=branches(values["segment_length"], "segment_length"),
        dilation_rates=branches(values["dilated_ratio"], "dilated_ratio"),
        head_offsets="blocked",
        causal=decoder,
        positions="xpos" if values["xpos_rel_pos"] else "none",
        xpos_base=values["xpos_scale_base"],
        norm_eps=values["layernorm_eps"],
        scale_embedding=not values["no_scale_embedding"],
        embedding_norm=values["layernorm_embedding"],
        activation=_ACTIVATIONS[values["activation_fn"]],
        activation_float32=True,
        dropout=values["dropout"],
        activation_dropout=values["activation_dropout"],
        attention_dropout=values["attention_dropout"],
        drop_path=values["drop_path_rate"],
        phantom_keys=not decoder,
        **_norms(values, decoder),
        **_vocabulary(values, state),
    )


def _without_scales(state: StateDict, config: EncoderConfig) -> StateDict:
    """Drop the buffers of xPos, which must have the values that follow from the head dim."""
    keys = [f"layers.{layer}.self_attn.xpos.scale" for layer in range(config.layers)]
    wanted = xpos_scale(config.head_dim)
    for key in keys:
        found = state.get(key)
        if found is not None and (found.shape != wanted.shape or (found.float() - wanted).abs().max() > 1e-2):
            raise CheckpointError(
                f"{key} is not (2i + 0.4 D) / (1.4 D) for head dim D={config.head_dim}; such positions "
                f"are not supported"
            )
    return {key: x for key, x in state.items() if key not in keys}


def _untied(state: StateDict) -> StateDict:
    """Drop the second name of a tied embedding."""
    first, second = state.get("embed_tokens.weight"), state.get("output_projection.weight")
    if first is not None and second is not None and not torch.equal(first, second):
        raise CheckpointError(
            "embed_tokens.weight and output_projection.weight are shared by the configuration, but differ; use "
            "share_…_input_output_embed=False"
        )
    return {key: x for key, x in state.items() if key != "output_projection.weight"}


def _check_exportable(config: EncoderConfig) -> None:
    differing = {
        "feature_dim": config.feature_dim is not None,
        "cls_token": config.cls_token,
        "pool_norm_eps": config.pool_norm_eps is not None,
        "position_embedding": config.position_embedding == "sincos",
        "position_offset": config.max_positions is not None and config.position_offset != POSITION_OFFSET,
        "attention": config.attention != "dilated",
        "layers of their own": bool(config.layer_offsets or config.layer_shift or config.full_layers),
        "head_offsets": config.head_offsets != "blocked",
        "kv_heads": (config.kv_heads or config.heads) != config.heads,
        "qk_norm": config.qk_norm,
        "sinks": config.sinks,
        "ffn": config.ffn != "plain",
        "positions": config.positions not in ("none", "xpos"),
        "phantom_keys": config.phantom_keys == config.causal,
        "activation_float32": not config.activation_float32,
        "outputs": config.tie_embeddings and config.outputs != config.vocab_size,
        "deepnorm": config.deepnorm and config.sub_norm,
        "pre_norm": not config.causal and (config.deepnorm if config.pre_norm else config.sub_norm),
        "final_norm": config.final_norm != config.pre_norm and (config.causal or config.final_norm),
    }
    if wrong := [name for name, differs in differing.items() if differs]:
        raise ConfigError(f"torchscale has no equivalent of this model's {', '.join(wrong)}")


def config_for_torchscale(config: EncoderConfig) -> dict[str, Any]:
    """Return the keyword arguments of torchscale's ``EncoderConfig`` or ``DecoderConfig``."""
    side = "decoder" if config.causal else "encoder"
    result = {
        f"{side}_embed_dim": config.dim,
        f"{side}_attention_heads": config.heads,
        f"{side}_ffn_embed_dim": config.inner_dim,
        f"{side}_layers": config.layers,
        f"{side}_normalize_before": config.pre_norm,
        f"share_{side}_input_output_embed": config.tie_embeddings,
        "activation_fn": {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[config.activation],
        "segment_length": str(list(config.segment_lengths)),
        "dilated_ratio": str(list(config.dilation_rates)),
        "flash_attention": True,
        "layernorm_eps": config.norm_eps,
        "vocab_size": config.outputs or -1,
        "no_output_layer": config.outputs is None,
        "no_scale_embedding": not config.scale_embedding,
        "layernorm_embedding": config.embedding_norm,
        "deepnorm": config.deepnorm,
        "subln": config.sub_norm,
        "xpos_rel_pos": config.positions == "xpos",
        "xpos_scale_base": config.xpos_base,
        "dropout": config.dropout,
        "activation_dropout": config.activation_dropout,
        "drop_path_rate": config.drop_path,
    }
    return result if config.causal else {**result, "normalize_output": config.final_norm}
