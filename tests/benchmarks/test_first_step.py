import json

import pytest

from benchmarks.first_step import main, slowest_imports
from longnet_dist.cli.program.dispatch import main as longnet


def test_a_run_starts_with_and_without_compiled_code(tmp_path, capsys):
    words = ["--config", "quickstart", "--steps", "2", "train.batch_size=2", "data.sequence_length=64",
             "model.layers=1", f"--output={tmp_path / 'first.json'}"]  # fmt: skip
    (tmp_path / "text").write_text("a b c " * 400)
    longnet(["prepare", str(tmp_path / "text"), "--output", str(tmp_path / "text.tokens")])
    main([*words, f"data.path={tmp_path / 'text.tokens'}"])
    found = json.loads((tmp_path / "first.json").read_text())
    said = capsys.readouterr().out
    for name in ("new", "again"):
        (run,) = found[name]
        assert 0 < run["first_step_seconds"] <= run["last_step_seconds"] <= run["process_seconds"]
        assert f"{name}: first step after" in said


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(SystemExit, match="no field 'nothing'"):
        main(["model.nothing=1", f"--output={tmp_path / 'first.json'}"])


def test_the_slowest_import_is_that_of_everything():
    found = slowest_imports(3)
    assert next(iter(found)) == "longnet_dist.train.loop"
    assert list(found.values()) == sorted(found.values(), reverse=True)
