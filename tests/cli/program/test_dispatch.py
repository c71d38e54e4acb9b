"""The words behind ``longnet``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from longnet_dist.cli.program.dispatch import command_names, main
from longnet_dist.errors import ConfigError

# They list devices, or ask torch what there is.
IMPORT_TORCH_FOR_HELP = {"plan"}


def heavy_imports(*words: str) -> set[str]:
    """What a command line imports of these."""
    program = (
        "import sys\n"
        "from longnet_dist.cli.program.dispatch import main\n"
        "try:\n"
        f"    main({list(words)!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print('\\n', *({'torch', 'deepspeed', 'numpy', 'matplotlib'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert heavy_imports(*words) == set()


@pytest.mark.parametrize("name", sorted({*command_names()} - IMPORT_TORCH_FOR_HELP))
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    assert heavy_imports(name, "--help") == set()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    assert {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2:3].isalpha()} >= {
        "train",
        "quickstart",
        "evaluate",
        "generate",
        "prepare",
        "plan",
        "export",
        "convert",
        "embed",
        "predict",
    }
    for name in command_names():
        assert f"\n  {name} " in text


@pytest.mark.parametrize("name", command_names())
def test_every_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["help", name])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: longnet {name} ")
    assert f"examples:\n  longnet {name}" in text


@pytest.mark.parametrize(
    ("word", "nearest"), [("trian", "train"), ("quick-start", "quickstart"), ("eval", "evaluate"), ("gen", "generate")]
)
def test_a_misspelt_command_names_the_nearest(word: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"no command '{word}'; the nearest is {nearest};"):
        main([word])


def test_a_command_like_no_other_gets_the_list() -> None:
    with pytest.raises(ConfigError, match=r"no command '42'; there are .*evaluate.*train.*; see longnet --help"):
        main(["42"])


def test_a_misspelt_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "run", "--data", "file", "--contxet", "16", "--stream"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "longnet evaluate: error: unrecognized arguments: --contxet 16 (the nearest option is --context)"
    )


@pytest.mark.parametrize("command", [["-m", "longnet_dist"], ["-c", "from longnet_dist.__main__ import run; run()"]])
def test_a_mistake_is_one_line_and_status_2(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: longnet has no command 'trian'; the nearest is train; see longnet --help\n"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    name, version = capsys.readouterr().out.split()
    assert name == "longnet"
    assert version[0].isdigit()
