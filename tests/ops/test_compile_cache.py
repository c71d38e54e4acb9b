import json
import logging
import os
import shutil
import subprocess
import sys

import pytest

from longnet_dist import numerics
from longnet_dist.errors import ConfigError
from longnet_dist.ops.compile_cache import FOLDERS, prepare_compile_cache

CODE = """
import json, os, sys, torch
from pathlib import Path
from longnet_dist.ops.compile_cache import prepare_compile_cache
prepare_compile_cache(Path(sys.argv[1]), os.environ)
from torch._dynamo.utils import counters
print(torch.compile(lambda x: (x.sin() + 1).sum(), dynamic=False)(torch.ones(8)).item())
print(json.dumps({name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}))
"""


def test_all_folders_lie_in_one(tmp_path):
    environment = {}
    prepare_compile_cache(tmp_path / "a" / "b", environment)
    assert {name: environment[name] for name in FOLDERS} == {
        name: str(tmp_path / "a" / "b" / folder) for name, folder in FOLDERS.items()
    }
    assert all((tmp_path / "a" / "b" / folder).is_dir() for folder in FOLDERS.values())
    assert environment["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"


def test_what_the_user_has_set_stays_and_null_changes_nothing(tmp_path):
    environment = {"TRITON_CACHE_DIR": "/mine"}
    prepare_compile_cache(None, environment)
    assert environment == {"TRITON_CACHE_DIR": "/mine"}
    prepare_compile_cache(tmp_path, environment)
    assert environment["TRITON_CACHE_DIR"] == "/mine"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


@pytest.mark.parametrize(("variable", "below"), [("XDG_CACHE_HOME", ""), ("HOME", ".cache")])
def test_the_usual_place(tmp_path, variable, below):
    environment = {variable: str(tmp_path)}
    prepare_compile_cache("auto", environment)
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / below / "longnet_dist" / "triton")


def test_a_place_that_cannot_be_made(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be kept in .*file.*use another train.compile_cache"):
        prepare_compile_cache(tmp_path / "file", {})
    numerics.log_once.cache_clear()
    for environment in ({"XDG_CACHE_HOME": str(tmp_path / "file")}, {}):
        before = dict(environment)
        with caplog.at_level(logging.WARNING):
            prepare_compile_cache("auto", environment)
        assert environment == before
    assert ["compile it again" in record.message for record in caplog.records] == [True, True]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_second_process_compiles_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in FOLDERS}
    found = []
    for _ in range(2):
        words = [sys.executable, "-c", CODE, str(tmp_path)]
        out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        found.append(json.loads(out[-1]))
    # Newer releases of torch find the whole function in a cache before they look for its graph.
    assert [one["fxgraph_cache_miss"] for one in found] == [1, 0]
    assert any((tmp_path / "inductor").iterdir())
