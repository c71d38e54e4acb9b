"""Pre-train an encoder on features without labels: a masked autoencoder (arXiv 2111.06377).

    python examples/pretrain_features.py slides --output pretrained

The encoder sees a quarter of the tiles of each slide. A small decoder gets their states and a mask vector for the
others, each with its place, and predicts the features of the hidden tiles. The output is the encoder, which ``longnet
embed`` and ``examples/finetune_slides.py`` take.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longnet_dist import EncoderConfig, LongNetEncoder
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.config.schema import DataConfig
from longnet_dist.data.features.feature_files import FeatureFile, feature_files
from longnet_dist.data.features.feature_set import FeatureSet
from longnet_dist.engine.execution import Execution
from longnet_dist.model.pretrained import check_new, save_pretrained

BRANCHES = {"segment_lengths": (1024, 4096, 16384, 65536), "dilation_rates": (1, 4, 16, 64)}


class MaskedAutoencoder(nn.Module):
    """Hide most rows of each sequence, and predict their features from the others.

    Args:
        encoder: with coordinates.
        decoder: takes states of the encoder.
        masked: share of the rows that are hidden.
    """

    def __init__(self, encoder: LongNetEncoder, decoder: LongNetEncoder, masked: float) -> None:
        super().__init__()
        self.encoder, self.decoder, self.masked = encoder, decoder, masked
        self.mask_vector = nn.Parameter(torch.randn(encoder.config.dim) * 0.02)
        self.prediction = nn.Linear(decoder.config.dim, encoder.config.feature_dim)

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        """The mean squared error of hidden rows of one sequence, ``features (1, n, F)`` and ``coords (1, n, C)``."""
        rows = features.shape[1]
        order = torch.randperm(rows, device=features.device)
        visible = order[: max(1, round(rows * (1 - self.masked)))].sort().values
        hidden = torch.ones(rows, dtype=torch.bool, device=features.device)
        hidden[visible] = False
        states = self.encoder(features=features[:, visible], coords=coords[:, visible]).last_hidden_state
        states = states[:, states.shape[1] - len(visible) :]  # without the cls row
        whole = self.mask_vector.to(states.dtype).expand(1, rows, -1).index_copy(1, visible, states)
        predicted = self.prediction(self.decoder(features=whole, coords=coords).last_hidden_state)
        return nn.functional.mse_loss(predicted[:, hidden].float(), features[:, hidden].float())


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Pre-train, and return the mean loss of each epoch."""
    options = parser().parse_args(arguments)
    check_new(options.output)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = FeatureFile.of(next(iter(feature_files(options.slides).values()))).channels
    places = {"position_embedding": "sincos", "coordinates": 2, "tile_size": options.tile_size}
    encoder = LongNetEncoder(
        EncoderConfig(
            dim=options.dim,
            layers=options.layers,
            heads=options.heads,
            feature_dim=width,
            cls_token=True,
            pool="mean",
            pool_norm_eps=1e-6,
            **BRANCHES,
            **places,
        )
    )
    small = {"dim": options.dim // 2, "layers": 2, "heads": options.heads}
    decoder = LongNetEncoder(EncoderConfig(feature_dim=options.dim, **small, **BRANCHES, **places))
    for part in (encoder, decoder):
        Execution("selective").attach(part)
    slides = FeatureSet.open(DataConfig(features=options.slides, validation_share=0), encoder.config)
    print(slides.report())
    files = list(slides.files.values())
    model = MaskedAutoencoder(encoder, decoder, options.masked).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for epoch in range(options.epochs):
        total = 0.0
        for number in torch.randperm(len(files)).tolist():
            features, coords = files[number].read(0, files[number].rows)
            loss = model(features[None].float().to(device), coords[None].to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        losses.append(total / len(files))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}")
    save_pretrained(encoder, options.output)
    return losses


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("slides", type=Path, help="folder of features and coordinates")
    result.add_argument("--output", type=Path, required=True, help="new folder")
    result.add_argument("--masked", type=float, default=0.75, help="share of the tiles that are hidden")
    result.add_argument("--tile-size", type=float, default=256, help="pixels")
    result.add_argument("--dim", type=int, default=384)
    result.add_argument("--layers", type=int, default=6)
    result.add_argument("--heads", type=int, default=6)
    result.add_argument("--epochs", type=int, default=10)
    result.add_argument("--lr", type=float, default=3e-4)
    result.add_argument("--seed", type=int, default=0)
    return result


if __name__ == "__main__":
    run_cli(main)
