"""Training runs of ``launch/train.py`` that a benchmark compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUIET = ("train.validate_every=0", "train.sample_tokens=0", "train.checkpoint_every=0", "train.resume=never")


def import_paths(*first: Path) -> str:
    """PYTHONPATH for a process of a benchmark: some folders, this checkout where nothing is installed, what is set."""
    return os.pathsep.join(filter(None, [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH")]))


def metrics_of_run(config: str, folder: Path, ranks: int, settings: list[str], device: str) -> list[dict[str, Any]]:
    """The metrics of every step of a run on ``ranks`` ranks of this machine, ``"cuda"`` or ``"cpu"`` ones.

    Args:
        config: file of the configuration.
        folder: of the run; must not hold one.
        settings: ``key=value``, over the configuration's and those of QUIET.

    Raises:
        RuntimeError: the run failed; with what it said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    given = {word.partition("=")[0] for word in settings}
    quiet = [word for word in QUIET if word.partition("=")[0] not in given]
    command += [str(ROOT / "launch/train.py"), config, f"train.output_dir={folder}", *quiet, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": import_paths()}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-6000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
