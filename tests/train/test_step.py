import pytest
import torch
import torch.distributed as dist

from longnet_dist.data.batches import IGNORE_INDEX
from longnet_dist.errors import LongNetError
from longnet_dist.train.step import total_over_ranks, train_step
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

    return train_step(trainer.engine, [read], 64, trainer.plan.chunk_length, 0.0)


def test_the_mean_is_over_labelled_rows_wherever_they_are(tmp_path, corpus):
    """All labels on the last of two sequence ranks: the same loss as one rank that has these labels."""
    two = run_distributed(step_with_labels_on_one_rank, 2, tiny_config(tmp_path / "two", corpus))
    one = run_distributed(step_with_labels_on_one_rank, 1, tiny_config(tmp_path / "one", corpus))
    for result in two:
        assert result.loss == pytest.approx(one[0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(one[0].grad_norm, rel=1e-5)


def diverge(config):
    trainer = make_trainer(config)
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(trainer.engine.module.parameters()).fill_(float("nan"))
    try:
        trainer._train_step(0, 1e-3)
    except LongNetError as error:
        return str(error)
    return None


@pytest.mark.parametrize("stage", [0, 1])
def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path, corpus, stage):
    config = tiny_config(tmp_path / "run", corpus, "parallel.data=2", f"deepspeed.zero_stage={stage}")
    messages = run_distributed(diverge, 2, config)
    assert messages[0] == messages[1]
    assert "training diverged: the loss is nan" in messages[0]
