"""What is done with a run that has been trained: measuring it, and letting it write."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.config.schema import Config
from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import SplitName, TokenFile
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.model.longnet import LongNet
from longnet_dist.train.checkpoint import load_weights, newest_checkpoint, read_state
from longnet_dist.train.evaluation import Evaluation, evaluate
from longnet_dist.train.generation import Sampling, generate
from longnet_dist.train.plan import objective
from longnet_dist.train.run_folder import RunFolder


def evaluate_run(
    path: Path, data: Path, contexts: Sequence[int], num_tokens: int, split: SplitName, launch: LaunchEnvironment
) -> dict[int, Evaluation]:
    """Evaluate a run at several context lengths. Every rank of the launch must call; all share each sequence.

    Args:
        path: folder of a run, or one of its checkpoints.
        data: a token file of the run's tokenizer.
        contexts: rows of the windows into which the text is cut.
        num_tokens: rows to predict, the first of the split, the same at every context.
        split: of the token file.
        launch: this process.

    Raises:
        LongNetError: no such run, checkpoint or file, or one that does not fit; on all ranks before they meet.
    """
    if min(num_tokens, *contexts) < 1:
        raise ConfigError(f"contexts and tokens must be at least 1, but are {list(contexts)} and {num_tokens}")
    folder, checkpoint, config = _open(path)
    token_file = TokenFile.open(data)
    if token_file.tokenizer.to_json() != folder.tokenizer().to_json():
        raise DataError(
            f"{data} was prepared with another tokenizer ({token_file.tokenizer.name}) than the run's "
            f"({folder.tokenizer().name}); prepare it with the run's"
        )
    windows = {context: Windows(token_file, split, context, **objective(config.model)) for context in contexts}
    device = launch.device()
    launch.share_cores()
    with process_group(launch, device, timedelta(minutes=config.parallel.timeout_minutes)):
        mesh = Mesh.build(MeshShape(data=1, sequence=launch.world_size))
        model = LongNet(config.model, group=mesh.sequence_group)
        load_weights(checkpoint, model)
        model.to(device, _dtype(config, device)).eval()
        return {context: evaluate(model, part, num_tokens, 1, mesh, device) for context, part in windows.items()}


def continue_text(path: Path, prompt: str, num_tokens: int, sampling: Sampling) -> str:
    """The prompt and ``num_tokens`` tokens that the model adds to it.

    Args:
        path: folder of a run, or one of its checkpoints.
        prompt: the text to continue.
        num_tokens: how many tokens to add.
        sampling: how to draw them.

    Raises:
        LongNetError: no such run, or one that cannot continue a text.
    """
    folder, checkpoint, config = _open(path)
    tokenizer = folder.tokenizer()
    device = LaunchEnvironment().device()
    model = LongNet(config.model)
    load_weights(checkpoint, model)
    model.to(device, _dtype(config, device)).eval()
    ids = [int(token) for token in tokenizer.encode(prompt.encode())]
    new = generate(model, ids, num_tokens, config.data.sequence_length, sampling)
    return tokenizer.decode([*ids, *new]).decode("utf-8", errors="replace")


def _open(path: Path) -> tuple[RunFolder, Path, Config]:
    """The run's folder, its checkpoint and its configuration."""
    checkpoint = newest_checkpoint(path)
    folder = RunFolder(checkpoint.parent.parent)
    config = folder.config()
    read_state(checkpoint, config.model)
    return folder, checkpoint, config


def _dtype(config: Config, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if config.precision(device.type) == "bf16" else torch.float32
