"""Rate of ``longnet prepare`` with a byte-level BPE by the number of worker processes, MB of text a second.

    python benchmarks/preparation.py [--workers 1 2] [--rounds 3] [--vocab-size 16384] [--megabytes 100]

The text is the source of Python's standard library with its tests, again and again until it has the size asked for; the
tokenizer is trained on it. The numbers of workers take turns, so that a drift of the machine hits all, and the load
average before each run is recorded: others on the machine slow the workers. So the processor time of this process and
of the workers is recorded too. What bounds the rate on an idle machine is the busiest process: this one, or a worker.
Every run must write the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run as a file, too

from benchmarks.record import environment, output_file
from longnet_dist.data.corpus import find_corpus
from longnet_dist.data.encoding.training import train_tokenizer
from longnet_dist.data.prepare import prepare
from longnet_dist.machine import usable_cores


def main(arguments: list[str] | None = None) -> None:
    """Measure as the command line says."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text"
        write_text(text, options.megabytes * 1_000_000)
        corpus = find_corpus([text])
        start = time.perf_counter()
        tokenizer = train_tokenizer(corpus, options.vocab_size)
        training_seconds = time.perf_counter() - start
        runs: dict[int, list[dict[str, float]]] = {number: [] for number in options.workers}
        digests = set()
        for _ in range(options.rounds):
            for number in options.workers:
                load = os.getloadavg()[0]
                start, cpu = time.perf_counter(), os.times()
                prepared = prepare(find_corpus([text]), folder / "o", tokenizer, num_workers=number, overwrite=True)
                seconds = time.perf_counter() - start
                spent = [after - before for after, before in zip(os.times(), cpu, strict=True)]
                runs[number].append(
                    {
                        "seconds": seconds,
                        "megabytes_per_second": prepared.header.num_bytes / 1e6 / seconds,
                        "load_average_before": load,
                        "cpu_seconds": spent[0] + spent[1],
                        "cpu_seconds_of_workers": spent[2] + spent[3],
                    }
                )
                digests.add(hashlib.sha256(prepared.path.read_bytes()).hexdigest())
        assert len(digests) == 1, "the file must not depend on the number of workers"
    rates = {n: statistics.median(run["megabytes_per_second"] for run in found) for n, found in runs.items()}
    bounds = {
        n: statistics.median(prepared.header.num_bytes / 1e6 / _busiest(run, n) for run in found)
        for n, found in runs.items()
    }
    result: dict[str, Any] = {
        "command": "python benchmarks/preparation.py",
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "cores": usable_cores(),
        "text_bytes": prepared.header.num_bytes,
        "tokens": prepared.header.num_tokens,
        "training_seconds": training_seconds,
        "runs": runs,
        "median_megabytes_per_second": rates,
        "speedup": {n: rate / rates[options.workers[0]] for n, rate in rates.items()},
        "megabytes_per_cpu_second_of_the_busiest_process": bounds,
        "speedup_by_cpu_seconds": {n: bound / bounds[options.workers[0]] for n, bound in bounds.items()},
        "environment": environment(),
    }
    shown = ("median_megabytes_per_second", "speedup", "speedup_by_cpu_seconds")
    print(json.dumps({name: result[name] for name in shown}))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _busiest(run: dict[str, float], num_workers: int) -> float:
    """Return the processor time of the busiest process of a run, seconds."""
    return max(run["cpu_seconds"], run["cpu_seconds_of_workers"] / num_workers)


def write_text(path: Path, num_bytes: int) -> None:
    """Write the standard library's source, repeated up to ``num_bytes``."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = [source.read_bytes() for source in sources if "site-packages" not in source.parts]
    whole = b"".join(texts)
    with path.open("wb") as file:
        while file.tell() < num_bytes:
            file.write(whole[: num_bytes - file.tell()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--output", type=output_file)
    return parser


if __name__ == "__main__":
    main()
