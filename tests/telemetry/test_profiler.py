import gzip
import json

import pytest
import torch

from longnet_dist.config.schema import ProfileConfig
from longnet_dist.telemetry.profiler import StepProfiler
from tests.distributed import run_distributed
from tests.train.runs import run, tiny_config


def test_a_run_leaves_a_trace_of_the_steps_that_were_asked_for(tmp_path, corpus):
    settings = ("train.steps=3", "train.profile.first=2", "train.activation_checkpointing=selective")
    config = tiny_config(tmp_path / "run", corpus, *settings)
    assert len(run(2, config)) == 3
    files = sorted(path.name for path in (config.train.output_dir / "profile").iterdir())
    assert files == ["rank0.trace.json.gz", "rank1.trace.json.gz"]
    trace = json.loads(gzip.decompress((config.train.output_dir / "profile" / files[0]).read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    layers = config.model.layers
    assert names.count("_Attention") == layers  # one step of one micro-batch
    assert names.count("autograd::engine::evaluate_function: _AttentionBackward") == layers


def steps_that_fail(folder):
    profiler, written = StepProfiler(ProfileConfig(first=2, steps=3), folder, torch.device("cpu")), []
    for number in (1, 2, 3):
        try:
            with profiler.step(number):
                torch.ones(2).sum()
                if number == 3:
                    raise RuntimeError("no memory")
        except RuntimeError:
            pass
        written.append(folder.exists() and len(list(folder.iterdir())))
    return written


def test_a_step_that_fails_is_the_last_one_in_the_trace(tmp_path):
    assert run_distributed(steps_that_fail, 1, tmp_path / "profile") == [[False, False, 1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_also_leaves_a_snapshot_of_its_memory(tmp_path):
    found = run_distributed(snapshot, 1, tmp_path / "profile", start_method="spawn")  # CUDA may be in use here
    assert found == [["rank0.memory.pickle", "rank0.trace.json.gz"]]


def snapshot(folder):
    with StepProfiler(ProfileConfig(first=1), folder, torch.device("cuda")).step(1):
        torch.ones(2, device="cuda").sum()
    return sorted(path.name for path in folder.iterdir())
