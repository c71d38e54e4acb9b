import json
import math
from dataclasses import asdict, replace

import pytest

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.inference.evaluation import Evaluation
from longnet_dist.telemetry.json_lines import json_text, read_jsonl
from longnet_dist.telemetry.loggers import usable_loggers
from longnet_dist.telemetry.metrics import MetricsLog, StepMetrics, draw_loss_curve

DEFAULT = usable_loggers(("jsonl", "tensorboard"))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def line(step):
    return StepMetrics(step, 1.5 / step, 0.5, 1e-3, 10 * step, 0.1, 100.0, 0)


def write(folder, last_step, steps):
    with MetricsLog(folder, last_step, DEFAULT) as log:
        for step in steps:
            log.step(line(step))
            log.validation(step, asdict(Evaluation(1.0, 10, 2.7, 1.4)))


def test_every_step_is_one_object(folder):
    write(folder, 0, [1, 2])
    assert read_jsonl(folder.metrics_file)[1] == {
        "step": 2,
        "loss": 0.75,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 20,
        "step_seconds": 0.1,
        "tokens_per_second": 100.0,
        "skipped": 0,
    }
    assert read_jsonl(folder.validation_file)[0]["bits_per_byte"] == 1.4


def test_steps_after_the_checkpoint_are_dropped_on_resume(folder):
    write(folder, 0, [1, 2, 3])
    write(folder, 2, [3, 4])
    for file in (folder.metrics_file, folder.validation_file):
        assert [entry["step"] for entry in read_jsonl(file)] == [1, 2, 3, 4]


def test_what_is_not_finite_is_null_and_left_out_of_the_curve(folder):
    with MetricsLog(folder, 0, DEFAULT) as log:
        log.step(line(1))
        log.step(replace(line(2), loss=math.nan, grad_norm=math.inf, skipped=1))
    text = folder.metrics_file.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    last = read_jsonl(folder.metrics_file)[1]
    assert (last["loss"], last["grad_norm"], last["skipped"]) == (None, None, 1)
    draw_loss_curve(folder, bytes_per_token=1.0)


def test_a_line_cut_short_by_a_crash_is_left_out(folder):
    folder.metrics_file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(folder.metrics_file) == [{"step": 1}]


@pytest.mark.parametrize(
    "line", [b'{"step": 1', b"\0" * 9, b"\xff\xfe", b"[1]", b"{}", b"", b"[" * 9999, b'{"step": "x"}']
)
def test_a_damaged_line_is_a_message(folder, capsys, line):
    folder.metrics_file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 2, "loss": 1.0}\n')
    assert [record["step"] for record in read_jsonl(folder.metrics_file)] == [1, 2]
    assert "metrics.jsonl has 1 damaged lines, the first in line 2" in capsys.readouterr().err
    write(folder, 2, [3])
    assert [record["step"] for record in read_jsonl(folder.metrics_file)] == [1, 2, 3]
    draw_loss_curve(folder, bytes_per_token=1.0)


def test_json_has_no_numbers_that_are_not_finite(folder):
    with MetricsLog(folder, 0, DEFAULT) as log:
        log.validation(1, asdict(Evaluation(math.nan, 10, math.inf, -math.inf)))
    (record,) = read_jsonl(folder.validation_file)
    assert (record["loss"], record["perplexity"], record["bits_per_byte"]) == (None, None, None)
    draw_loss_curve(folder, bytes_per_token=1.0)
    values = {"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf}, "d": "NaN"}
    assert json.loads(json_text(values)) == {"a": [None, [1.5, None]], "b": {"c": None}, "d": "NaN"}


def test_no_file_has_no_lines(folder):
    assert read_jsonl(folder.metrics_file) == []


def test_the_curve_is_a_picture(folder):
    folder.metrics_file.write_text("".join(json.dumps({"step": n, "loss": 5.0 / n}) + "\n" for n in range(1, 9)))
    draw_loss_curve(folder, bytes_per_token=1.0)
    alone = folder.curve_file.read_bytes()
    assert alone.startswith(b"\x89PNG")
    folder.validation_file.write_text('{"step": 8, "bits_per_byte": 1.0}\n')
    draw_loss_curve(folder, bytes_per_token=1.0)
    assert folder.curve_file.read_bytes() != alone
