import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from longnet_dist.checkpoint.zero_tensors import full_tensor, held_range, link_optimizer_states, set_held
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.model import named_model
from longnet_dist.config.schema import TrainConfig
from longnet_dist.errors import ConfigError
from longnet_dist.model.longnet import LongNet
from longnet_dist.private_interfaces import default_store
from longnet_dist.train import deepspeed_engine
from longnet_dist.train.deepspeed_engine import build_optimizer, prepare_deepspeed, unread_keys
from tests.distributed import run_distributed
from tests.train.runs import make_trainer, tiny_config

TRAIN = TrainConfig(output_dir="run", steps=1, weight_decay=0.3)


def test_only_matrices_decay():
    model = LongNet(named_model("tiny"))
    decayed, others = build_optimizer(model, TRAIN).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {name for name in names.values() if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))}
    assert {names[id(parameter)] for parameter in decayed["params"]} == matrices | {"head.weight"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_a_model_without_vectors_has_one_group():
    assert len(build_optimizer(nn.Linear(2, 3, bias=False), TRAIN).param_groups) == 1


@pytest.mark.parametrize("version", ["0.19.5", "0.19.6", "0.19.7"])
def test_versions_that_destroy_a_model_are_refused(monkeypatch, version):
    monkeypatch.setattr(deepspeed_engine, "version", lambda name: version)
    with pytest.raises(ConfigError, match=rf"DeepSpeed {version} makes every weight NaN .*install 0\.19\.8 or newer"):
        prepare_deepspeed(LaunchEnvironment(), torch.device("cpu"))


def write_and_read_back(config):
    trainer = make_trainer(config)
    trainer._train_step(0, learning_rate=0.0)
    link_optimizer_states(trainer.engine)
    for state in (None, "exp_avg", "exp_avg_sq"):
        for number, parameter in enumerate(trainer.engine.module.parameters()):
            shape = full_tensor(trainer.engine, parameter, state).shape
            value = torch.arange(shape.numel(), dtype=torch.float32).reshape(shape) + number
            first, last = held_range(trainer.engine, parameter, value.numel())
            set_held(trainer.engine, parameter, value.flatten()[first:last], state)
            assert torch.equal(full_tensor(trainer.engine, parameter, state), value)
    return True


def test_tensors_written_in_shards_are_read_back_whole(tmp_path, corpus):
    for stage in range(4):
        # 3 ranks: the shards of most tensors need padding
        config = tiny_config(tmp_path / f"stage{stage}", corpus, f"deepspeed.zero_stage={stage}")
        assert all(run_distributed(write_and_read_back, 3, config))


def test_importing_the_package_neither_imports_deepspeed_nor_sets_variables():
    program = (
        "import os, sys; before = dict(os.environ); import longnet_dist.train.loop; "
        "assert 'deepspeed' not in sys.modules; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)


def move_weights_and_view_again(config):
    trainer = make_trainer(config)
    optimizer = trainer.engine.optimizer
    for group, weights in enumerate(optimizer.bit16_groups_flat):
        before = [parameter.clone() for parameter in optimizer.bit16_groups[group]]
        weights.data = weights.data.clone()
        optimizer._update_model_bit16_weights(group)
        for parameter, value in zip(optimizer.bit16_groups[group], before, strict=True):
            assert parameter.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr()
            assert torch.equal(parameter, value)
    return True


def test_parameters_follow_weights_that_move(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus, "deepspeed.zero_stage=2")
    assert all(run_distributed(move_weights_and_view_again, 2, config))


@pytest.mark.parametrize(
    ("extra", "key", "near"),
    [
        ({"gradient_clippping": 1}, "gradient_clippping", "gradient_clipping"),
        ({"wall_clock_brekdown": True, "comms_logger": {}}, "wall_clock_brekdown", "wall_clock_breakdown"),
        ({"comms_logger": {"verbos": True}}, "comms_logger.verbos", "verbose"),
    ],
)
def test_a_key_that_deepspeed_does_not_read_is_said(extra, key, near):
    (line,) = unread_keys({"wall_clock_breakdown": True} | extra)
    assert line.startswith(f"deepspeed.extra.{key} is read by nothing in DeepSpeed ")
    assert line.endswith(f"the nearest key is {near}")


def test_no_key_needs_no_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert unread_keys({}) == []


def wait_for_a_rank_that_hangs(config):
    """Rank 1 comes to no collective of the optimizer's group before rank 0 has given up."""
    optimizer, store = make_trainer(config).engine.optimizer, default_store()
    group = getattr(optimizer, "dp_process_group", None)
    if dist.get_rank() == 1:
        store.wait(["given up"])
        return None
    try:
        dist.all_reduce(torch.ones(3), group=group)
    except RuntimeError as error:
        return str(error)
    finally:
        store.set("given up", "")


@pytest.mark.parametrize("stage", [1, 3])
def test_the_time_out_holds_in_the_group_that_deepspeed_makes(tmp_path, corpus, stage):
    settings = ("parallel.timeout_minutes=0.03", f"deepspeed.zero_stage={stage}")
    message, _ = run_distributed(wait_for_a_rank_that_hangs, 2, tiny_config(tmp_path / "run", corpus, *settings))
    assert "imed out" in message
