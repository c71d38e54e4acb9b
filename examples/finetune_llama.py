"""Fine-tune a Llama checkpoint with dilated attention, on sequences that are split over GPUs.

    torchrun --nproc-per-node 8 examples/finetune_llama.py MODEL TEXTS --output tuned --length 262144

``MODEL`` is a folder or a name that transformers knows, of Llama, Qwen3, Mistral or another decoder with full attention
in every layer. ``TEXTS`` is a folder of ``.txt`` files: they are tokenized, joined and cut into samples of ``--length``
tokens. Each GPU computes a slice of every sample; ``--ranks 4`` on 8 GPUs makes two groups with samples of their own.
``--zero 3`` shards weights, gradients and the optimizer's state with DeepSpeed; ``--lora 16`` trains adapters, without
``--zero``. The output is a model of transformers with its tokenizer; it needs ``import longnet_dist.hf`` to be loaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import longnet_dist.hf as hf
from longnet_dist import DilatedPattern


def main(words: Sequence[str] | None = None) -> list[float]:
    """Fine-tune, and return the loss of each step."""
    options = parser().parse_args(words)
    if options.lora and options.zero:
        parser().error(
            f"--lora {options.lora} and --zero {options.zero} cannot be combined, because DeepSpeed would save merged "
            "adapters under names that transformers does not load; leave one of them out"
        )
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
    group = sequence_group(options.ranks or arguments.world_size) if arguments.world_size > 1 else None

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = hf.dilate(model, DilatedPattern.geometric(options.segment, options.length))
    # Trainer averages gradients over all ranks, by DDP or ZeRO.
    hf.sequence_parallel(model, group, mlp_tile=options.mlp_tile, average_gradients=False)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=options.lora, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        )

    samples = read_samples(options.texts, tokenizer, options.length)
    trainer = Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    if options.lora:
        trainer.model = model.merge_and_unload()
    trainer.save_model(str(options.output))
    if arguments.process_index == 0:
        tokenizer.save_pretrained(options.output)
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
        stream += tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
        stream += [tokenizer.eos_token_id]
    pieces = [stream[first : first + length] for first in range(0, len(stream) - length + 1, length)]
    if not pieces:
        raise SystemExit(f"the texts in {folder} have {len(stream)} tokens, fewer than --length {length}")
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("model", help="folder or name of a checkpoint")
    result.add_argument("texts", type=Path, help="folder of .txt files")
    result.add_argument("--output", type=Path, required=True, help="new folder")
    result.add_argument("--length", type=int, default=262144, help="tokens of a sample")
    result.add_argument("--segment", type=int, default=2048, help="segment length of the branch without dilation")
    result.add_argument("--ranks", type=int, help="GPUs that share a sample (default: all)")
    result.add_argument("--mlp-tile", type=int, default=8192, help="tokens for which an MLP computes at once")
    result.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=0, help="DeepSpeed's stage (0: DDP)")
    result.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters (0: all weights)")
    result.add_argument("--steps", type=int, default=100)
    result.add_argument("--accumulate", type=int, default=1, help="samples of a step for each group")
    result.add_argument("--lr", type=float, default=2e-5)
    return result


if __name__ == "__main__":
    main()
