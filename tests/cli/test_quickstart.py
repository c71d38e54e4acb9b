"""``longnet quickstart``, as a user calls it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from longnet_dist.cli.evaluate import main as evaluate
from longnet_dist.cli.export import main as export
from longnet_dist.cli.generate import main as generate
from longnet_dist.config.loading import load_config
from longnet_dist.config.packaged import find_config
from tests.train.runs import write_corpus

ROOT = Path(__file__).parents[2]
SMALL = ["model.dim=32", "model.layers=1", "data.sequence_length=64", "model.segment_lengths=[16,32]"]
SMALL += ["model.dilation_rates=[1,2]", "train.steps=2", "train.validation_tokens=64", "train.sample_tokens=3"]


@pytest.mark.slow
def test_what_it_says_at_the_end_works(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path / "my source.tokens")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    words = ["-P", "-m", "longnet_dist", "quickstart", *SMALL, "data.path=my source.tokens"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ranks = load_config(tmp_path / "runs" / "quickstart" / "config.yaml").parallel
    assert (ranks.data, ranks.sequence) == (1, 2)
    looks = done.stdout.partition("look at\n")[2].partition("next\n")[0]
    _, commands = done.stdout.split("next\n")
    for name in ("loss.png", "sample.txt", "metrics.jsonl"):
        line = next(line for line in looks.splitlines() if f"/{name} " in line)
        assert (tmp_path / line.split()[0]).is_file()
    monkeypatch.chdir(tmp_path)
    typed = {words[1]: words[2:] for words in map(shlex.split, commands.splitlines()) if words}
    evaluate([*typed["evaluate"], "--tokens", "64"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["context", "16", "64"]
    generate([*typed["generate"], "--tokens", "3"])
    assert capsys.readouterr().out.startswith("def ")
    export(typed["export"])
    assert (tmp_path / "runs" / "quickstart-exported" / "model.safetensors").is_file()
    assert "prepare" in typed


def test_it_is_small_and_writes_below_the_current_folder():
    config = load_config(find_config("quickstart"))
    assert not config.train.output_dir.is_absolute()
    assert not config.data.cache_dir.is_absolute()
    assert config.data.path is None
