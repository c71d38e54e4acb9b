import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEYS = {"parameters", "flops_per_token", "peak_gpu_bytes", "peak_host_bytes", "step_seconds", "longest_sequence"}


def run(*words, **given):
    command = [sys.executable, "-m", "longnet_dist", "plan", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **given)


def test_a_configuration_from_standard_input():
    text = (ROOT / "longnet_dist/config/runs/quickstart.yaml").read_text()
    printed = run("-", "--device", "h100", "--json", input=text)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout == run("quickstart", "--device", "h100", "--json").stdout


def test_json_and_table_say_the_same():
    words = ("paper", "parallel.sequence=4", "--device", "h100")
    printed = run(*words, "--json")
    assert printed.returncode == 0, printed.stderr
    values = json.loads(printed.stdout)
    assert values.keys() >= KEYS
    assert values["ranks"] == {"data": 1, "sequence": 4}
    shown = run(*words).stdout
    assert f"{values['longest_sequence']:,}" in shown
    assert f"{values['parameters']:,}" in shown
    assert f"{values['peak_gpu_bytes'] / 2**30:,.2f}" in shown


def test_mistakes_end_with_one_message_and_status_2():
    result = run("paper", "--device", "abacus")
    assert result.returncode == 2
    assert result.stderr.startswith("error: device must be cpu or one of h100-nvl,")
    assert len(result.stderr.splitlines()) == 1


def test_the_search_for_the_fastest_settings():
    printed = run("paper", "--device", "h100", "--optimize", "--json")
    assert printed.returncode == 0, printed.stderr
    first = json.loads(printed.stdout)["optimized"][0]
    assert first["tokens_per_second"] * first["step_seconds"] == pytest.approx(2**19)
    applied = json.loads(run("paper", "--device", "h100", "--json", *first["settings"].split()).stdout)
    assert applied["step_seconds"] == first["step_seconds"]
    assert applied["fits"]


def test_the_memory_of_the_machine_bounds_the_search():
    words = ("paper", "model.name=1.3b", "data.sequence_length=1048576", "train.batch_size=1", "--device", "h200")
    found = []
    for more in ((), ("--host-memory", "64")):
        printed = run(*words, "train.micro_batch_size=1", "--optimize", "--json", *more)
        assert printed.returncode == 0, printed.stderr
        found.append(json.loads(printed.stdout)["optimized"])
    assert any(one["peak_host_bytes"] > 64 * 2**30 for one in found[0])
    assert found[1]
    assert all(one["peak_host_bytes"] < 64 * 2**30 for one in found[1])


def test_a_table_of_more_and_more_ranks():
    words = ("paper", "data.sequence_length=65536", "train.micro_batch_size=1", "--device", "h100", "--scaling")
    printed = run(*words, "--json", "--fabric", "25", "--gpus-per-host", "4")
    assert printed.returncode == 0, printed.stderr
    scaling = json.loads(printed.stdout)["scaling"]
    assert [row["ranks"] for row in scaling] == [2**power for power in range(11)]
    speeds = [row["tokens_per_second"] / row["ranks"] for row in scaling]
    assert speeds == sorted(speeds, reverse=True)
    assert "1024" in run(*words).stdout
    assert run("paper", "--fabric", "0").returncode == 2


def test_a_run_on_features_is_planned_by_its_longest_file(tmp_path):
    from tests.train.features.slides import write_slides

    write_slides(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {kind: encoder, dim: 32, layers: 2, heads: 2, segment_lengths: [8, 32], dilation_rates: [1, 4],\n"
        "  feature_dim: 12, cls_token: true, pool: cls}\n"
        f"data: {{features: {tmp_path / 'slides'}}}\n"
        f"train: {{output_dir: {tmp_path / 'run'}, steps: 3}}\n"
    )
    (tmp_path / "slides" / "notes.txt").write_text("mine")
    printed = run(str(config), "--device", "h100", "--json")
    assert printed.returncode == 0, printed.stderr
    assert printed.stderr.splitlines()[1].startswith("left out: 1 in ")
    values = json.loads(printed.stdout)
    assert values["peak_gpu_bytes"] > 0
    assert values["fits"]
    assert run(str(config), "--device", "h100").returncode == 0
    (tmp_path / "slides" / "s1.pt").write_bytes(b"no")
    refused = run(str(config), "--device", "h100")
    assert refused.returncode == 2
    assert "s1.pt" in refused.stderr
