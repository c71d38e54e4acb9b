"""Trainer and accelerate over ranks have the losses and the weights of one process."""

import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.train.deepspeed_engine import prepare_deepspeed
from tests.distributed import run_distributed
from tests.hf.models import Trainer, TrainingArguments, hf, make, padded, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
LENGTHS = (17, 40, 5, 33, 21, 9, 30, 12, 25, 38, 7, 19)


def texts():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 100, (length,), generator=generator).tolist()} for length in LENGTHS]


def collator(packed):
    if packed:
        return transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return padded


def train(folder, packed, ranks, options):
    """Losses and evaluated loss of a Trainer, and its weights."""
    model = make("llama", dtype=torch.float32)
    if options.pop("lora", False):
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    group = None
    if dist.is_initialized():
        world, rank = dist.get_world_size(), dist.get_rank()
        groups = [dist.new_group(list(range(first, first + ranks))) for first in range(0, world, ranks)]
        group = groups[rank // ranks]
        model = hf.sequence_parallel(model, group, loss_chunk=16)
    arguments = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2,
            "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no",
            "use_cpu": True, "disable_tqdm": True, "gradient_checkpointing": True, "remove_unused_columns": False,
            "max_grad_norm": 1.0, "prediction_loss_only": True,
        }
        | options,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=texts(), eval_dataset=texts()[:4], data_collator=collator(packed)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    if "deepspeed" in options:
        assert trainer.model_wrapped.zero_optimization_stage() == options["deepspeed"]["zero_optimization"]["stage"]
        return losses, norms
    return losses, norms, trainer.evaluate()["eval_loss"], [p.detach().clone() for p in model.parameters()]


def compare(tmp_path, packed, world, ranks, **options):
    alone = dict(options)
    alone.pop("deepspeed", None)
    if world > ranks:  # the groups share the batches of one process
        alone["per_device_train_batch_size"] = 2 * world // ranks
        alone["per_device_eval_batch_size"] = 2 * world // ranks
    losses, norms, evaluated, weights = train(tmp_path, packed, 1, alone)
    assert len(losses) == 3
    start = with_deepspeed if "deepspeed" in options else train
    for found in run_distributed(start, world, tmp_path, packed, ranks, options):
        assert found[0] == pytest.approx(losses, abs=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-3)
        if "deepspeed" not in options:
            assert found[2] == pytest.approx(evaluated, abs=1e-4)
            torch.testing.assert_close(found[3], weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_trainer_over_two_ranks(tmp_path, packed):
    compare(tmp_path, packed, 2, 2)


def test_trainer_over_one_rank(tmp_path):
    compare(tmp_path, False, 1, 1)


def test_trainer_over_three_ranks(tmp_path):
    compare(tmp_path, True, 3, 3)


def test_groups_share_the_batches(tmp_path):
    compare(tmp_path, False, 4, 2)


def test_adapters_train(tmp_path):
    compare(tmp_path, False, 2, 2, lora=True)


def with_deepspeed(folder, packed, ranks, options):
    launch = LaunchEnvironment(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size())
    prepare_deepspeed(launch, torch.device("cpu"))
    return train(folder, packed, ranks, options)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_over_two_ranks(tmp_path, stage):
    config = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    compare(tmp_path, stage == 1, 2, 2, deepspeed=config)
