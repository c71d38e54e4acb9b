"""Commands of the pages, checked without running them: options, settings, and the files that they name."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
from itertools import dropwhile

from longnet_dist.cli.program.dispatch import command_module, command_names
from longnet_dist.config.loading import known_keys, load_config
from longnet_dist.config.notes import notes
from longnet_dist.config.packaged import find_config, run_names
from longnet_dist.config.schema import Config
from longnet_dist.serving.protocol import CompletionRequest
from tests.docs.pages import ROOT

TAKES_SETTINGS = {"train": "words", "quickstart": "settings", "plan": "settings"}
LAUNCHERS = ("srun", "mpirun", "deepspeed")
PYTHON = ("python", "python3", ".venv/bin/python")
MODULES = {"pytest", "ruff", "mypy", "venv", "mkdocs"}
HARNESS = "longnet_dist.inference.harness.command"


def command_lines(code: str) -> list[list[str]]:
    """The words of each command of a shell block, without comments and environment variables in front."""
    done = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    commands = []
    for words in filter(None, lines):
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        commands.append(words)
    return commands


def check_command(words: list[str]) -> None:
    """Check one command; raises where a reader would get an error that is not about his machine."""
    name, *rest = words
    if name == "longnet":
        check_longnet(*rest)
    elif name in PYTHON:
        check_python(rest)
    elif name == "torchrun":
        check_torchrun(rest)
    elif name in LAUNCHERS:
        check_launcher(rest)
    elif name in ("sbatch", "launch/mpi/train.sh"):
        script, *settings = dropwhile(lambda word: word.startswith("--"), rest) if name == "sbatch" else words
        assert (ROOT / script).is_file(), script
        check_training(settings)
    elif name == "pip":
        check_extras(rest)
    elif name == "docker":
        check_docker(*rest)
    elif name == "curl":
        check_completion(rest)
    elif name == "docker/build_offline.sh":
        assert (ROOT / name).is_file()
        assert set(rest) <= {"cpu", "gpu"}
    else:
        assert words == [".", ".venv/bin/activate"], f"no check knows the command {shlex.join(words)}"


def check_completion(words: list[str]) -> None:
    """A request to longnet serve: its address, and a body that the server takes."""
    assert words[0] == "localhost:8000/v1/completions", words
    CompletionRequest.model_validate_json(words[words.index("-d") + 1])


def check_longnet(command: str, *words: str) -> None:
    """Parse a command line of ``longnet``, and check its settings."""
    assert command in command_names(), f"longnet has no command {command}"
    parser = command_module(command).parser()
    if command not in TAKES_SETTINGS:
        parser.parse_args(words)
        return
    options = parser.parse_intermixed_args(words)
    settings = getattr(options, TAKES_SETTINGS[command])
    config = {"plan": [getattr(options, "config", "")], "quickstart": ["quickstart"]}.get(command, [])
    if settings or config:
        check_training([*config, *settings])


def check_training(words: list[str]) -> None:
    """Check a configuration and its settings; of a file that the reader writes, the keys alone."""
    config, settings = (words[0], words[1:]) if words and "=" not in words[0] else ("quickstart", words)
    if config in run_names():
        found = load_config(find_config(config), settings)
        assert not [line for line in notes(found) if "warmup" in line], settings
    else:
        assert config.endswith(".yaml"), config
    assert {word.partition("=")[0] for word in settings} <= {*known_keys(Config), "model.name"}, settings


def check_python(words: list[str]) -> None:
    """Check that a script or module is there, and that it knows its options."""
    if words[0] != "-m":
        check_script(words)
    elif words[1] == "longnet_dist":
        check_longnet(*words[2:])
    elif words[1] == HARNESS:
        check_harness(words[2:])
    elif words[1] in MODULES:
        paths = [word for word in words[2:] if "/" in word]
        assert all((ROOT / path).exists() for path in paths), paths
    else:
        check_script([words[1].replace(".", "/") + ".py", *words[2:]])


def check_harness(words: list[str]) -> None:
    """Check the model; the options are those of lm-evaluation-harness, whose commands run where a page says so."""
    command, *options = words
    assert command == "run", command
    assert options[options.index("--model") + 1] in ("longnet", "hf"), options
    assert options[options.index("--model_args") + 1].startswith("pretrained="), options


def check_script(words: list[str]) -> None:
    """Check a script of this repository, and that the text of it has every option."""
    script, *rest = words
    assert (ROOT / script).is_file(), script
    if script == "launch/train.py":
        check_training(rest)
        return
    text = (ROOT / script).read_text(encoding="utf-8")
    options = [word for word in rest if word.startswith("--")]
    assert all(f'"{option}"' in text for option in options), f"{script} does not know all of {options}"


def check_torchrun(words: list[str]) -> None:
    """Parse torchrun's own options, and check what it starts."""
    from torch.distributed.run import parse_args

    options = parse_args(words)  # type: ignore[no-untyped-call]
    script = [options.training_script, *options.training_script_args]
    if options.module or (ROOT / script[0]).exists():
        check_python(["-m", *script] if options.module else script)
    else:
        assert script in (["two_ranks.py"], ["loop.py"])  # which the page writes


def check_launcher(words: list[str]) -> None:
    """Check what srun, mpirun or deepspeed starts."""
    start = next(place for place, word in enumerate(words) if word in ("longnet", "launch/train.py"))
    if words[start] == "longnet":
        check_longnet(*words[start + 1 :])
    else:
        check_script(words[start:])


def check_docker(command: str, *words: str) -> None:
    """Check the file that an image is built from, or what a container runs."""
    if command == "run":
        check_longnet(*words[words.index("longnet") + 1 :])
    else:
        assert (ROOT / words[words.index("-f") + 1]).is_file()


def check_extras(words: list[str]) -> None:
    """Check that the extras of an installation exist."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {extra for word in words for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", word)))}
    assert extras <= set(setup["options.extras_require"]), extras
