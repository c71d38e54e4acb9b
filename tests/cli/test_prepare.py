"""The program, as a user calls it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from longnet_dist.data.token_file import TokenFile
from tests.data.tiny_tokenizer import write_tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = b"To be, or not to be\n" * 5000


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "longnet_dist", "prepare", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_archive_to_token_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("text", TEXT)
    done = run(tmp_path, "text.zip", "--output", "text.tokens")
    assert done.returncode == 0, done.stderr
    assert "100,000 tokens (95,000 train, 5,000 validation)" in done.stdout
    assert "prepare text.tokens: 100%" in done.stderr
    file = TokenFile.open(tmp_path / "text.tokens", verify=True)
    assert file.tokens.tobytes() == TEXT
    assert file.split("validation") == (95_000, 100_000)


def test_tokenizer_and_share(tmp_path: Path) -> None:
    tokenizer = write_tiny_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "text").write_bytes(TEXT)
    done = run(tmp_path, "text", "--output", "t.tokens", "--tokenizer", str(tokenizer), "--validation", "0.5")
    assert done.returncode == 0, done.stderr
    file = TokenFile.open(tmp_path / "t.tokens", verify=True)
    assert file.tokenizer.decode(file.tokens) == TEXT
    assert abs(file.split("train")[1] * 2 - len(file.tokens)) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt", "--output", "o"], "no file, folder or match"),
        (["text", "--output", "text"], "one of the inputs"),
        (["text", "--output", "kept"], "not overwritten"),
        (["text", "--output", "kept", "--overwrite", "--train-tokenizer", "0"], "must be above 257"),
        (["text", "--output", "o", "--tokenizer", "words"], "tokenizer"),
        (["text", "--output", "o", "--validation", "1"], "share"),
        (["bad.zip", "--output", "o"], "cannot be read"),
        (["--output", "o"], "--standard-library"),
        (["text", "--standard-library", "--output", "o"], "--standard-library"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "bad.zip").write_bytes(b"PK")
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    last = done.stderr.rstrip().rsplit("\n", 1)[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.zip", "kept", "text"]
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_help_has_examples(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "longnet prepare enwik8.zip --output enwik8.tokens" in done.stdout


def test_a_tokenizer_is_trained_on_standard_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "to be or not to be"}\n' * 300)
    options = ["--train-tokenizer", "270", "--text-column", "body", "--shuffle", "1", "--workers", "2", "--verify"]
    done = run(tmp_path, "a.jsonl", "--output", "a.tokens", *options)
    assert done.returncode == 0, done.stderr
    assert "a.tokens: 300 documents" in done.stdout
    file = TokenFile.open(tmp_path / "a.tokens", verify=True)
    assert file.header.edges is not None
    assert file.header.edges.count == 301
    assert file.tokenizer.name == "bpe-270"


def test_standard_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longnet_dist", "prepare", "-", "--output", "a.tokens", "--format", "jsonl"]
    environment = {"PYTHONPATH": str(ROOT)}
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    done = subprocess.run(command, cwd=tmp_path, input=lines, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert TokenFile.open(tmp_path / "a.tokens").tokens.tobytes() == b"one\0two"


def test_a_stop_signal_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longnet_dist", "prepare", "-", "--output", "a.tokens"]
    environment = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as run:
        while not list(tmp_path.iterdir()):
            time.sleep(0.02)
        time.sleep(0.2)
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
