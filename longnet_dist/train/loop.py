"""A training run from its first step, or its last checkpoint, to its loss curve."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from longnet_dist.comm.launch_env import LaunchEnvironment, process_group
from longnet_dist.comm.mesh import Mesh
from longnet_dist.config.schema import Config
from longnet_dist.data.batches import Windows
from longnet_dist.model.longnet import LongNet
from longnet_dist.train.checkpoint import checkpoint_folder, delete_old, load_weights, restore, save_checkpoint
from longnet_dist.train.engine import build_engine, prepare_deepspeed
from longnet_dist.train.evaluation import Evaluation, evaluate
from longnet_dist.train.generation import Sampling
from longnet_dist.train.metrics import MetricsLog, StepMetrics, draw_loss_curve, read_jsonl
from longnet_dist.train.plan import RunPlan
from longnet_dist.train.schedule import learning_rate
from longnet_dist.train.step import ReadRows, StepResult, train_step
from longnet_dist.train.trained import continue_text


def run_training(config: Config, launch: LaunchEnvironment) -> None:
    """Train as configured. Every rank of the launch must call.

    Raises:
        LongNetError: a mistake in configuration, data or checkpoint, on all ranks before they meet; or divergence.
    """
    device = launch.device()
    plan = RunPlan.make(config, launch.world_size, device.type)
    launch.share_cores()
    prepare_deepspeed(launch, device)
    with process_group(launch, device, timedelta(minutes=config.parallel.timeout_minutes)):
        Trainer(plan, device).run()


class Trainer:
    """A run on one rank; torch.distributed must be up and every rank must make and run one.

    Args:
        plan: the same on every rank.
        device: of this rank.
    """

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        self.plan, self.config, self.device = plan, plan.config, device
        self.is_first = dist.get_rank() == 0
        self.token_file = plan.open_token_file()
        self.batches = plan.training_data(self.token_file)
        self.validation = plan.validation_data(self.token_file) if plan.config.train.validate_every else None
        self.mesh = Mesh.build(plan.mesh)
        self.engine, self.step, self.tokens = self._engine(), 0, 0
        if plan.checkpoint and plan.state:
            self._train_step(0, learning_rate=0.0)  # see restore
            restore(self.engine, plan.checkpoint, plan.state.step)
            self.step, self.tokens = plan.state.step, plan.state.tokens

    def run(self) -> None:
        """Train to the last step."""
        train, folder = self.config.train, self.plan.folder
        bytes_per_token = self.token_file.bytes_per_token("train")
        with ExitStack() as stack:
            log = None
            if self.is_first:
                folder.describe(self.plan.resolved(self.token_file), self.token_file.tokenizer)
                log = stack.enter_context(MetricsLog(folder, self.step))
            for metrics in self._steps(bytes_per_token):
                last = metrics.step == train.steps
                if log:
                    log.step(metrics)
                if self.validation and (last or metrics.step % train.validate_every == 0):
                    evaluation = self._validate(self.validation)
                    if log:
                        log.validation(metrics.step, evaluation)
                if last or metrics.step % train.checkpoint_every == 0:
                    self._save()
        if self.is_first:
            self._conclude(bytes_per_token)
        dist.barrier()

    def _engine(self) -> Any:
        torch.manual_seed(self.config.train.seed)
        model = LongNet(self.config.model, group=self.mesh.sequence_group)
        if self.plan.checkpoint:
            load_weights(self.plan.checkpoint, model)
        return build_engine(model, self.config, self.plan.precision, self.plan.micro_batch_size, self.plan.passes)

    def _steps(self, bytes_per_token: float) -> Iterator[StepMetrics]:
        """Do the steps that are left, and show them in a progress bar."""
        train = self.config.train
        tokens_per_step = train.batch_size * self.config.data.sequence_length
        bar = tqdm(total=train.steps, initial=self.step, unit="step", disable=not self.is_first, dynamic_ncols=True)
        with bar:
            while self.step < train.steps:
                began = time.perf_counter()
                rate = learning_rate(self.step + 1, train)
                result = self._train_step(self.step, rate)
                seconds = time.perf_counter() - began
                self.step += 1
                self.tokens += tokens_per_step
                speed = tokens_per_step / seconds
                bits = result.loss / math.log(2) / bytes_per_token
                shown = f"loss {result.loss:.3f}, {bits:.3f} bits/byte, {speed:,.0f} tokens/s"
                bar.set_postfix_str(shown, refresh=False)
                bar.update()
                yield StepMetrics(self.step, result.loss, result.grad_norm, rate, self.tokens, seconds, speed)

    def _train_step(self, step: int, learning_rate: float) -> StepResult:
        """Step ``step``, counted from 0."""
        micro_batches = [self._reader(step, number) for number in range(self.plan.accumulation)]
        sequence_length = self.config.data.sequence_length
        return train_step(self.engine, micro_batches, sequence_length, self.plan.chunk_length, learning_rate)

    def _reader(self, step: int, number: int) -> ReadRows:
        """Reads rows of micro-batch ``number`` of this data rank."""
        data_rank, data_size = self.mesh.data_rank, self.mesh.shape.data
        return lambda window: self.batches.local(step, data_rank, data_size, window, number, self.plan.accumulation)

    def _validate(self, windows: Windows) -> Evaluation:
        self.engine.eval()
        num_tokens, plan = self.config.train.validation_tokens, self.plan
        evaluation = evaluate(
            self.engine, windows, num_tokens, plan.micro_batch_size, self.mesh, self.device, plan.chunk_length
        )
        self.engine.train()
        return evaluation

    def _save(self) -> None:
        folder = checkpoint_folder(self.plan.folder.path, self.step)
        save_checkpoint(self.engine, folder, self.config.model, self.step, self.tokens)
        if self.is_first:
            delete_old(self.plan.folder.path, self.config.train.keep_last)

    def _conclude(self, bytes_per_token: float) -> None:
        """Draw the curve, let the trained model write a sample, and say where both are."""
        train, folder = self.config.train, self.plan.folder
        draw_loss_curve(folder, bytes_per_token)
        for validation in read_jsonl(folder.validation_file)[-1:]:
            print(f"validation: {validation['bits_per_byte']:.3f} bits per byte after {validation['step']} steps")
        print(f"loss curve: {folder.curve_file}")
        if train.sample_tokens and self.config.model.causal:
            last = checkpoint_folder(folder.path, self.step)
            (text,) = continue_text(last, train.sample_prompt, train.sample_tokens, Sampling(seed=train.seed))
            folder.sample_file.write_text(text, encoding="utf-8")
            print(f"sample ({folder.sample_file}):\n\n{text}")
