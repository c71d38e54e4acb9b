"""Draw which tiles of a slide the cls row attends to, in one block of a slide encoder.

    longnet convert gigapath slide_encoder.pth --output gigapath
    python examples/heat_map.py gigapath slides/a.h5 --output heat_map.png [--block 11]

The weights are exact: with them, the cls row's output is a sum of values. They are averaged over the heads. The weights
of a row cost O(N), so slides of any size can be drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longnet_dist import LongNetEncoder, attention_weights
from longnet_dist.attention.module import DilatedAttention
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.data.features.feature_files import FeatureFile
from longnet_dist.data.features.feature_set import misfit
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.inference.features.feature_runs import load_encoder
from longnet_dist.machine import check_writable_file


def main(arguments: Sequence[str] | None = None) -> Tensor:
    """Draw the picture, and return the weight ``(n,)`` of each tile."""
    options = parser().parse_args(arguments)
    check_picture(options.output)
    encoder, _ = load_encoder(options.model, torch.device("cpu"))
    if not (encoder.config.cls_token and encoder.config.position_embedding == "sincos"):
        raise ConfigError(f"{options.model} has no cls row or takes no places, but both are drawn; give another model")
    if not -len(encoder.blocks) <= options.block < len(encoder.blocks):
        raise ConfigError(f"--block={options.block} must be below the number of blocks, {len(encoder.blocks)}")
    slide = FeatureFile.of(options.slide)
    if fault := misfit(slide, encoder.config):
        raise DataError(fault)
    features, coords = slide.read(0, slide.rows)
    weights = cls_weights(encoder.float(), features.float(), coords, options.block)
    draw(coords, weights, options.output)
    print(f"drawn to {options.output}; the tiles have {weights.sum():.1%} of the weight")
    return weights


@torch.inference_mode()
def cls_weights(encoder: LongNetEncoder, features: Tensor, coords: Tensor, block: int) -> Tensor:
    """The weight of each tile in the attention of the cls row, averaged over the heads."""
    attention: DilatedAttention = encoder.blocks[block].self_attn
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder(features=features[None], coords=coords[None])
    hook.remove()
    spec, table = attention.prepare(seen[0], None, None, None)
    q, k, _ = attention.project(seen[0], table)
    sink = attention.sink(spec, features.device)  # torchscale's zero keys, if the model has them
    weights = attention_weights(
        q[:, :1], k, attention.pattern, [0], causal=attention.causal, sink=None if sink is None else sink[:1]
    )
    return weights[0, 0, :, 1:].mean(0)


def check_picture(output: Path) -> None:
    """Refuse a place or a format that cannot be written, before anything is computed."""
    from matplotlib.backend_bases import FigureCanvasBase

    check_writable_file(output, f"--output={output}")
    if output.suffix[1:] not in FigureCanvasBase.filetypes:
        raise ConfigError(f"--output={output} must end in .png, .pdf, .svg or another format of matplotlib")


def draw(coords: Tensor, weights: Tensor, output: Path) -> None:
    """Write a picture of the tiles, coloured by weight."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 6))
    relative = weights * len(weights) / weights.sum()
    points = axes.scatter(coords[:, 0], coords[:, 1], c=relative, s=12, marker="s", cmap="viridis")
    axes.set(title="Attention of the cls row", xlabel="x (pixels)", ylabel="y (pixels)", aspect="equal")
    axes.invert_yaxis()
    figure.colorbar(points, label="weight over the mean")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, bbox_inches="tight")
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("model", type=Path, help="folder that longnet convert wrote, or a run, with a cls row")
    result.add_argument("slide", type=Path, help="file of features and coordinates")
    result.add_argument("--output", type=Path, required=True, help="picture, such as heat_map.png")
    result.add_argument("--block", type=int, default=-1, help="number of the block (default: the last)")
    return result


if __name__ == "__main__":
    run_cli(main)
