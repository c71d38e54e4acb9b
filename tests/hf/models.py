"""Tiny models of transformers, and batches for them."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments  # here, and not in each forked rank

    import longnet_dist.hf as hf

from longnet_dist import DilatedPattern

__all__ = [
    "MODELS", "SIZES", "SPARSE", "Trainer", "TrainingArguments", "hf", "make", "padded", "padding", "plain", "tokens",
    "transformers",
]  # fmt: skip

SPARSE = DilatedPattern([8, 32], [1, 4])
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": lambda **f: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **GROUPED, **IDS, **f})),
    "qwen3": lambda **f: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**SIZES, **GROUPED, "tie_word_embeddings": True, **f})
    ),
    "mistral": lambda **f: transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**SIZES, "num_key_value_heads": 2, "sliding_window": None, **f})
    ),
    "bert": lambda **f: transformers.BertForMaskedLM(
        transformers.BertConfig(
            **{**SIZES, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, **f},
        )
    ),
    "modernbert": lambda **f: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **{**SIZES, **IDS, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 1, **f}
        )
    ),
    "gpt_oss": lambda **f: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **{**SIZES, **GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, **f},
            layer_types=["full_attention"] * 2,
        )
    ),
}


def plain(name, **fields):
    """A model in evaluation mode, as transformers has it, with the same weights at every call."""
    torch.manual_seed(0)
    return MODELS[name](**fields).eval()


def make(name, pattern=SPARSE, dtype=torch.float64, **fields):
    """The same model in training mode, dilated; transformers has no experts in float64."""
    dtype = torch.float32 if name == "gpt_oss" else dtype
    model = plain(name, **fields).train().to(dtype)
    with torch.no_grad():  # larger than transformers draws them, so that attention counts
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return hf.dilate(model, pattern)


def tokens(rows, batch=2):
    """Ids ``(batch, rows)``, the same at every call."""
    return torch.randint(3, 100, (batch, rows), generator=torch.Generator().manual_seed(rows))


def padding(start, stop, rows=40):
    """The mask of two texts, of which the second has tokens in ``[start, stop)`` alone."""
    mask = torch.zeros(2, rows, dtype=torch.int64)
    mask[0] = 1
    mask[1, start:stop] = 1
    return mask


def padded(items):
    """A batch with padding behind its texts; the first token of a text is not predicted."""
    texts = [torch.as_tensor(item["input_ids"]) for item in items]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
