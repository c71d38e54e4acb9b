import json
import os

import pytest

from benchmarks import training_scaling


@pytest.mark.parametrize("sockets", [False, True])
def test_runs_inherit_what_nccl_is_told(monkeypatch, tmp_path, sockets, capsys):
    for name in training_scaling.SOCKETS:
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    seen = []

    def metrics_of_run(config, folder, gpus, settings, device):
        seen.append({name: os.environ.get(name) for name in training_scaling.SOCKETS})
        assert f"parallel.sequence={gpus}" in settings
        return [{"step_seconds": seconds / gpus} for seconds in (9.0, 9.0, 9.0, 2.0, 2.0)]

    monkeypatch.setattr(training_scaling, "metrics_of_run", metrics_of_run)
    words = ["paper", "--gpus", "1", "2", "--rows", "1000", "--strong", "--output", str(tmp_path / "found.json")]
    training_scaling.main([*words, *["--sockets"] * sockets])
    found = json.loads((tmp_path / "found.json").read_text())
    assert seen == [training_scaling.SOCKETS if sockets else dict.fromkeys(training_scaling.SOCKETS)] * 2
    assert training_scaling.SOCKETS.items() <= found["nccl"].items() or not sockets
    assert [point["tokens_per_second"] for point in found["points"]] == [500, 1000]
    assert "efficiency 1.000" in capsys.readouterr().out
