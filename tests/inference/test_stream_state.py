from dataclasses import replace

import pytest
import torch

from longnet_dist.errors import CheckpointError
from longnet_dist.inference.stream_state import StreamState, StreamTask, load_stream_state, save_stream_state

TASK = StreamTask("weights", "tokens", "all", 100, "torch.float32")


def test_a_state_is_read_as_it_was_written(tmp_path):
    carried = [torch.randn(4, 2, 6, dtype=torch.float64) for _ in range(12)]
    state = StreamState(40, 1 / 3, 39, carried)
    save_stream_state(tmp_path / "state", TASK, StreamState(20, 1.0, 20, carried[:1]))
    save_stream_state(tmp_path / "state", TASK, state)
    found = load_stream_state(tmp_path / "state", TASK)
    assert (found.row, found.loss_sum, found.num_labels) == (40, 1 / 3, 39)
    for actual, expected in zip(found.carried, carried, strict=True):
        assert torch.equal(actual, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_nothing_may_be_carried(tmp_path):
    save_stream_state(tmp_path / "state", TASK, StreamState(40, 2.0, 39, []))
    assert load_stream_state(tmp_path / "state", TASK).carried == []


@pytest.mark.parametrize(("field", "value"), [("weights", "others"), ("tokens", "x"), ("split", "train"), ("rows", 9)])
def test_a_state_of_another_task_is_refused(tmp_path, field, value):
    save_stream_state(tmp_path / "state", TASK, StreamState(40, 2.0, 39, []))
    with pytest.raises(CheckpointError, match=f"another evaluation: its {field} is"):
        load_stream_state(tmp_path / "state", replace(TASK, **{field: value}))


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_refused(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(CheckpointError, match="no state of a streamed evaluation"):
        load_stream_state(tmp_path / "state", TASK)


def test_a_truncated_state_is_refused(tmp_path):
    save_stream_state(tmp_path / "state", TASK, StreamState(40, 2.0, 39, [torch.randn(4, 2, 6)]))
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="no state of a streamed evaluation"):
        load_stream_state(tmp_path / "state", TASK)
