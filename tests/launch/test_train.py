import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import write_config, write_corpus

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


@pytest.fixture
def config(tmp_path):
    data = write_corpus(tmp_path / "source.tokens")
    return write_config(tmp_path, "run", data)


def launch(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_process_and_torchrun_give_the_same_losses(config, tmp_path):
    alone = launch(TRAIN, str(config), cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert "Warning" not in alone.stderr
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    both = launch(*torchrun, TRAIN, str(config), f"train.output_dir={tmp_path / 'both'}", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)
    more = launch(TRAIN, "--resume", str(config), "train.steps=5", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert len(losses(tmp_path / "run")) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stepz=3"], "error: there is no key train.stepz; the nearest is train.steps\n"),
        (["parallel.sequence=2"], "error: data × sequence ranks must make up the world"),
        (["model.dilation_rates=[1,2]"], "error: model: every branch needs one segment length and one dilation rate"),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(config, tmp_path, words, message):
    result = launch(TRAIN, str(config), *words, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
