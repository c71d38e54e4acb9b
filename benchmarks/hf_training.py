"""A Hugging Face model trains dilated, through ``longnet train model.path=…``, beside itself with sdpa.

    python benchmarks/hf_training.py --output benchmarks/results/hf_training.json
    python benchmarks/hf_training.py --shape tiny --rows 512 --device cpu --output hf_training.json

The model has the shape of Qwen3-0.6B and random weights. First some steps of ``longnet train`` over one sequence of
``--rows`` tokens are timed. Then the same model trains with transformers' sdpa, with every block recomputed, the loss
in chunks and fused AdamW. Its lengths double from ``--first`` up to ``--rows``, as long as memory and ``--seconds``
suffice: the longest is the one to compare. Every measurement is a process of its own. MFU counts model FLOPs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from benchmarks.runs import import_paths
from longnet_dist import DilatedPattern
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.estimate.devices import device_of
from longnet_dist.estimate.model_cost import flops_per_token, num_parameters
from longnet_dist.telemetry.json_lines import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
START_SECONDS = 20.0  # of a process, until its first step
OUT_OF_MEMORY = 3  # exit status


def main() -> None:
    options = parser().parse_args()
    if options.part == "sdpa":
        print(json.dumps(measure_sdpa(options.model, options.rows, options.device)))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model, data = write_model(Path(folder), options.shape), write_tokens(Path(folder), options.rows)
        result: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/hf_training.py", *sys.argv[1:]]),
            "environment": environment(),
            "shape": options.shape,
            "parameters": num_parameters(config_of(model, options.rows, dense=False)),
            "dilated": measure_dilated(model, data, options),
            "sdpa": [],
        }
        save(result, options.output)
        rows = min(options.first, options.rows)
        while rows <= options.rows:
            point = run_sdpa(model, rows, options, options.seconds - (time.monotonic() - began))
            result["sdpa"].append(point)
            result["seconds"] = time.monotonic() - began
            save(result, options.output)
            # Attention takes most of a long step, and four times as long at twice the length.
            needed = START_SECONDS + 4 * point.get("step_seconds", 0.0) + point.get("step_seconds", 0.0)
            if "failure" in point or needed > options.seconds - (time.monotonic() - began):
                break
            rows *= 2
    print(json.dumps(result, indent=2))


def write_model(folder: Path, shape: str) -> Path:
    """A folder with a config.json alone, so that weights are drawn from the seed."""
    place = folder / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "qwen3", **SHAPES[shape]}))
    return place


def write_tokens(folder: Path, rows: int) -> Path:
    """A token file of random bytes; what they are does not change the time."""
    file = folder / "random.tokens"
    with TokenFileWriter(file, ByteTokenizer(), validation=0.0) as writer:
        writer.add_document([os.urandom(2 * rows)])
    return file


def config_of(model: Path, rows: int, dense: bool) -> HuggingFaceConfig:
    """The model with the pattern of the dilated run, or with one segment of all rows."""
    found = DilatedPattern((rows,), (1,)) if dense else pattern_of(rows)
    fields: dict[str, Any] = {"segment_lengths": found.segment_lengths, "dilation_rates": found.dilation_rates}
    return HuggingFaceConfig(**fields | {"path": model})


def pattern_of(rows: int) -> DilatedPattern:
    """LongNet's pattern up to a segment of all rows."""
    return DilatedPattern.geometric(base=min(2048, rows), longest=rows)


def measure_dilated(model: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of ``longnet train``, the median of all steps but the first two."""
    pattern, run = pattern_of(options.rows), data.parent / "run"
    words = [
        f"model.path={model}", f"model.segment_lengths={list(pattern.segment_lengths)}",
        f"model.dilation_rates={list(pattern.dilation_rates)}", f"data.path={data}",
        f"data.sequence_length={options.rows}", f"train.output_dir={run}", f"train.steps={options.steps + 2}",
        "train.batch_size=1", "train.warmup_steps=1", "train.activation_checkpointing=full",
        "train.checkpoint_every=0", "train.validate_every=0", "train.sample_tokens=0", *options.settings,
    ]  # fmt: skip
    command = [sys.executable, "-m", "longnet_dist", "train", *words]
    environ = os.environ | {"PYTHONPATH": import_paths()}
    if options.device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([*command, "--processes", "1"], env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"longnet train failed:\n{done.stderr[-4000:]}")
    steps = read_jsonl(run / "metrics.jsonl")[2:]
    seconds = statistics.median(step["step_seconds"] for step in steps)
    return {
        "rows": options.rows,
        "settings": words[6:],
        "pattern": {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates},
        "step_seconds": seconds,
        "tokens_per_second": options.rows / seconds,
        "mfu": steps[-1].get("mfu"),
        "peak_bytes": steps[-1].get("peak_memory_allocated"),
        "loss": steps[-1]["loss"],
    }


def run_sdpa(model: Path, rows: int, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a process of :func:`measure_sdpa` prints, or why it did not."""
    words = ["--part", "sdpa", "--model", str(model), "--rows", str(rows), "--device", options.device]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return {"rows": rows, "failure": "no time left"}
    if done.returncode:
        reason = "out of memory" if done.returncode == OUT_OF_MEMORY else done.stderr[-2000:]
        return {"rows": rows, "failure": reason}
    point: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return point


def measure_sdpa(folder: Path, rows: int, device_name: str) -> dict[str, Any]:
    """One timed step of the model with sdpa, after a step on few rows that loads all kernels."""
    import torch
    from transformers import AutoModelForCausalLM

    from longnet_dist.hf.parallel.head_loss import head_loss

    device = torch.device(device_name)
    fields = config_of(folder, rows, dense=True).fresh_transformers()
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(fields, dtype=torch.float32, attn_implementation="sdpa").train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(length: int) -> float:
        tokens = torch.randint(256, (1, length + 1), device=device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            states = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            loss = head_loss(model.get_output_embeddings(), states, tokens[:, 1:]) / length
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    try:
        step(min(rows, 4096))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = step(rows)
    except torch.OutOfMemoryError:
        raise SystemExit(OUT_OF_MEMORY) from None
    flops = flops_per_token(config_of(folder, rows, dense=True), rows)
    peak = device_of(device).peak_tflops
    return {
        "rows": rows,
        "step_seconds": seconds,
        "tokens_per_second": rows / seconds,
        "mfu": None if peak is None else flops * rows / seconds / (1e12 * peak),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def save(result: dict[str, Any], output: Path) -> None:
    """Write what is known so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    result.add_argument("--rows", type=int, default=262144, help="tokens of a sequence (default %(default)s)")
    result.add_argument("--steps", type=int, default=4, help="timed steps of longnet train (default %(default)s)")
    result.add_argument("--first", type=int, default=32768, help="first length of sdpa (default %(default)s)")
    result.add_argument("--seconds", type=float, default=145.0, help="for all of it (default %(default)s)")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    result.add_argument("--settings", nargs="*", default=[], metavar="key=value", help="of longnet train, in addition")
    result.add_argument("--output", type=output_file, default=ROOT / "benchmarks" / "results" / "hf_training.json")
    result.add_argument("--part", choices=("all", "sdpa"), default="all", help=argparse.SUPPRESS)
    result.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return result


if __name__ == "__main__":
    main()
