"""Tiny runs for the tests of training."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.loading import load_config
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train.deepspeed_engine import prepare_deepspeed
from longnet_dist.train.loop import trainer_of
from longnet_dist.train.setup import RunSetup
from tests.distributed import run_distributed

CPU = torch.device("cpu")
# Adam divides a gradient by its own size, and so makes rounding errors of tiny gradients large; this epsilon does not.
TINY = """\
model: {dim: 32, layers: 2, heads: 2, segment_lengths: [16, 32, 64], dilation_rates: [1, 2, 4]}
data: {sequence_length: 64, path: DATA}
train:
  {output_dir: RUN, steps: 4, batch_size: 4, learning_rate: 1.0e-2, warmup_steps: 2, checkpoint_every: 100,
   validate_every: 0, sample_tokens: 0, adam_eps: 1.0e-4}
"""


def import_deepspeed():
    """Import what every run would, once and before ranks are forked: it takes seconds."""
    with warnings.catch_warnings():
        prepare_deepspeed(LaunchEnvironment(), CPU)
        import deepspeed.runtime.zero.muon.muon_optimizer
        import deepspeed.runtime.zero.stage3  # noqa: F401


def write_corpus(path, tokenizer=None):
    """A token file of some of this package's source, of bytes if no tokenizer is given."""
    with TokenFileWriter(path, tokenizer or ByteTokenizer(), validation=0.2) as writer:
        for source in sorted((Path(__file__).parents[2] / "longnet_dist" / "geometry").glob("*.py")):
            writer.add_document([source.read_bytes()])
    return path


def write_config(folder, name, data):
    """The file of a configuration that trains in a moment, into ``folder / name``."""
    file = folder / f"{name}.yaml"
    file.write_text(TINY.replace("RUN", str(folder / name)).replace("DATA", str(data)), encoding="utf-8")
    return file


def tiny_config(output_dir, data, *settings):
    """A configuration that trains in a moment."""
    return load_config(write_config(output_dir.parent, output_dir.name, data), settings)


def make_trainer(config, waits=None):
    """A trainer of the rank that calls, on text or features, inside ``run_distributed``."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    prepare_deepspeed(LaunchEnvironment(rank, world_size, rank, world_size), CPU)
    return trainer_of(RunSetup.make(config, world_size, "cpu"), CPU, waits)


def train(config):
    make_trainer(config).run()


def run(world_size, config):
    """Train on ``world_size`` ranks; the metrics of every step."""
    import_deepspeed()
    run_distributed(train, world_size, config)
    return read_jsonl(config.train.output_dir / "metrics.jsonl")
