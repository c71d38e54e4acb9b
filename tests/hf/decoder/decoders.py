"""Tiny decoders of transformers in folders, and runs that train them."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from longnet_dist.config.loading import load_config

SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
PATTERN = ["model.segment_lengths=[16,32,64]", "model.dilation_rates=[1,2,4]"]
RUN = [
    "data.sequence_length=64",
    "train.steps=4",
    "train.batch_size=4",
    "train.learning_rate=1e-2",
    "train.warmup_steps=2",
    "train.checkpoint_every=100",
    "train.validate_every=0",
    "train.sample_tokens=0",
    "train.adam_eps=1e-4",
]


def write_decoder(folder, family="qwen3", dtype=torch.float32, seed=3):
    """A folder of a random model, as ``save_pretrained`` writes it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=dtype)
    with torch.no_grad():  # biases and norms that matter
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def decoder_config(source, output, data, *settings):
    """The configuration of a run that trains in a moment; later settings replace earlier ones."""
    words = [f"model.path={source}", f"data.path={data}", f"train.output_dir={output}", *PATTERN, *RUN, *settings]
    return load_config(None, list({word.partition("=")[0]: word for word in words}.values()))
