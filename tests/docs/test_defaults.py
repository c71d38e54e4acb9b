"""The defaults in the tables of options are those of the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from longnet_dist.config.loading import parse_config
from tests.docs.pages import ROOT, table_rows
from tests.examples.test_examples import example

PAGE = ROOT / "docs" / "huggingface.md"
ROWS = [cells for cells in table_rows(PAGE) if len(cells) == 3]


def default_in(cell: str) -> str:
    """The value in a cell of defaults, without what explains it."""
    return re.split(r" \(", cell)[0].strip("`").replace("null", "None")


def test_keys() -> None:
    config = parse_config({"model": {"name": "tiny"}, "train": {"output_dir": "x", "steps": 1}})
    found = [(key.strip("`").split("."), cell) for key, cell, _ in ROWS if re.match(r"`(train|deepspeed)\.\w+`$", key)]
    assert len(found) == 5
    for (section, name), cell in found:
        assert str(getattr(getattr(config, section), name)) == default_in(cell), name


def test_options_of_the_example() -> None:
    pytest.importorskip("transformers")
    options = example("finetune_llama").parser().parse_args(["model", "texts", "--output", "x"])
    found = [
        (option, value)
        for names, cell, _ in ROWS
        if names.startswith("`--")
        for option, value in zip(names.split(", "), default_in(cell).split(", "), strict=True)
    ]
    given = {option.strip("`-").replace("-", "_"): value for option, value in found}
    assert {name: float(value) for name, value in given.items()} == {
        name: float(value) for name, value in vars(options).items() if name not in ("model", "texts", "output")
    }


def check_arguments(function: Callable[..., Any], *names: str) -> None:
    for name in names:
        (cell,) = [default for key, default, _ in ROWS if key == f"`{name}`"]
        assert str(inspect.signature(function).parameters[name].default) == default_in(cell), name


def test_arguments() -> None:
    pytest.importorskip("transformers")
    hf = import_module("longnet_dist.hf")
    check_arguments(hf.sequence_parallel, "loss_chunk", "mlp_tile", "average_gradients")


def test_arguments_of_the_plug_in() -> None:
    pytest.importorskip("lm_eval")
    plug_in = import_module("longnet_dist.inference.harness.language_model")
    check_arguments(plug_in.LongNetLM, "dtype", "chunk_length", "max_gen_toks")
