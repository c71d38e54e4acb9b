"""What a model that was trained with dilated attention says of itself: its config.json, and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from longnet_dist.config.hf_model import PATTERN_FIELD
from longnet_dist.hf.pattern_field import pattern_of

CARD_FILE = "README.md"
_ROPE_OF_LENGTH = ("dynamic", "longrope", "yarn")
"""Rotations that may follow ``max_position_embeddings``; with a factor of its own, yarn does not."""


def set_trained_length(model: Any, length: int) -> None:
    """Let a model say the length of its training, and let ``generate`` keep a cache again.

    Call it before ``save_pretrained``. ``max_position_embeddings`` becomes the length, unless it is longer already or
    the rotations follow it. ``use_cache`` becomes true; ``Trainer`` leaves it false.

    Args:
        model: of transformers, or its configuration.
        length: tokens of a sample in training.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    text = config.get_text_config()
    before = getattr(text, "max_position_embeddings", None)
    if before is not None and before < length and not _length_sets_rotations(text):
        text.max_position_embeddings = length
    text.use_cache = True
    if getattr(generation := getattr(model, "generation_config", None), "use_cache", None) is False:
        generation.use_cache = True  # type: ignore[union-attr]


def write_model_card(folder: str | Path, length: int | None = None) -> None:
    """Write README.md into the folder of a saved model: how to load it, its pattern, and the length of its training.

    Call it on one rank, when the model and the tokenizer have been saved.

    Args:
        folder: with the config.json of a model that was dilated, or of a LongNet.
        length: tokens of a sample in training; None if it is not known.

    Raises:
        ConfigError: the model has no pattern.
    """
    folder = Path(folder)
    text = _card(AutoConfig.from_pretrained(folder), length, (folder / "tokenizer_config.json").is_file())
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _length_sets_rotations(config: Any) -> bool:
    fields = getattr(config, "rope_parameters", None) or {}
    kinds = [fields] if "rope_type" in fields else [part for part in fields.values() if isinstance(part, dict)]
    return any(
        kind.get("rope_type") in _ROPE_OF_LENGTH and not (kind["rope_type"] == "yarn" and kind.get("factor"))
        for kind in kinds
    )


def _card(config: Any, length: int | None, has_tokenizer: bool) -> str:
    dilated = hasattr(config.get_text_config(), PATTERN_FIELD)
    return _CARD.format(
        family=config.model_type,
        length="" if length is None else f"longnet_dist trained this model on sequences of {length:,} tokens.\n\n",
        imports="" if has_tokenizer else "import torch\n",
        classes="AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM",
        prompt=_WITH_TOKENIZER if has_tokenizer else _WITHOUT_TOKENIZER,
        cache=", cache=hf.CompactCache(model.config)" if dilated else "",
        shown="print(tokenizer.decode(text[0]))" if has_tokenizer else "print(text[0].tolist())",
        attention=_attention(config, dilated),
    )


def _attention(config: Any, dilated: bool) -> str:
    """Return what layers attend to; of a LongNet, config.json may change single layers."""
    if not dilated and config.attention != "dilated":
        return f"The attention of the layers is `{config.attention}`; config.json has its settings."
    pattern = pattern_of(config.get_text_config()) if dilated else config.core_config().pattern
    branches = [f"| {branch.segment_length:,} | {branch.dilation_rate:,} |" for branch in pattern]
    return "\n".join([_BRANCHES, *branches, f"\nThe rule of the heads' offsets is `{pattern.head_offsets}`."])


_WITH_TOKENIZER = """\
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer("Once", return_tensors="pt").input_ids"""
_WITHOUT_TOKENIZER = "tokens = torch.tensor([[1, 2, 3]])  # ids of the tokenizer that longnet_tokenizer.json names"
_BRANCHES = """\
Dilated attention (LongNet, [arXiv 2307.02486](https://arxiv.org/abs/2307.02486)) has these branches here:

| segment length (tokens) | dilation rate |
|---|---|"""
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- longnet
- dilated-attention
---

# A `{family}` model with dilated attention

{length}## Use

```bash
pip install 'longnet-dist[hf]'
```

```python
{imports}import longnet_dist.hf as hf  # registers dilated attention; without it transformers cannot load the model
from transformers import {classes}

folder = "."  # this folder, or its name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder).eval()
{prompt}
text = model.generate(tokens, max_new_tokens=20{cache})
{shown}
```

## Attention

{attention}
"""
