import pytest
import torch.distributed as dist

from longnet_dist.attention import functional
from longnet_dist.attention.kernels.registry import choose_kernel
from longnet_dist.checkpoint.run_folder import ResumePoint
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.comm.mesh import MeshShape
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import CheckpointError, ConfigError, DataError, ShapeError
from longnet_dist.train.deepspeed_engine import prepare_deepspeed
from longnet_dist.train.loop import Trainer
from longnet_dist.train.setup import RunSetup
from longnet_dist.train.start import Start
from tests.distributed import run_distributed
from tests.train.runs import import_deepspeed, make_trainer, run, tiny_config


def test_a_plan_fills_in_what_was_left_open(tmp_path, corpus):
    plan = RunSetup.make(tiny_config(tmp_path / "run", corpus, "parallel.data=2"), 4, "cpu")
    assert (plan.precision, plan.mesh, plan.micro_batch_size, plan.accumulation) == ("fp32", MeshShape(2, 2), 2, 1)
    assert (plan.chunk_length, plan.passes) == (64, 1)
    assert plan.resume == ResumePoint()
    resolved = plan.resolved(plan.open_token_file())
    assert resolved["parallel"] | resolved["train"] | resolved["data"] == resolved["parallel"] | resolved["train"] | {
        "path": str(corpus),
        "cache_dir": "data",
        "sequence_length": 64,
        "documents": False,
        "packing": "contiguous",
    }
    assert (resolved["parallel"]["sequence"], resolved["train"]["micro_batch_size"]) == (2, 2)


def test_bf16_is_the_precision_of_a_gpu(tmp_path, corpus):
    assert RunSetup.make(tiny_config(tmp_path / "run", corpus), 1, "cuda").precision == "bf16"


def test_positions_that_cannot_span_the_sequence_are_refused(tmp_path, corpus):
    settings = ("model.segment_lengths=[8,96]", "model.dilation_rates=[1,4]", "data.sequence_length=96")
    config = tiny_config(tmp_path / "run", corpus, "model.positions=xpos", "model.xpos_base=1", *settings)
    with pytest.raises(ConfigError, match="use xpos_base=2 or more, or rope"):
        RunSetup.make(config, 1, "cpu")


def test_micro_batches_make_up_the_batch(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus, "train.batch_size=12", "train.micro_batch_size=2")
    assert RunSetup.make(config, 1, "cpu").accumulation == 6


def test_chunks_make_up_the_sequence(tmp_path, corpus):
    settings = ("train.batch_size=4", "train.micro_batch_size=2", "train.chunk_length=20")
    plan = RunSetup.make(tiny_config(tmp_path / "run", corpus, *settings), 1, "cpu")
    assert (plan.accumulation, plan.chunk_length, plan.passes) == (2, 20, 8)
    plan = RunSetup.make(tiny_config(tmp_path / "run", corpus, "train.chunk_length=64"), 1, "cpu")
    assert (plan.chunk_length, plan.passes) == (64, 1)


@pytest.mark.parametrize(
    ("settings", "world_size", "error", "message"),
    [
        (("parallel.sequence=3",), 4, ConfigError, "must make up the world"),
        (("parallel.data=3",), 3, ConfigError, r"use train\.batch_size=6"),
        (("train.micro_batch_size=3",), 1, ConfigError, r"micro-batches of 3 on 1 data ranks; use train\.batch_size=6"),
        (("data.sequence_length=5",), 4, ShapeError, "5 rows over 4 ranks"),
        (("train.chunk_length=13",), 3, ConfigError, "but 13 is none of 3; use 15"),
        (("data.sequence_length=61", "train.chunk_length=20"), 4, ShapeError, "1 rows over 4 ranks"),
        (("data.sequence_length=1000000",), 1, DataError, r"use at most data\.sequence_length="),
        (("data.path=nowhere.tokens",), 1, DataError, "there is no token file nowhere.tokens"),
        (("model.vocab_size=100",), 1, DataError, "vocabulary ends at 99"),
        (("train.resume=nowhere",), 1, CheckpointError, "neither a checkpoint"),
    ],
)
def test_what_cannot_work_is_refused_before_ranks_meet(tmp_path, corpus, settings, world_size, error, message):
    config = tiny_config(tmp_path / "run", corpus, *settings)
    with pytest.raises(error, match=message):
        RunSetup.make(config, world_size, "cpu")
    assert not (tmp_path / "run").exists()


def test_bf16_without_sharding_is_refused_where_it_is_the_default(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus, "deepspeed.zero_stage=0")
    assert RunSetup.make(config, 1, "cpu").precision == "fp32"
    with pytest.raises(ConfigError, match=r"use deepspeed\.zero_stage=1"):
        RunSetup.make(config, 1, "cuda")


def test_a_checkpoint_of_another_model_is_refused_and_left_alone(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus, "train.steps=1")
    run(1, config)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.heads is 2 there and 4 here"):
        RunSetup.make(tiny_config(tmp_path / "run", corpus, "model.heads=4"), 1, "cpu")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def default_corpus(config, cache_dir):
    data = config.data.model_copy(update={"path": None, "cache_dir": cache_dir})
    plan = make_trainer(config).plan
    plan = RunSetup.make(config.model_copy(update={"data": data}), plan.mesh.sequence, "cpu")
    try:
        return plan.open_token_file().header.num_tokens
    except DataError as error:
        return str(error)


def test_the_standard_library_is_prepared_once_for_all_ranks(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus)
    sizes = run_distributed(default_corpus, 2, config, tmp_path / "cache")
    assert sizes[0] == sizes[1] > 5_000_000
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(b"something else")
    messages = run_distributed(default_corpus, 2, config, tmp_path / "cache")
    assert messages[0] == messages[1]
    assert str(file) in messages[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.attention_backend=sdpaa",), r"train\.attention_backend must be one of auto, flash, .*mean sdpa\?"),
        (("train.attention_backend=flash",), r"backend 'flash' runs on a GPU.*; use 'auto'"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_ranks_meet(tmp_path, corpus, settings, message):
    with pytest.raises(ConfigError, match=message):
        RunSetup.make(tiny_config(tmp_path / "run", corpus, *settings), 2, "cpu")


@pytest.mark.parametrize("settings", [(), ("train.activation_checkpointing=selective",)], ids=["modules", "engine"])
def test_the_backend_reaches_every_block(tmp_path, corpus, settings, monkeypatch):
    """What is asked for is what the attention of a step and of a validation chooses its kernel by."""
    chosen = set()

    def note(backend, device, dtype, deterministic=False):
        chosen.add((backend, deterministic))
        return choose_kernel(backend, device, dtype, deterministic)

    monkeypatch.setattr(functional, "choose_kernel", note)
    asked = ("train.attention_backend=reference", "train.deterministic=true", "train.validate_every=1")
    config = tiny_config(tmp_path / "run", corpus, "train.steps=1", *asked, *settings)
    import_deepspeed()
    attentions = run_distributed(_attentions_of_a_run, 1, config, chosen)[0]
    assert attentions == (2 * [("reference", True)], {("reference", True)})


def _attentions_of_a_run(config, chosen):
    trainer = make_trainer(config)
    trainer.run()
    blocks = trainer.engine.module.blocks
    return [(block.self_attn.backend, block.self_attn.deterministic) for block in blocks], chosen


def test_a_run_opens_its_token_file_once(tmp_path, corpus, monkeypatch):
    opened, really = [], TokenFile.open.__func__
    noted = classmethod(lambda cls, path, **how: opened.append(path) or really(cls, path, **how))
    monkeypatch.setattr(TokenFile, "open", noted)
    import_deepspeed()
    config = tiny_config(tmp_path / "run", corpus, "train.steps=1", "train.validate_every=1")
    assert run_distributed(_files_opened, 2, config, opened) == [[corpus], [corpus]]


def _files_opened(config, opened):
    launch = LaunchEnvironment(dist.get_rank(), 2, dist.get_rank(), 2)
    start = Start(config, launch)
    start.facts()
    prepare_deepspeed(launch, start.device)
    Trainer(start.plan, start.device).run()
    return opened
