"""Folders of small slides of two classes, and runs on them."""

import numpy as np
import torch

from longnet_dist.config.loading import parse_config, parse_yaml
from longnet_dist.telemetry.json_lines import read_jsonl
from tests.train import runs

CHANNELS = 12
MODEL = {
    "kind": "encoder", "dim": 32, "layers": 2, "heads": 2, "segment_lengths": [8, 32], "dilation_rates": [1, 4],
    "feature_dim": CHANNELS, "position_embedding": "sincos", "coordinates": 2, "tile_size": 4.0, "cls_token": True,
    "pool": "cls", "pool_norm_eps": 1.0e-6, "phantom_keys": True, "head_offsets": "blocked",
}  # fmt: skip
TRAIN = {
    "steps": 4, "batch_size": 4, "learning_rate": 1.0e-2, "warmup_steps": 2, "checkpoint_every": 100,
    "validate_every": 2, "adam_eps": 1.0e-4, "loggers": ["jsonl"],
}  # fmt: skip


def write_slides(folder, number=10, seed=0):
    """Slides of unequal lengths in ``folder / "slides"``; a channel and ``folder / "labels.csv"`` tell their class."""
    draw = torch.Generator().manual_seed(seed)
    (folder / "slides").mkdir(parents=True)
    lines = []
    for slide in range(number):
        rows, odd = 6 + 5 * slide % 31, slide % 2
        x = torch.randn(rows, CHANNELS, generator=draw) / 4
        x[:, 0] += 2 * odd - 1
        places = torch.randperm(400, generator=draw)[:rows]
        coords = torch.stack([places % 20, places // 20], -1) * 4
        if slide % 3:
            torch.save(
                {"features": x.half() if slide == 4 else x, "coords": coords}, folder / "slides" / f"s{slide}.pt"
            )
        else:
            np.save(folder / "slides" / f"s{slide}.npy", x.numpy())
            np.save(folder / "slides" / f"s{slide}.coords.npy", coords.numpy())
        lines.append(f"s{slide},{'odd' if odd else 'even'}\n")
    (folder / "labels.csv").write_text("".join(lines))
    return folder


def feature_config(folder, output, *settings, classify=True, model=MODEL):
    """A run that trains in a moment."""
    data = {"features": str(folder / "slides"), "validation_share": 0.2}
    data |= {"labels": str(folder / "labels.csv")} if classify else {}
    values = {"model": dict(model), "data": data, "train": TRAIN | {"output_dir": str(output)}}
    for word in settings:
        key, _, text = word.partition("=")
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = parse_yaml(text)
    return parse_config(values)


def run(world_size, config):
    """Train on ``world_size`` ranks; the metrics of every step, and the validations."""
    return runs.run(world_size, config), read_jsonl(config.train.output_dir / "validation.jsonl")
