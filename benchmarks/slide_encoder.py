"""GigaPath's slide encoder, 12 layers of width 768 with random weights: time and peak memory of slides.

    python benchmarks/slide_encoder.py [--tiles 5000] [--output benchmarks/results/slide_encoder.json]
    python benchmarks/slide_encoder.py --device cuda --tiles 45680 --finetune --output …

On a CPU: one core, float32. On a GPU: bfloat16, and with ``--finetune`` training steps over 16 slides of 1,000 to
45,680 tiles at once, with checkpointing. Memory of a CPU is the peak of the whole process, with Python and torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist.engine.execution import Execution
from longnet_dist.interop import SlideEncoder
from longnet_dist.interop.gigapath import slide_config
from longnet_dist.machine import peak_resident_bytes
from longnet_dist.model.encoder import LongNetEncoder

GRID = 256  # tiles a side of the slides
SLIDES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--finetune", action="store_true", help="also training steps over 16 slides (GPU)")
    parser.add_argument("--longest", type=int, default=45680, help="tiles of the longest of the 16 slides")
    parser.add_argument("--output", type=output_file, default=Path("benchmarks/results/slide_encoder.json"))
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), torch.float32 if args.device == "cpu" else torch.bfloat16
    with device:
        encoder = SlideEncoder(LongNetEncoder(slide_config())).to(dtype).eval()
    result = {
        "command": "python benchmarks/slide_encoder.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "dtype": str(dtype),
        "tiles": args.tiles,
    }
    features, coords = slides(1, args.tiles, device, dtype)

    def forward() -> None:
        with torch.inference_mode():
            encoder(features, coords)

    result["forward_seconds"] = timed(forward, args.repeats, device)
    result["forward_seconds_median"] = statistics.median(result["forward_seconds"])
    result["peak_gib"] = peak(device)
    if args.finetune:
        result["finetune"] = finetune(encoder, device, dtype, args.repeats, args.longest)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def slides(number: int, tiles: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features ``(number, tiles, 1536)`` and pixel places of tiles on a grid, no two alike."""
    places = torch.randperm(GRID * GRID, device=device)[:tiles]
    coords = torch.stack([places // GRID, places % GRID], -1) * 256
    return torch.randn(number, tiles, 1536, device=device, dtype=dtype), coords.expand(number, -1, -1)


def finetune(
    encoder: SlideEncoder, device: torch.device, dtype: torch.dtype, repeats: int, longest: int
) -> dict[str, object]:
    """Steps of AdamW on all weights, over slides of unequal lengths, with a small head."""
    lengths = torch.linspace(min(1000, longest), longest, SLIDES).long().tolist()
    features, coords = slides(SLIDES, max(lengths), device, dtype)
    labels = torch.arange(SLIDES, device=device) % 2
    with device:
        head = torch.nn.Linear(768, 2).to(dtype)
    Execution("full").attach(encoder.encoder.train())
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-5)

    def step() -> None:
        (vectors,) = encoder(features, coords, lengths)
        torch.nn.functional.cross_entropy(head(vectors).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(step, repeats, device)
    return {"lengths": lengths, "step_seconds": seconds, "peak_gib": peak(device)}


def timed(work: Callable[[], None], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    seconds = []
    for _ in tqdm(range(repeats + 1), leave=False):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def peak(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (peak_resident_bytes() or 0) / 2**30


if __name__ == "__main__":
    main()
