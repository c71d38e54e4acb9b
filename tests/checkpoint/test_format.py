import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet_dist.checkpoint.format import (
    checkpoint_folder,
    load_weights,
    newest_checkpoint,
    read_state,
)
from longnet_dist.checkpoint.writer import take_snapshot
from longnet_dist.config.model import LongNetConfig
from longnet_dist.data.batches import Batches
from longnet_dist.errors import CheckpointError
from longnet_dist.model.longnet import LongNet
from tests.distributed import run_distributed
from tests.train.runs import make_trainer, run, tiny_config

TENSORS = ("model", "exp_avg", "exp_avg_sq")


def run_and_resume(tmp_path, corpus, before, after):
    """Six steps at once, and three of them again from a checkpoint, on another layout if asked."""
    whole = tiny_config(tmp_path / "whole", corpus, "train.steps=6", "train.checkpoint_every=3", *before[1])
    expected = run(before[0], whole)
    folder = tmp_path / "resumed"
    folder.mkdir()
    start = checkpoint_folder(whole.train.output_dir, 3)
    shutil.copytree(start, checkpoint_folder(folder, 3))
    shutil.copy(whole.train.output_dir / "metrics.jsonl", folder)
    resumed = tiny_config(folder, corpus, "train.steps=6", *after[1])
    metrics = run(after[0], resumed)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in metrics] == [line["tokens"] for line in expected]
    ends = [checkpoint_folder(config.train.output_dir, 6) for config in (whole, resumed)]
    tensors = [{name: load_file(end / f"{name}.safetensors") for name in TENSORS} for end in ends]
    return expected, metrics, *tensors


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_is_the_same_run_to_the_last_bit(tmp_path, corpus, stage):
    layout = (2, (f"deepspeed.zero_stage={stage}", "model.dim=30", "model.positions=none"))  # shards need padding
    check_bits(*run_and_resume(tmp_path, corpus, layout, layout))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_so_is_a_resumed_run_in_bf16(tmp_path, corpus, stage):
    layout = (2, (f"deepspeed.zero_stage={stage}", "train.precision=bf16", "train.micro_batch_size=2"))
    check_bits(*run_and_resume(tmp_path, corpus, layout, layout))


def states_and_passes(config):
    """The state right after resuming, and how often the model or the data were needed for it."""
    needed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LongNet, "forward", lambda *_, **__: needed.append("forward"))
        patch.setattr(Batches, "local", lambda *_, **__: needed.append("rows"))
        trainer = make_trainer(config)
    return take_snapshot(trainer.engine), needed


HOST = ("deepspeed.offload_optimizer=true", "train.precision=bf16")


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        *((stage, ()) for stage in range(4)),
        *((stage, ("train.precision=bf16",)) for stage in (1, 2, 3)),
        *((stage, HOST) for stage in (2, 3)),
    ],
    ids=str,
)
def test_resuming_takes_no_pass_through_the_model(tmp_path, corpus, stage, settings):
    settings = (f"deepspeed.zero_stage={stage}", "model.dim=30", "model.positions=none", *settings)
    config = tiny_config(tmp_path / "run", corpus, "train.steps=2", *settings)
    run(2, config)
    saved = checkpoint_folder(config.train.output_dir, 2)
    (snapshot, needed), _ = run_distributed(states_and_passes, 2, config)
    assert needed == []
    for name in TENSORS:
        tensors = load_file(saved / f"{name}.safetensors")
        assert all(torch.equal(snapshot[f"{name}.safetensors"][key], tensors[key]) for key in tensors), name


def check_bits(expected, metrics, whole, resumed):
    for old, new in zip(expected, metrics, strict=True):
        assert (old["loss"], old["grad_norm"], old["lr"]) == (new["loss"], new["grad_norm"], new["lr"])
    for name in TENSORS:
        assert whole[name].keys() == resumed[name].keys()
        assert all(torch.equal(whole[name][key], resumed[name][key]) for key in whole[name]), name


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 0), (2, 3)), ((2, 3), (3, 1)), ((3, 2), (1, 0)), ((2, 1), (4, 3))],
    ids=lambda layout: f"{layout[0]} ranks stage {layout[1]}",
)
def test_any_layout_resumes_from_any_other(tmp_path, corpus, before, after):
    layouts = [(world_size, (f"deepspeed.zero_stage={stage}",)) for world_size, stage in (before, after)]
    expected, metrics, whole, resumed = run_and_resume(tmp_path, corpus, *layouts)
    for old, new in zip(expected, metrics, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
        assert new["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-4)
    for key, weight in whole["model"].items():
        torch.testing.assert_close(resumed["model"][key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layouts", [((1, 1), (2, 1), (4, 1), (3, 1)), ((2, 1), (2, 3), (2, 2))], ids=["1, 2, 4, 3 ranks", "ZeRO 1, 3, 2"]
)
def test_a_run_that_moves_again_and_again_follows_the_undisturbed_one(tmp_path, corpus, layouts):
    """Two steps on each layout: the losses are those of all steps on the first."""
    length, moving = 2 * len(layouts), tmp_path / "moving"
    schedule = (f"train.steps={length}", "train.checkpoint_every=2", "train.keep_last=0")
    for number, (world_size, stage) in enumerate(layouts):
        config = tiny_config(moving, corpus, *schedule, f"deepspeed.zero_stage={stage}")
        metrics = run(world_size, config)
        assert [line["step"] for line in metrics] == list(range(1, length + 1))
        if number == 0:
            expected = metrics
        for later in range(2 * number + 4, length + 1, 2):  # as if it had ended after its two steps
            shutil.rmtree(checkpoint_folder(moving, later))
    worst = max(abs(new["loss"] / old["loss"] - 1) for old, new in zip(expected, metrics, strict=True))
    print(f"(ranks, ZeRO stage) {layouts}: losses differ by {worst:.1e} at most")
    assert worst < 1e-6


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    config = tiny_config(tmp_path_factory.mktemp("trained") / "run", corpus, "train.steps=1")
    run(1, config)
    return config


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(checkpoint_folder(trained.train.output_dir, 1), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_weights_load_into_a_plain_model(trained, checkpoint):
    model = LongNet(trained.model)
    load_weights(checkpoint, model)
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def test_state_of_a_whole_checkpoint(trained, checkpoint):
    state = read_state(checkpoint, trained.model)
    assert (state.step, state.tokens) == (1, 256)
    assert LongNetConfig(**state.model) == trained.model


@pytest.mark.parametrize(("field", "value"), [("heads", 4), ("dilation_rates", (1, 2, 8)), ("tie_embeddings", True)])
def test_another_model_is_named_by_its_first_field(trained, checkpoint, field, value):
    other = trained.model.model_copy(update={field: value})
    with pytest.raises(CheckpointError, match=rf"another model: model\.{field} is "):
        read_state(checkpoint, other)


def test_fields_that_came_later_count_at_their_defaults(trained, checkpoint):
    fields = json.loads((checkpoint / "state.json").read_text())
    for name in ("attention", "window", "full_layers"):
        del fields["model"][name]
    (checkpoint / "state.json").write_text(json.dumps(fields | {"digest": None}))
    assert read_state(checkpoint, trained.model).step == 1
    with pytest.raises(CheckpointError, match=r"model\.attention is 'dilated' there and 'full' here"):
        read_state(checkpoint, trained.model.model_copy(update={"attention": "full"}))


def test_memory_settings_may_change(trained, checkpoint):
    read_state(checkpoint, trained.model.model_copy(update={"loss_chunk": 7}))


def test_a_flipped_bit_is_found(checkpoint):
    file = checkpoint / "exp_avg.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"exp_avg.*damaged"):
        read_state(checkpoint)


def test_a_missing_tensor_file_is_found(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        read_state(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1}', '{"format": 9}'])
def test_a_foreign_state_is_refused(checkpoint, text):
    (checkpoint / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged or of another version"):
        read_state(checkpoint)


def test_a_later_format_is_refused(checkpoint):
    fields = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(fields | {"format": 2}))
    with pytest.raises(CheckpointError, match="has format 2"):
        read_state(checkpoint)


def test_newest_counts_complete_checkpoints_only(trained, tmp_path):
    assert newest_checkpoint(trained.train.output_dir).name == "step_00000001"
    shutil.copytree(trained.train.output_dir, tmp_path / "copy")
    save_file({}, tmp_path / "copy" / "checkpoints" / "rest.safetensors")
    (tmp_path / "copy" / "checkpoints" / ".step_00000002.partial").mkdir()
    assert newest_checkpoint(tmp_path / "copy").name == "step_00000001"
    with pytest.raises(CheckpointError, match="neither a checkpoint nor"):
        newest_checkpoint(tmp_path / "nothing")
