"""Evaluation keeps documents apart, at chosen contexts and streamed, and counts the bytes of predicted tokens."""

import math
from datetime import timedelta
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.config.model import named_model
from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import load_tokenizer
from longnet_dist.inference.evaluation import evaluate
from longnet_dist.inference.stream_state import StreamTask
from longnet_dist.inference.streamed_evaluation import StateFile, evaluate_stream
from longnet_dist.model.longnet import LongNet
from tests.data.tiny_tokenizer import write_tiny_tokenizer
from tests.distributed import run_distributed
from tests.train.runs import CPU

ROWS = 900
CONTEXTS = (64, 250, ROWS)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file whose tokens stand for one byte to many, in documents of very unequal length."""
    folder = tmp_path_factory.mktemp("documents")
    random = np.random.default_rng(1)
    words = ["def ", "return ", "token", "größe ", "x", "\n", "special_tokens=", "0123456789"]
    with TokenFileWriter(folder / "a.tokens", load_tokenizer(str(write_tiny_tokenizer(folder / "t.json")))) as writer:
        for length in [0, 1, 40, 3, 300, 7, 7, 90] * 3:
            writer.add_document(["".join(random.choice(words, length)).encode()])
    return folder / "a.tokens"


def model_of(group=None):
    torch.manual_seed(0)
    pattern = {"segment_lengths": (64, 300, 2000), "dilation_rates": (1, 4, 9), "vocab_size": 300}
    return LongNet(named_model("tiny", **pattern), group=group).double().eval()


def measure_all(path, state):
    mesh = Mesh.build(MeshShape(1, dist.get_world_size()), timedelta(seconds=60))
    model, token_file = model_of(mesh.sequence_group), TokenFile.open(path)
    results = []
    for context in CONTEXTS:
        windows = Windows(token_file, "all", context, documents=True)
        results.append(evaluate(model, windows, ROWS, 2, mesh, CPU))
        results.append(evaluate(model, windows, ROWS, 2, mesh, CPU, chunk_length=50))
    windows = Windows(token_file, "all", ROWS, documents=True)
    task = StreamTask("weights", "tokens", "all", ROWS, "torch.float64", True)
    results.append(evaluate_stream(model, windows, 128, CPU, StateFile(state, task, False, save_seconds=0.0)))
    return results


def by_hand(path, context):
    """Loss, number of predicted tokens and their bytes, from a loop over documents."""
    model, token_file = model_of(), TokenFile.open(path)
    tokenizer, text = token_file.tokenizer, token_file.tokens.astype(np.int64)
    ends = (np.flatnonzero(text == tokenizer.document_separator) + 1).tolist()
    edges = sorted({*range(0, ROWS, context), *(end for end in ends if end < ROWS), ROWS})
    total, ids = 0.0, []
    for start, stop in pairwise(edges):
        with torch.no_grad():
            logits = model(torch.from_numpy(text[None, start:stop])).logits[0]
        labels = torch.from_numpy(text[start + 1 : stop + (stop not in ends)])
        total += F.cross_entropy(logits[: len(labels)], labels, reduction="sum").item()
        ids += labels.tolist()
    num_bytes = sum(1 if token == tokenizer.document_separator else _bytes(tokenizer, token) for token in ids)
    return total / len(ids), len(ids), num_bytes


def _bytes(tokenizer, token):
    """Bytes of a token of a byte-level BPE, each character of which stands for one."""
    return len(tokenizer._backend.id_to_token(token))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_document_is_evaluated_alone(tmp_path, file, ranks):
    *windowed, streamed = run_distributed(measure_all, ranks, file, tmp_path / "state")[0]
    for number, result in enumerate([*windowed, streamed]):
        loss, tokens, num_bytes = by_hand(file, [*np.repeat(CONTEXTS, 2).tolist(), ROWS][number])
        assert result.tokens == tokens
        assert result.loss == pytest.approx(loss, rel=1e-9)
        assert result.bits_per_byte == pytest.approx(loss * tokens / math.log(2) / num_bytes, rel=1e-9)
    # The mean of the whole file is another one, and so would be the figure.
    assert num_bytes / tokens != pytest.approx(TokenFile.open(file).bytes_per_token("all"), rel=1e-3)
