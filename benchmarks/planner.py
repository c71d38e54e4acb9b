"""Planned against measured: peak memory and step time of real training steps on one device.

    python benchmarks/planner.py [--output benchmarks/results/planner_h100.json] [--seconds 540]
    python benchmarks/planner.py --training benchmarks/results/training_h100.json --output planner_training_h100.json

Each configuration runs in a process of its own: some optimizer steps of the trainer, as ``launch/train.py`` does them,
on random bytes. The constants of ``longnet_dist/estimate/devices.py`` are fitted to those marked ``fit`` alone; what
the run suggests for them is printed and written beside the result. Every configuration is written when it is done: a
run that was cut, or whose ``--seconds`` were over, goes on with the same ``--output``. ``--again`` plans what was
measured with the present constants, on any machine; ``--training`` those steps that ``benchmarks/training.py``
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from longnet_dist.config.schema import Config
    from longnet_dist.estimate.devices import Device

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

STEPS = 5  # the first of them compiles and is left out
COMPUTED = ("matmul", "attention", "row-wise")  # parts of a step that have a constant


@dataclass(frozen=True)
class Case:
    """A configuration.

    Attributes:
        name: in the table.
        fit: whether constants may be fitted to it.
        settings: ``section.key=value`` words.
    """

    name: str
    fit: bool
    settings: tuple[str, ...]


def case(name: str, model: str, rows: int, *settings: str, fit: bool = False) -> Case:
    """A case of a named model and one sequence a step, which may be replaced."""
    words = (f"model.name={model}", f"data.sequence_length={rows}", "train.batch_size=1", *settings)
    return Case(name, fit, tuple(f"{key}={value}" for key, value in dict(word.split("=", 1) for word in words).items()))


KEEP = "train.activation_checkpointing="
TILE = "train.feed_forward_tile=65536"
GPU_CASES = (
    case("paper 128K, all kept", "paper", 2**17, fit=True),
    case("paper 256K, selective", "paper", 2**18, KEEP + "selective", fit=True),
    case("1.3b 64K, selective", "1.3b", 2**16, KEEP + "selective", "train.feed_forward_tile=16384", fit=True),
    case("paper 512K, full", "paper", 2**19, KEEP + "full", TILE, fit=True),
    case("paper 1M, selective", "paper", 2**20, KEEP + "selective", TILE),
    case("paper 1M, selective, offloaded", "paper", 2**20, KEEP + "selective", TILE, "train.offload_activations=true"),
    case("paper 32K × 8, all kept", "paper", 2**15, "train.batch_size=8", "train.micro_batch_size=2"),
    case("350m 128K, selective", "350m", 2**17, KEEP + "selective"),
    case("760m 256K, full", "760m", 2**18, KEEP + "full", TILE),
    case("1.3b 128K, selective, ZeRO 2", "1.3b", 2**17, KEEP + "selective", TILE, "deepspeed.zero_stage=2"),
    case("paper 1M in chunks of 256K", "paper", 2**20, "train.chunk_length=262144", KEEP + "selective", TILE),
    case("paper 256K, 100,277 ids", "paper", 2**18, "model.vocab_size=100277", KEEP + "selective", TILE),
)
CPU_CASES = (
    case("tiny 1K", "tiny", 2**10, fit=True),
    case("tiny 4K, selective", "tiny", 2**12, KEEP + "selective", fit=True),
    case("tiny 2K, full", "tiny", 2**11, KEEP + "full"),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    cases = {each.name: each for each in (CPU_CASES if options.cpu else GPU_CASES)}
    if options.one is not None:
        options.output.write_text(json.dumps(measure(cases[options.one])))
        return
    if options.training is not None:
        results, measured_in = of_training(options.training)
        _write(options, results, measured_in)
        print(markdown(results))
        return
    from benchmarks.record import environment

    before = json.loads(options.output.read_text())["cases"] if options.output.exists() else []
    done = [result for result in before if "error" not in result]
    if options.again:
        commit = environment()["commit"]
        for result in done:
            result |= {"planned": plan_again(result), "planned_by": commit}
        _write(options, done, json.loads(options.output.read_text())["environment"])
        return
    began = time.monotonic()
    for each in cases.values():
        if each.name in {result["name"] for result in done} or time.monotonic() - began > options.seconds:
            continue
        print(each.name, flush=True)
        done.append(asdict(each) | _in_a_process(each, options.cpu))
        _write(options, done, environment())
    print(markdown(done) + "\nsuggested for planner/devices.py: " + json.dumps(suggest(done)))
    if missing := [name for name in cases if name not in {result["name"] for result in done}]:
        print(f"not measured yet, run again: {', '.join(missing)}")


def _write(options: argparse.Namespace, done: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    training = f" --training {options.training.name}" if options.training else ""
    command = f"python benchmarks/planner.py{' --cpu' * options.cpu}{training} --output {options.output.name}"
    result = {"command": command, "environment": environment, "cases": done, "suggested": suggest(done)}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(done))


def of_training(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measured steps of ``benchmarks/training.py`` as results with plans, and where the last of them were measured.

    Without dense attention, which the planner does not know, and steps so short that only the host's part counts.
    """
    from benchmarks.record import environment
    from benchmarks.trials import Trial
    from longnet_dist.estimate.devices import match_device

    content = json.loads(file.read_text())
    measured_in = content["runs"][-1]["environment"]
    device = match_device(measured_in["gpu"])
    if device is None:
        raise SystemExit(f"{file}: there is no {measured_in['gpu']!r} in longnet_dist/estimate/devices.py to plan for")
    results, commit = [], environment()["commit"]
    for point in content["points"]:
        if "error" in point or point["dense"] or point["part"] == "curves":
            continue
        trial = Trial(point["name"], point["rows"], "", tuple(point["settings"]))
        measured = {f"peak_memory_{kind}": point[f"peak_{kind}_bytes"] for kind in ("allocated", "reserved")}
        result = asdict(Case(f"{point['part']}: {trial.name}, {trial.rows:,} tokens", False, trial.settings))
        result |= {"planned": _plan(trial.config(), device), "planned_by": commit}
        results.append(result | {"seconds": [point["seconds"][0], point["median_seconds"]], "measured": measured})
    return results, measured_in


def plan_again(result: dict[str, Any]) -> dict[str, Any]:
    """The plan of a measured case, for the device that it was measured on and a host that is large enough."""
    from longnet_dist.estimate.devices import named_device

    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), result["settings"])
    device = named_device(result["planned"]["device"]["name"])
    return _plan(config, replace(device, memory_bytes=result["planned"]["device"]["memory_bytes"]))


def _plan(config: Config, device: Device) -> dict[str, Any]:
    from longnet_dist.estimate.layout import RunLayout
    from longnet_dist.estimate.run_estimate import Estimate

    return Estimate.of(RunLayout.of(config, 1, device.type), device).to_json()


def measure(each: Case) -> dict[str, Any]:
    """Steps of one configuration in this process, and its plan."""
    import torch

    from longnet_dist.attention.kernels.planning import planned_device
    from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
    from longnet_dist.estimate.run_estimate import Estimate
    from longnet_dist.machine import host_memory_bytes
    from longnet_dist.telemetry.throughput import Throughput
    from longnet_dist.train.allocator import prepare_allocator
    from longnet_dist.train.deepspeed_engine import prepare_deepspeed
    from longnet_dist.train.loop import Trainer
    from longnet_dist.train.setup import RunSetup

    prepare_allocator(os.environ)
    launch = LaunchEnvironment.read(os.environ)
    device = launch.device()
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), [*each.settings, f"data.path={_random_tokens(Path(folder), each)}"])
        layout = RunSetup.make(config, 1, device.type)
        planned = Estimate.of(layout, planned_device(device, layout), 1, host_memory_bytes()).to_json()
        launch.share_cores()
        prepare_deepspeed(launch, device)
        seconds = []
        with process_group(launch, device, timedelta(minutes=10)):
            trainer = Trainer(layout, device)
            for step in range(STEPS):
                start = time.perf_counter()
                trainer._train_step(step, 1e-4)  # reads the loss, and so waits for the device
                seconds.append(time.perf_counter() - start)
        speed = Throughput(layout, device).step(statistics.median(seconds[1:]))
    outside = 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
    return {"planned": planned, "seconds": seconds, "measured": speed._asdict(), "outside_of_torch_bytes": outside}


def _config(folder: Path, settings: Sequence[str]) -> Config:
    from longnet_dist.config.loading import load_config

    file = folder / "config.yaml"
    file.write_text(f"train: {{output_dir: {folder}/run, steps: {STEPS}, validate_every: 0}}\n")
    return load_config(file, list(settings))


def _random_tokens(folder: Path, each: Case) -> Path:
    """Bytes for all steps."""
    from longnet_dist.data.token_file_writer import TokenFileWriter
    from longnet_dist.data.tokenizers import ByteTokenizer

    values = dict(word.split("=", 1) for word in each.settings)
    number = int(values["data.sequence_length"]) * int(values["train.batch_size"]) + 1
    text = np.random.default_rng(0).integers(32, 127, size=2 * number, dtype=np.uint8).tobytes()
    with TokenFileWriter(folder / "random.tokens", ByteTokenizer(), validation=0.1) as writer:
        writer.add_document([text])
    return folder / "random.tokens"


def _in_a_process(each: Case, cpu: bool) -> dict[str, Any]:
    """Measure in a new process, whose memory is its own; an error becomes part of the result."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "one.json"
        command = [sys.executable, __file__, "--one", each.name, "--output", str(output), *["--cpu"] * cpu]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            print(ended.stderr[-2000:], file=sys.stderr)
            return {"error": ended.stderr.strip().splitlines()[-1:]}
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def suggest(done: list[dict[str, Any]]) -> dict[str, float]:
    """Factors for the shares in ``planner.devices.Rates``, and memory outside of tensors, from the ``fit`` cases.

    The seconds of each computed part are multiplied by a factor; least squares of relative errors gives it, with a
    weight of a fifth on leaving it 1, so that few cases do not decide wildly.
    """
    fitted = [result for result in done if result["fit"] and "planned" in result]
    if not fitted:
        return {}
    rows, wanted = [], []
    for result in fitted:
        parts, measured = result["planned"]["step_parts"], statistics.median(result["seconds"][1:])
        rows.append([parts[name] / measured for name in COMPUTED])
        wanted.append((measured - sum(parts[name] for name in parts if name not in COMPUTED)) / measured)
    rows += (0.2 * np.eye(len(COMPUTED))).tolist()
    wanted += [0.2] * len(COMPUTED)
    factors = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    suggested = {f"divide the rate of {name} by": round(float(f), 3) for name, f in zip(COMPUTED, factors, strict=True)}
    memory = [result["measured"] for result in fitted if result["measured"]["peak_memory_reserved"]]
    if memory:
        shares = [m["peak_memory_reserved"] / m["peak_memory_allocated"] - 1 for m in memory]
        suggested["fragmentation"] = round(statistics.median(shares), 3)
        suggested["context_bytes"] = statistics.median(result["outside_of_torch_bytes"] for result in fitted)
    return suggested


def markdown(done: list[dict[str, Any]]) -> str:
    """The table of all cases."""
    lines = [
        "| configuration | used to fit | peak GiB: planned | measured | error | step s: planned | measured | error |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for result in done:
        if "error" in result:
            lines.append(f"| {result['name']} | | | {result['error']} | | | | |")
            continue
        planned, measured = result["planned"], result["measured"]
        memory = planned["peak_gpu_bytes"] or planned["peak_host_bytes"]
        pairs = (
            (memory / 2**30, measured["peak_memory_allocated"] / 2**30),
            (
                planned["step_seconds"],
                statistics.median(result["seconds"][1:]),
            ),
        )
        cells = " | ".join(f"{a:.3f} | {b:.3f} | {a / b - 1:+.1%}" for a, b in pairs if a is not None)
        lines.append(f"| {result['name']} | {'yes' if result['fit'] else ''} | {cells} |")
    return "\n".join(lines) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/planner_h100.json"))
    parser.add_argument("--seconds", type=float, default=540.0, help="no configuration begins later (default 540)")
    parser.add_argument("--cpu", action="store_true", help="tiny configurations on the CPU")
    parser.add_argument("--again", action="store_true", help="only plan again what was measured")
    parser.add_argument("--training", type=Path, metavar="FILE", help="only plan what benchmarks/training.py measured")
    parser.add_argument("--one", metavar="NAME", help="measure this configuration in this process")
    return parser


if __name__ == "__main__":
    main()
