"""What a build of the images would stumble over, read from the files; docker/build_offline.sh builds them for real."""

import configparser
import fnmatch
import re
import shlex
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from torch.distributed.run import parse_args

from longnet_dist.cli.program.dispatch import command_names
from longnet_dist.config.loading import load_config
from longnet_dist.config.packaged import find_config
from tests.docs.commands import check_command

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
DOCKERFILES = sorted(FOLDER.glob("Dockerfile*"))
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "CMD"}
INSTALLED = re.compile(r"\.\[(?P<extras>[a-z,]+)\]")


def instructions(path):
    """Yield (instruction, rest) of a Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word, rest.strip()


def runs(path):
    return [rest for word, rest in instructions(path) if word == "RUN"]


def pip_words(path):
    """Return what the ``pip install`` of a Dockerfile name: packages, and this one with its extras."""
    words = []
    for command in re.split("&&", " && ".join(runs(path))):
        *_, arguments = command.partition(" install ") if "pip install" in command else ("",)
        arguments = iter(shlex.split(arguments))
        for word in arguments:
            if word in ("-c", "--index-url"):
                next(arguments)
            elif not word.startswith("-"):
                words.append(word)
    return words


def extras(path):
    (found,) = filter(None, map(INSTALLED.fullmatch, pip_words(path)))
    return found["extras"].split(",")


def ignored(path):
    """Whether .dockerignore keeps a path of the checkout, or a folder above it, out of the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = PurePosixPath(path).parts
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        fnmatch.fnmatch(name, pattern) or ("**/" in pattern and fnmatch.fnmatch(name, pattern.replace("**/", "")))
        for name in above
        for pattern in patterns
    )


@pytest.fixture(scope="module")
def setup():
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


@pytest.fixture(scope="module")
def pins():
    """The constraints: package -> version."""
    lines = (FOLDER / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and line[0] != "#"]
    assert all(len(r.specifier) == 1 and next(iter(r.specifier)).operator == "==" for r in requirements)
    assert len({r.name.lower() for r in requirements}) == len(requirements)
    return {r.name.lower(): next(iter(r.specifier)).version for r in requirements}


def listed(text):
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def test_there_are_images_for_gpus_and_cpus():
    assert [path.name for path in DOCKERFILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_begins_with_a_base_that_names_its_release(self, path):
        words = [word for word, _ in instructions(path)]
        assert words[0] == "FROM"
        assert words.count("FROM") == 1
        assert set(words) <= INSTRUCTIONS
        base = next(rest for word, rest in instructions(path) if word == "FROM")
        assert re.fullmatch(r"(python:3\.\d+-slim-[a-z]+|nvidia/cuda:[\d.]+-base-ubuntu[\d.]+)", base)

    def test_copies_what_exists_and_is_not_ignored(self, path):
        copied = [shlex.split(rest) for word, rest in instructions(path) if word == "COPY"]
        assert [".", "."] in copied
        for *sources, _ in copied:
            for source in sources:
                assert (ROOT / source).exists()
                assert not ignored(source)

    def test_every_install_is_constrained_and_keeps_no_downloads(self, path):
        installs = [command for command in re.split("&&", " && ".join(runs(path))) if "pip install" in command]
        assert len(installs) >= 2
        for command in installs:
            assert "-c docker/constraints.txt" in command
            assert "--no-cache-dir" in command

    def test_torch_comes_before_deepspeed_is_built(self, path):
        first, *_, last = [command for command in runs(path) if "pip install" in command]
        assert "torch" in shlex.split(first)
        assert last.startswith("DS_BUILD_OPS=0 ")

    def test_names_extras_that_exist(self, path, setup):
        assert set(extras(path)) <= set(setup["options.extras_require"])
        assert ("cuda" in extras(path)) == (path.name == "Dockerfile")

    def test_constraints_pin_what_is_installed_within_the_ranges_that_work(self, path, setup, pins):
        optional = setup["options.extras_require"]
        wanted = listed(setup["options"]["install_requires"])
        wanted += [requirement for extra in extras(path) for requirement in listed(optional[extra])]
        assert len(wanted) > 8
        for requirement in wanted:
            assert requirement.specifier.contains(pins[requirement.name.lower()], prereleases=True), requirement
        for word in pip_words(path):
            if not INSTALLED.fullmatch(word):
                assert Requirement(word).name.lower() in pins

    def test_starts_a_command_of_this_package(self, path, setup):
        words = yaml.safe_load(next(rest for word, rest in instructions(path) if word == "CMD"))
        assert f"{words[0]} = " in setup["options.entry_points"]["console_scripts"]
        assert words[1] in command_names()

    def test_its_comments_name_commands_that_exist(self, path):
        commands = [
            line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   docker ")
        ]
        assert commands[0].startswith(f"docker build -f docker/{path.name} ")
        assert len(commands) == 2
        for command in commands:
            check_command(shlex.split(command))


def test_the_build_gets_all_tracked_files_and_none_that_git_ignores():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a checkout of git")
    assert [path for path in tracked if ignored(path)] == []
    left = [".git/config", ".venv/bin/python", "runs/a/metrics.jsonl", "data/a.tokens", "a.tokens", "build/lib/a.py"]
    left += ["longnet_dist/__pycache__/a.pyc", ".mypy_cache/a", "longnet_dist.egg-info/PKG-INFO", "dist/a.whl"]
    assert [path for path in left if not ignored(path)] == []


class TestCompose:
    @pytest.fixture
    def services(self):
        return yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]

    def test_builds_the_cpu_image_and_shares_its_folder(self, services):
        workdir = [rest for word, rest in instructions(FOLDER / "Dockerfile.cpu") if word == "WORKDIR"][-1]
        for service in services.values():
            context = FOLDER / service["build"]["context"]
            assert context.resolve() == ROOT
            assert (context / service["build"]["dockerfile"]).samefile(FOLDER / "Dockerfile.cpu")
            assert set(service.get("depends_on", ())) < services.keys()
            assert [volume.partition(":")[2] for volume in service["volumes"]] == [f"{workdir}/runs", f"{workdir}/data"]

    def test_the_nodes_meet_each_other(self, services):
        ranks = set()
        for service in services.values():
            program, *words = shlex.split(service["command"])
            assert program == "torchrun"
            options = parse_args(words)
            assert options.nnodes == str(len(services))
            assert options.master_addr in services
            ranks.add(options.node_rank)
            assert (options.module, options.training_script) == (True, "longnet_dist")
            command, config, *settings = options.training_script_args
            assert command == "train"
            load_config(find_config(config), settings)
        assert ranks == set(range(len(services)))


class TestBuildOffline:
    SCRIPT = FOLDER / "build_offline.sh"

    def run(self, *words):
        return subprocess.run(["bash", self.SCRIPT, *words], capture_output=True, text=True, check=False, timeout=60)

    def test_refuses_an_image_that_there_is_not(self):
        done = self.run("tpu")
        assert done.returncode == 2
        assert done.stderr == "error: there is no image tpu; name cpu, gpu or both\n"

    def test_makes_a_base_for_every_image(self):
        text = self.SCRIPT.read_text()
        for path in DOCKERFILES:
            base = next(rest for word, rest in instructions(path) if word == "FROM")
            name = base if "/" in base else f"library/{base}"
            assert any(fnmatch.fnmatch(name, pattern) for pattern in re.findall(r"^    ([a-z/]+:\*)\)", text, re.M))
            assert f"docker/{path.name}" in text

    @pytest.mark.skipif(sys.platform != "linux", reason="needs bash")
    def test_is_a_script_that_bash_reads(self):
        subprocess.run(["bash", "-n", self.SCRIPT], check=True)
