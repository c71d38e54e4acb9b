"""Fine-tune a slide encoder for classification, with a small head: all weights, or LoRA adapters.

    longnet convert gigapath slide_encoder.pth --output gigapath
    python examples/finetune_slides.py gigapath slides labels.csv --output tuned
    python examples/finetune_slides.py gigapath slides labels.csv --output tuned --lora 8

``slides`` has a file of features and coordinates for each slide, as ``longnet embed`` reads them. ``labels.csv`` has a
line ``name,label`` for each. Slides of a batch have different lengths; padding is neither computed nor seen. Blocks are
recomputed in the backward pass (gradient checkpointing). The output has the encoder, adapters merged, and the head.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from longnet_dist import EncoderConfig, LongNetEncoder
from longnet_dist.data.features.feature_files import feature_files, read_features
from longnet_dist.engine.execution import Execution
from longnet_dist.model.pretrained import from_pretrained, save_pretrained

LORA_TARGETS = ["q_proj", "v_proj"]


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Fine-tune, and return the mean loss of each epoch."""
    options = parser().parse_args(arguments)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classes, labels = read_labels(options.labels)
    slides = {name: path for name, path in feature_files(options.slides).items() if name in labels}

    encoder = with_dropout(from_pretrained(options.model), options.dropout, options.drop_path).to(device).train()
    Execution("full").attach(encoder)  # gradient checkpointing
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(encoder, LoraConfig(r=options.lora, target_modules=LORA_TARGETS))
    else:
        model = encoder
    head = nn.Linear(encoder.config.dim, len(classes)).to(device)
    trained = [parameter for parameter in (*model.parameters(), *head.parameters()) if parameter.requires_grad]
    print(f"training {sum(parameter.numel() for parameter in trained):,} parameters on {len(slides)} slides")
    optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.05)

    losses = []
    for epoch in range(options.epochs):
        total = 0.0
        for names in tqdm(batches(list(slides), options.batch_size), disable=None, leave=False):
            features, coords, lengths = load([slides[name] for name in names], device)
            wanted = torch.tensor([labels[name] for name in names], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = head(model(features=features, coords=coords, lengths=lengths).pooled)
            loss = nn.functional.cross_entropy(logits.float(), wanted)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += float(loss) * len(names)
        losses.append(total / len(slides))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}")

    if options.lora:
        encoder = model.merge_and_unload()
    save_pretrained(encoder, options.output)
    save_file(head.state_dict(), options.output / "head.safetensors")
    (options.output / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    return losses


def with_dropout(encoder: LongNetEncoder, dropout: float, drop_path: float) -> LongNetEncoder:
    """The same encoder with other dropout: its configuration cannot be changed, its weights are taken over."""
    config = EncoderConfig(**(encoder.config.model_dump() | {"dropout": dropout, "drop_path": drop_path}))
    with torch.device("meta"):
        copy = LongNetEncoder(config)
    copy.load_state_dict(encoder.state_dict(), assign=True)
    return copy


def read_labels(path: Path) -> tuple[list[str], dict[str, int]]:
    """The classes in alphabetical order, and the number of the class of each slide."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = dict(csv.reader(file))
    classes = sorted(set(rows.values()))
    return classes, {name: classes.index(label) for name, label in rows.items()}


def batches(names: list[str], size: int) -> Iterator[list[str]]:
    """The names in a random order, ``size`` at a time."""
    order = torch.randperm(len(names)).tolist()
    for first in range(0, len(names), size):
        yield [names[number] for number in order[first : first + size]]


def load(paths: Sequence[Path], device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Features and coordinates of slides, padded to the longest, and their lengths."""
    contents = [read_features(path) for path in paths]
    features, coords = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*contents, strict=True))
    return features.to(device), coords.to(device), [len(part) for part, _ in contents]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("model", type=Path, help="folder that longnet convert wrote")
    result.add_argument("slides", type=Path, help="folder of features")
    result.add_argument("labels", type=Path, help="CSV file with lines name,label")
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
    main()
