"""How programs end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.errors import ConfigError, DataError, LostRankError


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status"),
    [(DataError("no such file"), 2), (ConfigError("no such key"), 2), (LostRankError("rank 3"), 69)],
)
def test_what_is_no_fault_of_ours_is_one_line(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(raising(error))
    assert ended.value.code == status
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"error: {error}\n")


def test_an_interrupt_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(raising(ZeroDivisionError()))


def test_success_returns() -> None:
    calls: list[int] = []
    run_cli(lambda: calls.append(1))
    assert calls == [1]


def test_output_whose_reader_has_ended_needs_no_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "longnet_dist", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")], ids=str
)
def test_memory_that_is_not_there_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(raising(error))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")
    with pytest.raises(RuntimeError, match="something else"):
        run_cli(raising(RuntimeError("something else")))


@pytest.mark.parametrize(
    "message", ["InvalidCxxCompiler: No working C++ compiler found in CXX", "Failed to find C compiler. Please"]
)
def test_a_compiler_that_is_not_there_is_one_line(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_cli(raising(RuntimeError(message)))
    assert ended.value.code == 2
    assert "train.compile=false" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_cannot_show_a_text_ends_no_command(encoding: str) -> None:
    code = "from longnet_dist.cli.program.exit_status import run_cli; run_cli(lambda: print('\\u4eca \\udce9'))"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
    shown = "\u4eca".encode() if encoding == "utf-8" else b"\\u4eca"
    assert done.stdout.rstrip() == shown + b" \\udce9"
    assert not done.stderr
