"""A run on packed documents is a plain loop over documents, step by step, on any ranks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.data.batches import Batches, objective
from longnet_dist.data.shuffle import hashed
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.model.longnet import LongNet
from longnet_dist.optim.schedules import learning_rate
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train.deepspeed_engine import build_optimizer
from tests.distributed import run_distributed
from tests.train.runs import import_deepspeed, tiny_config, train

COMMON = ("data.documents=true", "train.clip_norm=1", "model.segment_lengths=[16,36,64]", "train.steps=3")
MASKED = ("model.causal=false", "model.positions=rope")
CASES = {
    1: {
        "whole": (),
        "stages": ("deepspeed.zero_stage=0", "train.micro_batch_size=2", "model.layer_shift=true"),
        "chunks": ("train.chunk_length=26", "train.micro_batch_size=2", "data.sequence_length=62"),
        "best_fit": ("data.packing=best_fit", "train.activation_checkpointing=selective"),
    },
    2: {
        "sequence": ("parallel.sequence=2",),
        "data": ("parallel.data=2", "deepspeed.zero_stage=2"),
        "chunks": ("parallel.sequence=2", "train.chunk_length=26", "data.sequence_length=62"),
        "best_fit": ("parallel.sequence=2", "data.packing=best_fit", "deepspeed.zero_stage=3"),
        "masked": ("parallel.sequence=2", "data.packing=best_fit", *MASKED),
    },
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A file of documents of 1 to 300 tokens, and its texts."""
    path = tmp_path_factory.mktemp("documents") / "text.tokens"
    random = np.random.default_rng(0)
    lengths = [1, 1, *random.geometric(1 / 30, 120).tolist(), 300, 64, 63, 65]
    texts = [random.integers(97, 123, length, dtype=np.uint8).tobytes() for length in lengths]
    with TokenFileWriter(path, ByteTokenizer(), validation=0.2) as writer:
        for text in texts:
            writer.add_document([text])
    return path


def pieces_by_hand(token_file, batches, sample):
    """First and last token of the documents in a contiguous sample, from the separators in the text itself."""
    (index,), length = batches.windows_of([sample]), batches.windows.sequence_length
    first = index * length
    ends = [*(np.flatnonzero(token_file.tokens == 0) + 1), len(token_file.tokens)]
    edges = [first, *(end for end in ends if first < end < first + length), first + length]
    return [(start, stop, stop not in ends) for start, stop in pairwise(edges)]


def documents_of_step(config, token_file, batches, step):
    """Tokens and labels of each document of a step, cut from its samples."""
    size, length = config.train.batch_size, config.data.sequence_length
    if config.data.packing == "contiguous":
        for sample in range(step * size, (step + 1) * size):
            for start, stop, goes_on in pieces_by_hand(token_file, batches, sample):
                tokens = torch.from_numpy(token_file.tokens[start : stop + 1].astype(np.int64))
                labels = tokens[1:].clone()
                if not goes_on:
                    labels = torch.cat([tokens[1 : stop - start], torch.tensor([-100])])
                yield tokens[: stop - start], labels
        return
    tokens, labels = batches.local(step)
    found = batches.documents(step)
    assert found.longest <= length
    for start, stop in zip(found.starts, found.stops, strict=True):
        yield tokens[0, start:stop], labels[0, start:stop]


def plain_loop(config):
    """The training without packing, ranks or DeepSpeed: losses and weights."""
    torch.manual_seed(config.train.seed)
    model = LongNet(config.model)
    optimizer, token_file = build_optimizer(model, config.train), TokenFile.open(config.data.path)
    batches = Batches(
        token_file, "train", config.data.sequence_length, config.train.batch_size, config.train.seed,
        **objective(config.model), documents=True, packing=config.data.packing,
    )  # fmt: skip
    losses = []
    for step in range(config.train.steps):
        parts = list(documents_of_step(config, token_file, batches, step))
        count = sum(int((labels != -100).sum()) for _, labels in parts)
        total = 0.0
        for tokens, labels in parts:
            loss = model(tokens[None], labels[None]).loss_sum / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config.train)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, dict(model.named_parameters())


def train_all(configs):
    for config in configs:
        train(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_a_plain_loop_over_documents(tmp_path, documents, ranks):
    configs = {name: tiny_config(tmp_path / name, documents, *COMMON, *case) for name, case in CASES[ranks].items()}
    import_deepspeed()
    run_distributed(train_all, ranks, list(configs.values()))
    for name, config in configs.items():
        losses, weights = plain_loop(config)
        metrics = read_jsonl(config.train.output_dir / "metrics.jsonl")
        assert [line["loss"] for line in metrics] == pytest.approx(losses, rel=1e-5), name
        saved = load_file(newest_checkpoint(config.train.output_dir) / "model.safetensors")
        for key, weight in weights.items():
            torch.testing.assert_close(saved[key], weight.detach(), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_a_changed_token_changes_no_logit_of_another_document(tmp_path, documents, packing):
    config = tiny_config(tmp_path / "run", documents, *COMMON, f"data.packing={packing}")
    batches = Batches(TokenFile.open(documents), "train", 64, 4, 0, documents=True, packing=packing)
    torch.manual_seed(0)
    model = LongNet(config.model).eval()
    tokens, found = batches.local(0)[0], batches.documents(0)
    number = int(hashed(1)[0]) % len(found.starts)
    start, stop = found.starts[number], found.stops[number]
    changed = tokens.clone()
    changed[0, start] += 1

    with torch.no_grad():
        (shards,) = model.stream(tokens.shape[1]).chunks(tokens.shape[1])
        results = []
        for rows in (tokens, changed):
            stream = model.stream(tokens.shape[1], cu_seqlens=found)
            stream.enter(shards)
            results.append(model(rows, stream=stream).logits)
    moved = (results[0] != results[1]).any(-1)[0]
    assert moved[start:stop].any()
    moved[start:stop] = False
    assert not moved.any()
