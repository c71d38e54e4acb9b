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
from longnet_dist.config.notes import notes
from tests.docs.commands import check_command, command_lines
from tests.docs.pages import ROOT, Block, blocks, pages

PAGES = {page.name: page for page in pages()}
TRAININGS = ("quickstart", "train")
RAN_IN_README = ["longnet", "quickstart"]  # whose run every other page finds in its folder
SECONDS = 600.0  # of one command, on a busy machine
LLAMA_PAGE = "huggingface.md"
LLAMA = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 256,
}
WRITE_LLAMA = """
import json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
ids = {text: number for number, text in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"])}
backend = Tokenizer(models.BPE(ids, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained("llama")
AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained("llama")
"""


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
        if name == LLAMA_PAGE:  # a reader has one
            forked(partial(exec, WRITE_LLAMA, {"LLAMA": LLAMA}), tmp_path / "page", "llama")
        run_page(PAGES[name], tmp_path / "page")


@pytest.mark.parametrize("name", PAGES)
def test_snippets_are_right(name: str) -> None:
    for block in blocks(PAGES[name]):
        try:
            check(block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block.name}: {error!r}\n{block.code}") from error


@pytest.mark.parametrize("name", PAGES)
def test_no_command_writes_what_an_earlier_one_has_written(name: str) -> None:
    """Most commands refuse an output that is there already."""
    lines = [words for block in blocks(PAGES[name]) if block.language == "bash" for words in command_lines(block.code)]
    outputs = [words[words.index("--output") + 1] for words in lines if "--output" in words]
    outputs += [words[3] for words in lines if words[:2] == ["longnet", "export"] and not words[3].startswith("-")]
    assert sorted(set(outputs)) == sorted(outputs)


def check(block: Block) -> None:
    """Check a block without running it."""
    if block.language == "bash":
        for words in command_lines(block.code):
            check_command(words)
    elif block.language == "python":
        ast.parse(block.code)
    elif block.language == "yaml":
        values = yaml.safe_load(block.code)
        if "path" in values["model"]:
            values["model"]["config"] = LLAMA
        assert not notes(parse_config(values))
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
            (folder / rest.strip()).parent.mkdir(exist_ok=True)
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
                env=os.environ | {"PATH": path, "PYTHONPATH": where, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)},
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
