import json

import torch
import torch.distributed as dist

from longnet_dist.comm.flight_recorder import record_collectives, write_collectives
from tests.distributed import run_distributed


def test_what_torch_is_told_already_is_left_alone(tmp_path):
    environ = {"TORCH_FR_BUFFER_SIZE": "7"}
    record_collectives(tmp_path, 50, environ)
    assert environ == {
        "TORCH_FR_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "rank_"),
    }


def last_collectives(folder):
    """Run three collectives with a recorder for two; return what it recorded."""
    for rows in (3, 4, 5):
        dist.all_reduce(torch.ones(rows))
    written = json.loads(write_collectives(folder, dist.get_rank()).read_text())
    return [(entry["profiling_name"], entry["input_sizes"]) for entry in written["entries"]]


def test_the_last_collectives_of_every_rank_are_written(tmp_path, monkeypatch):
    environ = {}
    record_collectives(tmp_path / "folder", 2, environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    # Spawned: torch's recorder is as large as a process's first collective made it.
    found = run_distributed(last_collectives, 2, tmp_path / "folder", start_method="spawn")
    assert found == [[("gloo:all_reduce", [[4]]), ("gloo:all_reduce", [[5]])]] * 2
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["rank_0.json", "rank_1.json"]
