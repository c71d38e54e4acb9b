"""Fine-tune a Llama checkpoint with dilated attention, on sequences that are split over GPUs.

    torchrun --nproc-per-node 8 examples/finetune_llama.py MODEL TEXTS --output tuned --length 262144

``MODEL`` is a folder or a name that transformers knows, of Llama, Qwen3, Mistral or another decoder with full attention
in every layer. ``TEXTS`` is a folder of ``.txt`` files: they are tokenized, joined and cut into samples of ``--length``
tokens. Each GPU computes a slice of every sample; ``--ranks 4`` on 8 GPUs makes two groups with samples of their own.
``--zero 3`` shards weights, gradients and the optimizer's state with DeepSpeed; ``--lora 16`` trains adapters, without
``--zero``. The output, a new folder, is a model of transformers with its tokenizer; its README.md says how to load it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

import longnet_dist.hf as hf
from longnet_dist import DilatedPattern
from longnet_dist.errors import USER_ERROR_STATUS, ConfigError, LongNetError
from longnet_dist.model.pretrained import check_new

RANK_0_SECONDS = 30.0  # torchrun stops all ranks when one ends, so rank 0 has to tell its message first


def main(words: Sequence[str] | None = None) -> list[float]:
    """Fine-tune, and return the loss of each step; a mistake is one message of rank 0, and status 2."""
    options = parser().parse_args(words)
    try:
        check(options)
        return train(options)
    except (LongNetError, OSError) as error:  # transformers raises OSError if there is no such model
        parser().error(str(error))


def check(options: argparse.Namespace) -> None:
    """Refuse what would be noticed late, or never; nothing has been loaded or written."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.lora and options.zero:
        raise ConfigError(
            f"--lora {options.lora} and --zero {options.zero} cannot be combined, because DeepSpeed would save merged "
            "adapters under names that transformers does not load; leave one of them out"
        )
    check_new(options.output)
    if options.segment >= options.length:
        raise ConfigError(
            f"--segment {options.segment} is not shorter than --length {options.length}, so the only branch would be "
            f"full attention; use --segment {max(1, options.length // 8)} or another smaller one, or a greater --length"
        )
    if options.ranks and processes % options.ranks:
        raise ConfigError(
            f"--ranks {options.ranks} must divide the {processes} processes of the launcher; use a divisor, or leave "
            "it out, so that all share every sample"
        )
    if not any(options.texts.glob("*.txt")):
        raise ConfigError(f"{options.texts} must be a folder with *.txt files, but has none; give the folder of texts")


def train(options: argparse.Namespace) -> list[float]:
    """Fine-tune with options that have been checked, and return the loss of each step."""
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        str(options.output),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.accumulate,
        max_steps=options.steps,
        learning_rate=options.lr,
        logging_steps=1,
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        report_to=[],
        deepspeed=zero(options.zero) if options.zero else None,
    )
    if not (first := arguments.process_index == 0):
        logging.disable_progress_bar()
        warnings.simplefilter("ignore")  # rank 0 shows them
    group = sequence_group(options.ranks or arguments.world_size) if arguments.world_size > 1 else None

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    samples = read_samples(options.texts, tokenizer, options.length)
    pattern = DilatedPattern.geometric(options.segment, options.length)
    if first:
        branches = ", ".join(f"{branch.segment_length:,}/{branch.dilation_rate:,}" for branch in pattern)
        print(f"{len(samples)} samples of {options.length:,} tokens; segment length/dilation rate: {branches}")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model = hf.dilate(model, pattern)
    # Trainer averages gradients over all ranks, by DDP or ZeRO.
    hf.sequence_parallel(model, group, mlp_tile=options.mlp_tile, average_gradients=False)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=options.lora, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        )

    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    if options.lora:
        trainer.model = model = model.merge_and_unload()
    hf.set_trained_length(model, options.length)
    trainer.save_model(str(options.output))
    if first:
        tokenizer.save_pretrained(options.output)
        hf.write_model_card(options.output, options.length)
        print(f"the model is in {options.output}; its README.md says how to load it")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sequence_group(size: int) -> dist.ProcessGroup:
    """The group of ``size`` neighbouring ranks that this rank is in; its ranks share every sample."""
    groups = [dist.new_group(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    return groups[dist.get_rank() // size]


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; Trainer fills in what is "auto"."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def read_samples(folder: Path, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Samples of ``length`` tokens from the texts of a folder, one behind the other; the rest is left out."""
    stream: list[int] = []
    for path in sorted(folder.glob("*.txt")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"the texts must be UTF-8, but {path} is not: {error}; convert it") from None
        # A text may be longer than the checkpoint's own length; the warning of it would be for generation.
        stream += tokenizer(text, verbose=False)["input_ids"]
        stream += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [stream[first : first + length] for first in range(0, len(stream) - length + 1, length)]
    if not pieces:
        raise ConfigError(
            f"the texts in {folder} have {len(stream)} tokens, fewer than --length {length}; give more text, or a "
            "smaller --length"
        )
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the lines of the description and adds defaults to options."""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes rank 0 alone tells; every rank ends with status 2."""

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message}", file=sys.stderr)
        else:
            time.sleep(RANK_0_SECONDS)
        raise SystemExit(USER_ERROR_STATUS)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = Parser(description=__doc__, formatter_class=Help)
    result.add_argument("model", help="folder or name of a checkpoint")
    result.add_argument("texts", type=Path, help="folder of .txt files")
    result.add_argument("--output", type=Path, required=True, default=argparse.SUPPRESS, help="new folder")
    result.add_argument("--length", type=positive, default=262144, help="tokens of a sample")
    result.add_argument(
        "--segment", type=positive, default=2048, help="segment length of the branch without dilation, below --length"
    )
    result.add_argument("--ranks", type=natural, default=0, help="GPUs that share a sample; 0 is all")
    result.add_argument("--mlp-tile", type=positive, default=8192, help="tokens for which an MLP computes at once")
    result.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=0, help="DeepSpeed's stage; 0 is DDP")
    result.add_argument("--lora", type=natural, default=0, metavar="RANK", help="train adapters; 0 trains all weights")
    result.add_argument("--steps", type=positive, default=100, help="optimizer steps")
    result.add_argument("--accumulate", type=positive, default=1, help="samples of a step for each group")
    result.add_argument("--lr", type=float, default=2e-5, help="learning rate at the start; it falls to 0")
    return result


def positive(word: str, least: int = 1) -> int:
    """A number of at least 1."""
    if (number := int(word)) < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {number}")
    return number


def natural(word: str) -> int:
    """A number of at least 0."""
    return positive(word, 0)


if __name__ == "__main__":
    main()
