"""The same training run on every layout: losses and gradient norms step by step.

    python benchmarks/parity.py [--steps 20] [--output benchmarks/results/parity.json]

Trains the quick start in float32 on the CPU through torchrun: 1, 2 and 4 sequence ranks, ZeRO stages 0 to 3, and data ×
sequence meshes, and compares each run's ``metrics.jsonl`` with that of one process at stage 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment

MESHES = ((1, 1), (1, 2), (1, 4), (2, 2))  # (data, sequence)
STAGES = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/parity.json"))
    args = parser.parse_args()

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for data, sequence in tqdm(MESHES, unit="mesh"):
            for stage in STAGES:
                name = f"data={data} sequence={sequence} zero={stage}"
                runs[name] = train(Path(folder) / name.replace(" ", "_"), data, sequence, stage, args.steps)
    base = next(iter(runs.values()))
    differences = {name: difference(metrics, base) for name, metrics in runs.items()}
    result = {
        "command": f"python benchmarks/parity.py --steps {args.steps}",
        "environment": environment(),
        "base": next(iter(runs)),
        "largest_relative_difference": differences,
        "runs": runs,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'run':<28} {'loss':>9} {'grad norm':>10}   largest relative difference from {result['base']}")
    for name, values in differences.items():
        print(f"{name:<28} {values['loss']:9.1e} {values['grad_norm']:10.1e}")


def train(folder: Path, data: int, sequence: int, stage: int, steps: int) -> dict[str, list[float]]:
    """Losses and gradient norms of a run of ``steps`` steps."""
    world = data * sequence
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command += ["launch/train.py", "configs/quickstart.yaml", "train.precision=fp32", f"train.steps={steps}"]
    command += [f"parallel.data={data}", f"parallel.sequence={sequence}", f"deepspeed.zero_stage={stage}"]
    command += [f"train.output_dir={folder}", "train.validate_every=0", "train.sample_tokens=0"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}


def difference(metrics: dict[str, list[float]], base: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference over all steps, of each series."""
    return {
        key: max(abs(a - b) / abs(b) for a, b in zip(metrics[key], base[key], strict=True))
        for key in ("loss", "grad_norm")
    }


if __name__ == "__main__":
    main()
