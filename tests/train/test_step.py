import math

import pytest
import torch
import torch.distributed as dist

from longnet_dist.checkpoint.writer import take_snapshot
from longnet_dist.comm.reductions import total_over_ranks
from longnet_dist.data.batches import IGNORE_INDEX
from longnet_dist.train.step import MicroBatch, train_step
from tests.distributed import run_distributed
from tests.train.runs import make_trainer, tiny_config


def total_of_ranks():
    return total_over_ranks(torch.tensor(dist.get_rank() + 0.5)).item()


def test_total_over_ranks():
    assert run_distributed(total_of_ranks, 3) == [4.5] * 3


def step_with_labels_on_one_rank(config):
    """Only the last half of the rows has labels: those of the second of two sequence ranks."""
    trainer = make_trainer(config)

    def read(window):
        tokens, labels = trainer._reader(0, 0)(window)
        rows = torch.arange(*window)
        return tokens, torch.where(rows < 32, IGNORE_INDEX, labels)

    def num_labels(window):
        return int((read(window)[1] != IGNORE_INDEX).sum())

    return train_step(trainer.engine, [MicroBatch(read, num_labels)], 64, trainer.plan.chunk_length, 0.0)


def test_the_mean_is_over_labelled_rows_wherever_they_are(tmp_path, corpus):
    """All labels on the last of two sequence ranks: the same loss as one rank that has these labels."""
    two = run_distributed(step_with_labels_on_one_rank, 2, tiny_config(tmp_path / "two", corpus))
    one = run_distributed(step_with_labels_on_one_rank, 1, tiny_config(tmp_path / "one", corpus))
    for result in two:
        assert result.loss == pytest.approx(one[0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(one[0].grad_norm, rel=1e-5)


def rows_read_in_a_step(config):
    """Every window that a step reads from the token file, in order."""
    trainer, windows = make_trainer(config), []
    local = trainer.batches.local

    def note(step, data_rank, data_size, window, *micro_batch):
        windows.append(window)
        return local(step, data_rank, data_size, window, *micro_batch)

    trainer.batches.local = note
    trainer._train_step(0, 1e-3)
    return windows


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        (("train.steps=1",), [(0, 64)]),
        # A recorded chunk is computed twice. To keep its rows in between may take more memory than there is.
        (("train.steps=1", "train.chunk_length=32"), [(0, 32), (32, 64), (0, 32)]),
    ],
    ids=["whole", "chunks"],
)
def test_a_step_reads_rows_only_to_compute_them(tmp_path, corpus, settings, windows):
    (read,) = run_distributed(rows_read_in_a_step, 1, tiny_config(tmp_path / "run", corpus, *settings))
    assert read == windows


def nan_loss(output):
    return output._replace(loss_sum=output.loss_sum * math.nan)


def infinite_loss_of_finite_gradient(output):
    return output._replace(loss_sum=output.loss_sum + math.inf)


class InfiniteBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def infinite_gradient_of_finite_loss(output):
    return output._replace(loss_sum=InfiniteBackward.apply(output.loss_sum))


FAULTS = (None, nan_loss, infinite_loss_of_finite_gradient, infinite_gradient_of_finite_loss, None)


def train_with_faults(config):
    """What each step gave, and the training state after it; rank 1 has the faults."""
    trainer = make_trainer(config)
    forward, results, states = trainer.engine.forward, [], []
    for step, fault in enumerate(FAULTS):
        if fault and dist.get_rank() == 1:
            trainer.engine.forward = lambda *given, fault=fault, **named: fault(forward(*given, **named))
        results.append(trainer._train_step(step, 1e-2))
        trainer.engine.forward = forward
        states.append(take_snapshot(trainer.engine))
    return results, states


@pytest.mark.parametrize("stage", ["0", "1", "2", "3", "1 bf16", "3 bf16"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, corpus, stage):
    stage, *bf16 = stage.split()
    settings = (f"deepspeed.zero_stage={stage}", *(f"train.precision={name}" for name in bf16))
    config = tiny_config(tmp_path / "run", corpus, "parallel.data=2", "train.micro_batch_size=1", *settings)
    (results, states), (others, _) = run_distributed(train_with_faults, 2, config)
    assert [result.skipped for result in results] == [False, True, True, True, False]
    assert [result.skipped for result in others] == [result.skipped for result in results]
    assert [math.isfinite(result.loss) for result in results] == [True, False, False, True, True]
    for name, tensors in states[0].items():
        for key, tensor in tensors.items():
            assert all(torch.equal(state[name][key], tensor) for state in states[1:4])
            assert not torch.equal(states[4][name][key], tensor)


def steps_until_all_stop(config):
    trainer, asked = make_trainer(config), dist.get_rank() == 1
    return [trainer._train_step(step, 1e-3, lambda step=step: asked and step == 1).stop for step in range(3)]


def test_all_ranks_stop_if_one_is_asked_to(tmp_path, corpus):
    config = tiny_config(tmp_path / "run", corpus)
    assert run_distributed(steps_until_all_stop, 3, config) == [[False, True, False]] * 3
