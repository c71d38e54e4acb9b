"""Probes that answer, fail, crash and hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longnet_dist.cli.diagnosis import facts
from longnet_dist.cli.diagnosis.ask import ask

MODULES = {
    "noisy_module": "print('@answers are told like this'); print('{')",
    "wrong_module": "raise ValueError('of two\\nlines')",
    "leaving_module": "import sys; sys.exit(3)",
    "crashing_module": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "vanishing_module": "import os; os._exit(0)",
    "hanging_module": "import time; time.sleep(600)",
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that do all of that as they are imported, installed in version 1.0."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
        metadata = tmp_path / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.syspath_prepend(tmp_path)


def test_answers_are_told_one_by_one_until_the_process_ends() -> None:
    (told,) = ask(["imports", "json", "noisy_module", "wrong_module", "leaving_module", "crashing_module", "yaml"])
    failure = told.pop("failure")
    assert told == {
        "json": "",
        "noisy_module": "",
        "wrong_module": "ValueError: of two lines",
        "leaving_module": "SystemExit: 3",
    }
    assert failure == "the process was killed by signal 11"


def test_what_hangs_is_killed() -> None:
    (told,) = ask(["imports", "json", "hanging_module"], seconds=3)
    assert told == {"json": "", "failure": "no answer in time"}


def test_a_probe_that_raises_tells_why() -> None:
    (told,) = ask(["attention", "cpu", "float32", "many"])
    assert told["failure"].startswith("ValueError: invalid literal for int()")


def test_a_wrong_module_ends_no_other_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "CORE", ("yaml", "crashing_module", "vanishing_module", "no_such_module", "tqdm"))
    monkeypatch.setattr(facts, "MODULES", {"extra": ("wrong_module", "einops")})
    monkeypatch.setattr(facts, "DISTRIBUTIONS", {"yaml": ("no-such-yaml", "PyYAML"), "triton": ("no-triton",)})
    found = {package.module: package for package in facts.packages()}
    core = ["yaml", "crashing_module", "vanishing_module", "no_such_module", "tqdm"]
    assert list(found) == [*core, "triton", "wrong_module", "einops"]
    assert (found["yaml"].distribution, found["yaml"].error) == ("PyYAML", "")
    assert found["no_such_module"].version is None
    assert {module: package.error for module, package in found.items() if package.error} == {
        "crashing_module": "the process was killed by signal 11",
        "vanishing_module": "its import gave no answer",
        "wrong_module": "ValueError: of two lines",
    }
    assert found["wrong_module"].version == "1.0"
