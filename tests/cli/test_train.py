"""``longnet train``, as a user calls it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest

from longnet_dist.checkpoint.format import checkpoints
from longnet_dist.cli.program import ranks
from longnet_dist.cli.train import main
from longnet_dist.config.keys import keys
from longnet_dist.config.loading import load_config
from longnet_dist.errors import ConfigError
from tests.train.runs import run, tiny_config, write_config

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")


def start(*words, cwd):
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    # -P: as the command of an installed package, which imports nothing from the current folder.
    command = [sys.executable, "-P", "-m", "longnet_dist", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def longnet(*words, cwd):
    with start(*words, cwd=cwd) as process:
        out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, corpus):
    expected = [line["loss"] for line in run(1, tiny_config(tmp_path / "alone", corpus))]
    here = tmp_path / "here"
    here.mkdir()
    (here / "yaml.py").write_text("raise SystemExit('a module of the current folder was imported')")
    write_config(here, "run", corpus)
    done = longnet("train", "run.yaml", "--processes", "2", "parallel.sequence=2", cwd=here)
    assert done.returncode == 0, done.stderr
    assert losses(here / "run") == pytest.approx(expected, rel=1e-5)
    assert "Warning" not in done.stderr
    assert "OMP_NUM_THREADS" not in done.stderr


@pytest.mark.slow
def test_a_request_to_stop_ends_with_75_and_the_same_command_goes_on(tmp_path, corpus):
    config = write_config(tmp_path, "run", corpus)
    words = ("train", config, "--processes", "2", "train.checkpoint_async=false")
    with start(*words, "train.steps=100000", cwd=tmp_path) as process:
        try:
            wait_for(tmp_path / "run" / "metrics.jsonl", process)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    (checkpoint,) = checkpoints(tmp_path / "run")
    step = int(checkpoint.name.removeprefix("step_"))
    done = longnet(*words, f"train.steps={step + 1}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == step + 1


@pytest.mark.parametrize("word", ["-", "/dev/stdin", "fifo"])
def test_a_configuration_from_a_pipe_is_read_once_for_all_ranks(tmp_path, corpus, word, monkeypatch):
    text, reading = write_config(tmp_path, "run", corpus).read_text(), tmp_path / "fifo"
    seen = []

    def ranks_read(processes, work, check):
        for _ in range(3):
            (file,) = [part for part in processes.command if part.endswith(".yaml")]
            assert load_config(Path(file), processes.command[2:]).train.steps == 7
            seen.append(Path(file))

    monkeypatch.setattr(ranks, "run_on_ranks", ranks_read)
    os.mkfifo(reading)
    writer = threading.Thread(target=reading.write_text, args=(text,))
    writer.start()
    if word == "fifo":
        main([str(reading), "train.steps=7"])
    else:
        with reading.open() as pipe:
            writer.join()  # nobody writes any more
            kept = os.dup(0)
            os.dup2(pipe.fileno(), 0)
            try:
                main([word, "train.steps=7"])
            finally:
                os.dup2(kept, 0)
                os.close(kept)
    writer.join()
    assert len(seen) == 3
    assert not seen[0].exists()


def wait_for(file, process):
    deadline = time.monotonic() + 240
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart", "train.stepz=3"], "error: there is no key train.stepz; the nearest is train.steps\n"),
        (
            ["quickstrat"],
            "error: there is no configuration 'quickstrat': give a YAML file or one of paper, quickstart; ",
        ),
        (["none.yaml"], "error: cannot read the configuration none.yaml"),
        (
            [],
            "error: a configuration must come first: longnet train CONFIG [key=value ...], where CONFIG is a YAML file",
        ),
        (["train.steps=3"], "error: a configuration must come first"),
        (
            ["quickstart", "--processes", "2", "parallel.sequence=3"],
            "error: data × sequence ranks must make up the world, but",
        ),
    ],
)
def test_mistakes_end_with_one_message_and_status_2(tmp_path, words, message):
    done = longnet("train", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_packaged_configurations_are_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "the name of a packaged configuration: paper, quickstart." in text
    assert "longnet train --keys" in text


def test_every_key_has_a_line(capsys):
    main(["--keys"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [key.name for key in keys()]
    (line,) = [line for line in lines if line.startswith("train.warmup_steps ")]
    assert line.split(maxsplit=2)[1:] == ["750", "steps of linear warm-up"]


def test_options_may_stand_between_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"nearest is train\.steps"):
        main(["quickstart", "train.seed=1", "--processes", "2", "train.stepz=3"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            ["run.yaml"],
            ["run.yaml", "train.schedule=wds"],
            "rank 1 on host * cannot start: train: train.schedule must",
        ),
        (["gone.yaml"], ["run.yaml"], "rank 0 on host * cannot start: cannot read the configuration gone.yaml"),
        (["run.yaml", "a=b"], ["run.yaml", "a=b"], "there is no key a"),
        (["run.yaml"], ["run.yaml", "--verify"], "rank 1 on host * cannot start: the edges of documents of *"),
    ],
)
def test_a_mistake_of_one_rank_ends_all_where_no_launcher_does(tmp_path, corpus, monkeypatch, first, second, message):
    """As under srun, which lets the other ranks go on."""
    data = tmp_path / "damaged.tokens"
    content = bytearray(corpus.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    write_config(tmp_path, "run", data)
    monkeypatch.setattr(sys.modules[__name__], "LAUNCHERS", ("OMP_NUM_THREADS",))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, words in enumerate((first, second)):
        # Each as on a machine of its own, so that the second one verifies.
        numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        for name, value in numbers.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        ranks.append(start("train", *words, cwd=tmp_path))
    for process in ranks:
        with process:
            _, err = process.communicate(timeout=100)
        assert process.returncode == 2, err
        assert fnmatch(err.splitlines()[-1], f"error: {message}*")
        assert "Traceback" not in err
