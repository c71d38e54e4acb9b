import os
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.config.model import named_model
from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import CheckpointError
from longnet_dist.inference.evaluation import evaluate
from longnet_dist.inference.stream_state import StreamTask, load_stream_state
from longnet_dist.inference.streamed_evaluation import LAUNCHED_AHEAD, StateFile, evaluate_stream
from longnet_dist.model.longnet import LongNet
from tests.distributed import run_distributed
from tests.train.runs import CPU

ROWS = 1200
TASK = StreamTask("weights", "tokens", "all", ROWS, "torch.float64")


def setup(corpus):
    """A model in float64 whose segments are aligned with no chunk, and a text as one sequence."""
    torch.manual_seed(0)
    mesh = Mesh.build(MeshShape(1, dist.get_world_size()), timedelta(seconds=60))
    pattern = {"segment_lengths": (64, 300, 2000), "dilation_rates": (1, 4, 9)}
    model = LongNet(named_model("tiny", **pattern), group=mesh.sequence_group).double().eval()
    return model, mesh, Windows(TokenFile.open(corpus), "all", ROWS)


def whole(corpus):
    model, mesh, windows = setup(corpus)
    return evaluate(model, windows, ROWS, 1, mesh, CPU)


def in_windows_of_chunks(corpus):
    model, mesh, windows = setup(corpus)
    return evaluate(model, windows, ROWS, 1, mesh, CPU, chunk_length=128)


def streamed(corpus, chunk, state, resume=False):
    model, _, windows = setup(corpus)
    try:
        return evaluate_stream(model, windows, chunk, CPU, StateFile(state, TASK, resume, save_seconds=0.0))
    except CheckpointError as error:
        return error


def interrupted(corpus, chunk, state, number):
    """As :func:`streamed`, but after ``number`` chunks one rank gets a signal to stop."""
    model, _, windows = setup(corpus)
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1
        if passes == number and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    model.norm.register_forward_hook(count)
    try:
        evaluate_stream(model, windows, chunk, CPU, StateFile(state, TASK, False))
    except KeyboardInterrupt:
        return passes
    return None


@pytest.mark.parametrize("number", [11, 12])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_signal_in_the_last_chunks_is_heeded(tmp_path, corpus, number, ahead, monkeypatch):
    monkeypatch.setitem(LAUNCHED_AHEAD, "cpu", ahead)
    state = tmp_path / "state"
    passes = min(number + ahead, 12)
    assert run_distributed(interrupted, 2, corpus, 100, state, number) == [passes] * 2
    assert load_stream_state(state, TASK).row == 100 * passes


@pytest.mark.parametrize(("ranks", "chunk", "ahead"), [(1, 100, 1), (1, 77, 0), (2, 128, 1), (3, 240, 0)])
def test_a_stream_has_the_loss_of_the_whole(tmp_path, corpus, ranks, chunk, ahead, monkeypatch):
    monkeypatch.setitem(LAUNCHED_AHEAD, "cpu", ahead)
    expected = run_distributed(whole, 1, corpus)[0]
    for result in run_distributed(streamed, ranks, corpus, chunk, tmp_path / "state"):
        assert result.tokens == expected.tokens == ROWS
        assert result.loss == pytest.approx(expected.loss, rel=1e-9)
        assert result.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-9)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_validation_can_pass_in_chunks(corpus, ranks):
    expected = run_distributed(whole, 1, corpus)[0]
    for result in run_distributed(in_windows_of_chunks, ranks, corpus):
        assert result.loss == pytest.approx(expected.loss, rel=1e-9)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(("before", "after", "chunk"), [(1, 1, 90), (2, 1, 128), (1, 3, 120)])
def test_an_interrupted_stream_goes_on_where_it_was(tmp_path, corpus, before, after, chunk, ahead, monkeypatch):
    """On another number of ranks and in other chunks too."""
    monkeypatch.setitem(LAUNCHED_AHEAD, "cpu", ahead)
    state = tmp_path / "state"
    assert run_distributed(interrupted, before, corpus, 100, state, 3) == [3 + ahead] * before
    assert load_stream_state(state, TASK).row == 300 + 100 * ahead
    expected = run_distributed(whole, 1, corpus)[0]
    for result in run_distributed(streamed, after, corpus, chunk, state, True):
        assert result.tokens == ROWS
        assert result.loss == pytest.approx(expected.loss, rel=1e-9)
    assert not state.exists()


def test_a_state_without_resume_is_not_read(tmp_path, corpus):
    (tmp_path / "state").write_bytes(b"nothing")
    assert run_distributed(streamed, 1, corpus, 600, tmp_path / "state")[0].tokens == ROWS
    (tmp_path / "state").write_bytes(b"nothing")
    error = run_distributed(streamed, 1, corpus, 600, tmp_path / "state", True)[0]
    assert isinstance(error, CheckpointError)


def test_resume_without_a_state_begins_anew(tmp_path, corpus):
    assert run_distributed(streamed, 1, corpus, 600, tmp_path / "state", True)[0].tokens == ROWS
