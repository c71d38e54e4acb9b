"""Loggers by name; those of other packages record offline."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module

import pytest

from longnet_dist import numerics
from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.errors import ConfigError
from longnet_dist.inference.evaluation import Evaluation
from longnet_dist.telemetry import loggers
from longnet_dist.telemetry.loggers import LOGGERS, usable_loggers
from longnet_dist.telemetry.metrics import MetricsLog, StepMetrics


def write(folder, names, steps=(1, 2)):
    with MetricsLog(folder, 0, usable_loggers(names), {"train": {"steps": 2}}) as log:
        for step in steps:
            log.step(StepMetrics(step, 1.5 / step, 0.5, 1e-3, 10 * step, 0.1, 100.0, 0))
        log.validation(2, asdict(Evaluation(1.0, 10, 2.7, 1.4)))


def test_loggers_are_files_of_a_folder():
    assert LOGGERS.names() == ("jsonl", "tensorboard", "trackio", "wandb")


def test_an_unknown_logger_is_refused():
    with pytest.raises(
        ConfigError, match=r"train.loggers must be one of jsonl, .*wandb, not 'wandbb'; did you mean wandb"
    ):
        usable_loggers(("jsonl", "wandbb"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_whose_package_is_missing_is_refused(name, monkeypatch):
    LOGGERS[name]
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=f"needs the package {name}; pip install {name}, or leave {name} out"):
        usable_loggers((name,))


def test_a_run_goes_on_without_tensorboard_and_says_so(monkeypatch, caplog):
    LOGGERS["tensorboard"]
    numerics.log_once.cache_clear()
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda module: None)
    with caplog.at_level(logging.WARNING):
        assert [logger.__name__ for logger in usable_loggers(("jsonl", "tensorboard"))] == ["JsonlLogger"]
    assert "not recorded by tensorboard" in caplog.text


def write_elsewhere(folder, name, **environment):
    """Write in a process of its own: these packages read their environment as they are imported."""
    program = "from pathlib import Path; from tests.telemetry.test_loggers import RunFolder, write; "
    program += f"write(RunFolder(Path({str(folder)!r})), ({name!r},))"
    given = os.environ | environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=given, check=True, capture_output=True)


def test_wandb_records_offline(tmp_path):
    pytest.importorskip("wandb")
    write_elsewhere(tmp_path, "wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content
    assert b"validation/bits_per_byte" in content


def test_trackio_records_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    write_elsewhere(tmp_path / "run", "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    records = [file.read_bytes() for file in (tmp_path / "trackio").rglob("*") if file.is_file()]
    assert any(b"train/loss" in content for content in records)


def test_a_new_logger_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "list_logger.py").write_text(
        "from longnet_dist.telemetry.loggers import LOGGERS, Logger\n\n"
        "SEEN = []\n\n"
        "@LOGGERS.register('list')\n"
        "class ListLogger(Logger):\n"
        "    def log(self, kind, step, fields):\n"
        "        SEEN.append((kind, step, dict(fields)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = import_module("list_logger").SEEN
    write(RunFolder(tmp_path), ("list",))
    assert [(kind, step) for kind, step, _ in seen] == [("train", 1), ("train", 2), ("validation", 2)]
    assert json.dumps(seen[0][2])
