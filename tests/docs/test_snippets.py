"""Every snippet of the pages: what two CPU cores can run is run, in the order of the page; the rest is checked."""

from __future__ import annotations

import ast
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import yaml

from longnet_dist.cli.program.dispatch import main as longnet
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.config.loading import parse_config
from tests.docs.commands import check_command, command_lines
from tests.docs.pages import ROOT, Block, blocks, pages

PAGES = {page.name: page for page in pages()}
TRAININGS = ("quickstart", "train")
RAN_IN_README = ["longnet", "quickstart"]  # whose run every other page finds in its folder
SECONDS = 600.0  # of one command, on a busy machine


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some books, in which the commands of README have run."""
    folder = tmp_path_factory.mktemp("snippets") / "readme"
    (folder / "books").mkdir(parents=True)
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.values())
    (folder / "books" / "long.txt").write_text(text[:4000], encoding="utf-8")
    (folder / "books" / "longer.txt").write_text(text[-42000:], encoding="utf-8")
    run_page(PAGES["README.md"], folder)
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_snippets_run(name: str, readme_folder: Path, tmp_path: Path) -> None:
    if name != "README.md":
        for part in ("books", "data", "runs/quickstart"):  # a page may use the quick start's model
            shutil.copytree(readme_folder / part, tmp_path / "page" / part)
        run_page(PAGES[name], tmp_path / "page")


@pytest.mark.parametrize("name", PAGES)
def test_snippets_are_right(name: str) -> None:
    for block in blocks(PAGES[name]):
        try:
            check(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.name}: {error!r}\n{block.code}") from error


def check(block: Block) -> None:
    """Check a block without running it."""
    if block.language == "bash":
        for words in command_lines(block.code):
            check_command(words)
    elif block.language == "python":
        ast.parse(block.code)
    elif block.language == "yaml":
        parse_config(yaml.safe_load(block.code))
    else:
        assert block.language == "text", block.language


def run_page(page: Path, folder: Path) -> None:
    """Run the shell blocks that are marked so, then all Python blocks in one process."""
    printed = ""
    for block in blocks(page):
        kind, _, rest = block.mark.partition(":")
        if kind == "run" and block.language == "bash":
            printed = run_shell(block, folder, rest.split())
        elif kind == "file":
            (folder / rest.strip()).write_text(block.code, encoding="utf-8")
        elif kind == "output":
            assert printed.strip() == block.code.strip(), f"{block.name} is not what the command above prints"
        else:
            assert kind in ("", "run"), f"{block.name}: no such mark: {block.mark}"
    code = [block for block in blocks(page) if block.language == "python" and block.mark in ("", "run")]
    forked(partial(run_python, code), folder, page.name)


def run_shell(block: Block, folder: Path, settings: Sequence[str]) -> str:
    """Run the commands of a block; those of ``longnet`` in a fork, which has imported everything already."""
    printed = ""
    for words in command_lines(block.code):
        if words == RAN_IN_README and (folder / "runs" / "quickstart").exists():
            continue
        if words[0] == "longnet":
            arguments = [*words[1:], *(settings if words[1] in TRAININGS else ())]
            printed += forked(partial(run_cli, partial(longnet, arguments)), folder, block.name)
        else:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            where = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            done = subprocess.run(
                words,
                cwd=folder,
                env=os.environ | {"PATH": path, "PYTHONPATH": where, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, f"{block.name}: {done.stdout}\n{done.stderr}"
            printed += done.stdout
    return printed


def run_python(code: Sequence[Block]) -> None:
    """Run blocks one after the other with the same names."""
    names: dict[str, object] = {"__name__": "__main__"}
    for block in code:
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)


def forked(work: Callable[[], None], folder: Path, name: str) -> str:
    """What ``work`` prints in a process of its own, in a folder; it is forked from a server without threads."""
    output, errors = folder.parent / "stdout.txt", folder.parent / "stderr.txt"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.docs.preloaded"])
    process = context.Process(target=_child, args=(work, folder, output, errors))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.terminate()  # which ranks that it has started are told, too
        process.join(30)
        process.kill()
    said = output.read_text(encoding="utf-8", errors="replace")
    assert process.exitcode == 0, f"{name}: status {process.exitcode}\n{said}\n{errors.read_text(errors='replace')}"
    return said


def _child(work: Callable[[], None], folder: Path, output: Path, errors: Path) -> None:
    for path, stream in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    work()
