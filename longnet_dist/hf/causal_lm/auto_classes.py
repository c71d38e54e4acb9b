"""Registration of LongNet for the Auto classes of transformers."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from longnet_dist.hf.causal_lm.hf_config import LongNetConfig
from longnet_dist.hf.causal_lm.modeling import LongNetForCausalLM


def register_longnet() -> None:
    """Let AutoConfig and AutoModelForCausalLM know the model type ``longnet``; again has no effect."""
    AutoConfig.register(LongNetConfig.model_type, LongNetConfig, exist_ok=True)
    AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)
