"""Fine-tune a slide encoder for classification, with a small head: all weights, or LoRA adapters.

    longnet convert gigapath slide_encoder.pth --output gigapath
    python examples/finetune_slides.py gigapath slides labels.csv --output tuned
    python examples/finetune_slides.py gigapath slides labels.csv --output adapted --lora 8
    longnet evaluate tuned --data others --labels others.csv
    longnet predict tuned new --output predictions.csv

``slides`` has a file of features and coordinates for each slide, as ``longnet embed`` reads them. ``labels.csv`` has a
line ``name,label`` for each. Slides of a batch have different lengths; padding is neither computed nor seen. Blocks are
recomputed in the backward pass (gradient checkpointing). The output is a classifier as ``longnet export`` writes it:
the encoder, adapters merged, the head and the names of the classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from longnet_dist import EncoderConfig, LongNetEncoder
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.config.schema import DataConfig
from longnet_dist.data.features.feature_files import FeatureFile
from longnet_dist.data.features.feature_set import FeatureSet
from longnet_dist.engine.execution import Execution
from longnet_dist.inference.features.exported_task import save_task
from longnet_dist.inference.features.feature_runs import load_encoder
from longnet_dist.model.feature_tasks.classification import Classification
from longnet_dist.model.pretrained import check_new

LORA_TARGETS = ["q_proj", "v_proj"]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Fine-tune, and return the mean loss of each epoch."""
    options = parser().parse_args(arguments)
    check_new(options.output)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = with_dropout(load_encoder(options.model, device)[0], options.dropout, options.drop_path)
    Classification.check(encoder.config)
    encoder = encoder.float().train()
    data = DataConfig(features=options.slides, labels=options.labels, validation_share=0)
    slides = FeatureSet.open(data, encoder.config)
    print(slides.report())

    Execution("full").attach(encoder)  # gradient checkpointing
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(encoder, LoraConfig(r=options.lora, target_modules=LORA_TARGETS))
    else:
        model = encoder
    task = Classification(encoder, len(slides.classes), 0).to(device)
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    print(f"training {sum(parameter.numel() for parameter in trained):,} parameters on {len(slides.files)} slides")
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.05)

    losses = []
    for epoch in range(options.epochs):
        total = 0.0
        for names in tqdm(list(batches(list(slides.files), options.batch_size)), disable=None, leave=False):
            features, coords, lengths = load([slides.files[name] for name in names], device)
            wanted = torch.tensor([slides.labels[name] for name in names], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = task.head(model(features=features, coords=coords, lengths=lengths).pooled)
            loss = nn.functional.cross_entropy(logits.float(), wanted)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(names)
        losses.append(total / len(slides.files))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}")

    if options.lora:
        task.encoder = model.merge_and_unload()
    save_task(task, slides.classes, options.output)
    print(f"written to {options.output}")
    return losses


def with_dropout(encoder: LongNetEncoder, dropout: float, drop_path: float) -> LongNetEncoder:
    """The same encoder with other dropout: its configuration cannot be changed, its weights are taken over."""
    config = EncoderConfig(**(encoder.config.model_dump() | {"dropout": dropout, "drop_path": drop_path}))
    with torch.device("meta"):
        copy = LongNetEncoder(config)
    copy.load_state_dict(encoder.state_dict(), assign=True)
    return copy


def batches(names: list[str], size: int) -> Iterator[list[str]]:
    """The names in a random order, ``size`` at a time."""
    order = torch.randperm(len(names)).tolist()
    for first in range(0, len(names), size):
        yield [names[number] for number in order[first : first + size]]


def load(files: Sequence[FeatureFile], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Features and coordinates of slides, padded to the longest, and their lengths."""
    contents = [file.read(0, file.rows) for file in files]
    features, coords = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*contents, strict=True))
    return features.float().to(device), coords.to(device), [file.rows for file in files]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("model", type=Path, help="folder that longnet convert wrote, or a run")
    result.add_argument("slides", type=Path, help="folder of features")
    result.add_argument("labels", type=Path, help="CSV file with lines name,label, or JSON lines")
    result.add_argument("--output", type=Path, required=True, help="new folder")
    result.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank (0: all weights)"
    )
    result.add_argument("--epochs", type=int, default=5)
    result.add_argument("--batch-size", type=int, default=4)
    result.add_argument("--lr", type=float, default=1e-4)
    result.add_argument("--dropout", type=float, default=0.1)
    result.add_argument("--drop-path", type=float, default=0.0)
    result.add_argument("--seed", type=int, default=0)
    return result


if __name__ == "__main__":
    run_cli(main)
