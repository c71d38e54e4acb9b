import contextlib
import gc
import math
from itertools import product
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.data.batches import Batches, objective
from longnet_dist.data.token_file import TokenFile
from longnet_dist.estimate.model_cost import num_parameters
from longnet_dist.model.longnet import LongNet
from longnet_dist.optim.schedules import learning_rate
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train import conclusion
from longnet_dist.train.deepspeed_engine import build_optimizer
from tests.distributed import run_distributed
from tests.train.runs import make_trainer, run, tiny_config

MASKED = ("model.causal=false", "model.positions=rope")
UNEVEN = ("data.sequence_length=61", "model.segment_lengths=[16,40,64]")


def plain_torch(config):
    """The same training without DeepSpeed, ranks or shards: losses, gradient norms, weights."""
    torch.manual_seed(config.train.seed)
    model = LongNet(config.model)
    optimizer = build_optimizer(model, config.train)
    train, length = config.train, config.data.sequence_length
    token_file = TokenFile.open(config.data.path)
    batches = Batches(token_file, "train", length, train.batch_size, train.seed, **objective(config.model))
    curve = []
    for step in range(train.steps):
        loss = model(*batches.local(step)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, train)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (1, ("deepspeed.zero_stage=0",)),
        (2, ("deepspeed.zero_stage=0", "parallel.data=2", "train.micro_batch_size=1")),
        (3, ("deepspeed.zero_stage=0", *UNEVEN)),
        (2, ("deepspeed.zero_stage=1",)),
        (2, ("deepspeed.zero_stage=1", "train.micro_batch_size=1", *MASKED)),
        (4, ("deepspeed.zero_stage=2", "parallel.sequence=2", "parallel.data=2", *UNEVEN)),
        (3, ("deepspeed.zero_stage=3", *MASKED, *UNEVEN)),
        (4, ("deepspeed.zero_stage=3", "parallel.data=2", "train.micro_batch_size=1")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_run_on_any_mesh_and_stage_is_plain_training(tmp_path, corpus, world_size, settings):
    config = tiny_config(tmp_path / "run", corpus, "train.clip_norm=1", *settings)
    metrics = run(world_size, config)
    curve, weights = plain_torch(config)
    assert len(metrics) == config.train.steps
    for line, (loss, norm) in zip(metrics, curve, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert max(norm for _, norm in curve) > config.train.clip_norm  # so that clipping is tested too
    saved = load_file(newest_checkpoint(config.train.output_dir) / "model.safetensors")
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight.detach(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_like_fp32_to_its_rounding(tmp_path, corpus, stage):
    settings = ("parallel.data=1", f"deepspeed.zero_stage={stage}")
    exact = run(2, tiny_config(tmp_path / "fp32", corpus, *settings))
    rounded = run(2, tiny_config(tmp_path / "bf16", corpus, "train.precision=bf16", *settings))
    for line, rounded_line in zip(exact, rounded, strict=True):
        assert rounded_line["loss"] == pytest.approx(line["loss"], rel=1e-2)
        assert rounded_line["loss"] != line["loss"]
        assert rounded_line["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-1)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_in_chunks_is_training(tmp_path, corpus, stage, world_size):
    """Chunks aligned with no segment, several micro-batches, clipping: the losses and norms of whole sequences."""
    settings = ("model.segment_lengths=[16,36,64]", "data.sequence_length=62", f"deepspeed.zero_stage={stage}")
    settings = (*settings, "train.micro_batch_size=2", "train.clip_norm=1", "parallel.data=1", "train.steps=2")
    whole = run(world_size, tiny_config(tmp_path / "whole", corpus, *settings))
    chunks = run(world_size, tiny_config(tmp_path / "chunks", corpus, *settings, "train.chunk_length=26"))
    for line, expected in zip(chunks, whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)


TILES = ("train.activation_checkpointing=selective", "train.feed_forward_tile=20")
HOST = ("train.activation_checkpointing=full", "train.offload_activations=true", "train.chunk_length=26")


@pytest.mark.parametrize(
    ("world_size", "stage", "saving"), [(1, 0, HOST), (2, 1, TILES), (2, 2, HOST), (2, 3, TILES), (1, 3, HOST)]
)
def test_saving_memory_is_training(tmp_path, corpus, world_size, stage, saving):
    settings = ("model.segment_lengths=[16,36,64]", "data.sequence_length=62", f"deepspeed.zero_stage={stage}")
    settings = (*settings, "train.micro_batch_size=2", "train.clip_norm=1", "parallel.data=1", "train.steps=2")
    plain = run(world_size, tiny_config(tmp_path / "plain", corpus, *settings))
    saved = run(world_size, tiny_config(tmp_path / "saved", corpus, *settings, *saving))
    for line, expected in zip(saved, plain, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_an_optimizer_on_the_host_is_the_optimizer(tmp_path, corpus):
    settings = ("deepspeed.zero_stage=2", "train.clip_norm=1", "train.precision=bf16")
    plain = run(2, tiny_config(tmp_path / "plain", corpus, *settings))
    moved = run(2, tiny_config(tmp_path / "moved", corpus, *settings, "deepspeed.offload_optimizer=true"))
    for line, expected in zip(moved, plain, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_chunks_with_validation_on_data_ranks(tmp_path, corpus):
    settings = ("parallel.data=2", "deepspeed.zero_stage=3", "train.validate_every=1", "train.validation_tokens=420")
    for name, chunk in (("whole", 64), ("chunks", 24)):
        run(4, tiny_config(tmp_path / name, corpus, *settings, "train.steps=1", f"train.chunk_length={chunk}"))
    whole, chunks = (read_jsonl(tmp_path / name / "validation.jsonl") for name in ("whole", "chunks"))
    for line, expected in zip(chunks, whole, strict=True):
        assert line["tokens"] == expected["tokens"] == 420
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_run_may_leave_no_checkpoint(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus, "train.checkpoint_every=0", "train.sample_tokens=3")
    assert len(run(1, config)) == 4
    left = {path.name for path in config.train.output_dir.iterdir()}
    assert left == {"config.yaml", "loss.png", "metrics.jsonl", "tensorboard", "tokenizer.json", "validation.jsonl"}


def test_what_a_run_leaves(tmp_path, corpus, capfd):
    config = tiny_config(
        tmp_path / "run",
        corpus,
        "train.steps=5",
        "train.validate_every=2",
        "train.checkpoint_every=2",
        "train.keep_last=2",
        "train.sample_tokens=3",
        "train.sample_prompt=import",
    )
    metrics = run(2, config)
    folder = config.train.output_dir
    keys = ["step", "loss", "grad_norm", "lr", "tokens", "step_seconds", "tokens_per_second", "skipped"]
    keys += ["tflops_per_gpu", "peak_memory_allocated"]
    assert [list(line) for line in metrics] == [keys] * 5
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert [line["tokens"] for line in metrics] == [256, 512, 768, 1024, 1280]
    assert metrics[-1]["lr"] == learning_rate(5, config.train)
    assert [line["step"] for line in read_jsonl(folder / "validation.jsonl")] == [2, 4, 5]
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000004", "step_00000005"]
    assert (folder / "sample.txt").read_text().startswith("import")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["parallel"]["sequence"] == 2
    assert resolved["train"]["precision"] == "fp32"
    out, err = capfd.readouterr()
    assert "bits per byte after 5 steps" in out
    assert "5/5" in err
    assert "1/5" not in err, "a file keeps each line of the bar, so it takes one in ten seconds"
    assert "DeepSpeed" not in out + err


def fail_at_sample(config, error):
    """Train, with a sample that fails; whether the run was complete."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conclusion, "continue_text", Mock(side_effect=error))
        return make_trainer(config).run()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel")], ids=str)
def test_a_sample_that_fails_is_a_message_and_no_failed_run(tmp_path, corpus, capfd, error):
    config = tiny_config(tmp_path / "run", corpus, "train.steps=1", "train.sample_tokens=3")
    assert run_distributed(fail_at_sample, 2, config, error) == [True, True]
    out, _ = capfd.readouterr()
    assert f"no sample could be written ({error}); the run is complete" in out
    assert not (config.train.output_dir / "sample.txt").exists()


def bytes_at_sample(config):
    """Bytes of tensors that are alive when the sample is begun, less those before training, over the weights'."""

    def alive():
        storages = {}
        for tensor in gc.get_objects():
            # Other tests leave tensors of compilers and transforms behind, which have no memory: subclasses with
            # symbolic sizes, and wrappers of torch.func, which have no storage.
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                with contextlib.suppress(NotImplementedError):
                    storages[tensor.untyped_storage()._cdata] = int(tensor.untyped_storage().nbytes())
        return sum(storages.values())

    def measure(*_):
        gc.collect()
        found.append(alive() - before)
        return ["text"]

    found, before = [], alive()
    trainer = make_trainer(config)
    weights = 4 * num_parameters(config.model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conclusion, "continue_text", measure)
        trainer.run()
    return found[0] / weights


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), *product((1, 2, 3), ("fp32", "bf16"))])
def test_a_sample_finds_the_memory_of_training_free(tmp_path, corpus, stage, precision):
    settings = (f"deepspeed.zero_stage={stage}", f"train.precision={precision}")
    config = tiny_config(tmp_path / "run", corpus, "train.steps=1", "train.sample_tokens=3", *settings)
    (share,) = run_distributed(bytes_at_sample, 1, config)
    assert share < 0.5  # the rows of a batch and the tables of positions, which are small; an engine has 3 and more


def test_training_learns(tmp_path, corpus):
    metrics = run(2, tiny_config(tmp_path / "run", corpus, "train.steps=30", "parallel.data=2"))
    assert metrics[0]["loss"] > math.log(256) - 1
    assert metrics[-1]["loss"] < 0.75 * metrics[0]["loss"]
