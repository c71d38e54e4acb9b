"""Worker processes write the file that one process writes, whatever the format; training a tokenizer is repeatable."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from longnet_dist.data.corpus import find_corpus
from longnet_dist.data.encoding import workers as workers_module
from longnet_dist.data.encoding.pieces import Batch
from longnet_dist.data.encoding.training import train_tokenizer
from longnet_dist.data.encoding.workers import Workers
from longnet_dist.data.prepare import prepare
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.tokenizers import PIECE_BYTES, load_tokenizer
from longnet_dist.errors import DataError
from tests.cli.test_prepare import ROOT

WORDS = ["def ", "return ", "größe ", "\n", "😀", "0123456789 ", "x" * 300, "\xff"]


def documents() -> list[str]:
    """Return many short texts, an empty one, and one of several pieces."""
    random = np.random.default_rng(0)
    lengths = [*random.geometric(1 / 40, 700).tolist(), 0, 20_000, 1]
    return ["".join(random.choice(WORDS, length)) for length in lengths]


def write_inputs(folder: Path) -> None:
    """Write the same texts as files, an archive, JSON lines, Parquet and FASTA."""
    pyarrow, table_file = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    found = documents()
    (folder / "files").mkdir()
    with tarfile.open(folder / "texts.tar.gz", "w:gz") as archive:
        for number, text in enumerate(found):
            data = text.encode("latin-1", errors="replace") if number % 50 == 0 else text.encode()  # some not UTF-8
            (folder / "files" / f"{number:04}").write_bytes(data)
            member = tarfile.TarInfo(f"{number:04}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    table_file.write_table(pyarrow.table({"text": found}), folder / "a.parquet")
    (folder / "a.fa").write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(found)))


def test_the_file_is_that_of_one_process(tmp_path: Path, tokenizer_json: Path) -> None:
    write_inputs(tmp_path)
    tokenizer = load_tokenizer(str(tokenizer_json))
    inputs = ["files", "texts.tar.gz", "a.jsonl", "a.parquet", "a.fa"]
    sizes = []
    for name in inputs:
        written = []
        for number in (1, 3):
            output = tmp_path / "out" / f"{number}.tokens"
            prepare(find_corpus([tmp_path / name]), output, tokenizer, num_workers=number, overwrite=True)
            written.append(output.read_bytes())
        assert written[0] == written[1], name
        header = TokenFile.open(output, verify=True).header
        sizes.append((header.num_documents, header.num_bytes))
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3]
    assert len({documents for documents, _ in sizes[:4]}) == 1


def test_order_and_memory_are_bounded(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    workers = Workers(tokenizer, "<u2", 2)
    try:
        most, order = 0, []
        for number in range(40):
            piece = b"word " * (1 + 997 * number % 3000)
            order += [batch.pieces for batch, _ in workers.put(Batch([piece], [True], [False]))]
            most = max(most, len(workers._pending))
        order += [batch.pieces for batch, _ in workers.finish()]
    finally:
        workers.close()
    assert most <= 4
    assert order == [[b"word " * (1 + 997 * number % 3000)] for number in range(40)]


def test_a_killed_worker_ends_with_a_message_and_no_file(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_bytes(b"some words\n" * PIECE_BYTES)
    send = workers_module._send

    def kill(process: subprocess.Popen[bytes], message: object) -> None:
        send(process, message)
        if isinstance(message, Batch):
            process.kill()

    monkeypatch.setattr(workers_module, "_send", kill)
    with pytest.raises(DataError, match=r"worker process .* ended with status -9; .*fewer --workers"):
        prepare(
            find_corpus([tmp_path / "text"]), tmp_path / "a.tokens", load_tokenizer(str(tokenizer_json)), num_workers=2
        )
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_half_file_and_no_worker(tmp_path: Path, tokenizer_json: Path, number: int) -> None:
    (tmp_path / "text").write_bytes(b"some words and more of them\n" * PIECE_BYTES * 8)
    command = [sys.executable, "-m", "longnet_dist", "prepare", "text", "--output", "a.tokens", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--tokenizer", str(tokenizer_json)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(".a.tokens.*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert not (tmp_path / "a.tokens").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert [path.name for path in tmp_path.iterdir()] == ["text"]
    while any(Path(f"/proc/{child}").exists() and _state(child) != "Z" for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _state(process: str) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_a_trained_tokenizer_is_byte_level_and_repeatable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("def return größe 😀 def\n".encode() * 200 + bytes(range(1, 128)))
    first, second = (train_tokenizer(find_corpus([tmp_path]), 280) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.vocab_size <= 280
    assert first.document_separator is not None
    text = "andere Wörter\x00\x7f 😀\n".encode()
    assert first.decode(first.encode(text)) == text
    assert first.token_bytes()[first.encode(text)].sum() == len(text)


def test_a_tokenizer_that_cannot_be_trained(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    with pytest.raises(DataError, match=r"above 257, .* not 257"):
        train_tokenizer(find_corpus([tmp_path]), 257)
    with pytest.raises(DataError, match="1048576 at most, not 100000000000"):
        train_tokenizer(find_corpus([tmp_path]), 10**11)
    with pytest.raises(DataError, match="reads the text twice"):
        train_tokenizer(find_corpus(["-"]), 300)
