"""A training run from its first step, or its last checkpoint, to its loss curve."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from longnet_dist.attention.plan_ahead import plan_stream
from longnet_dist.checkpoint.format import CheckpointState, Progress, load_weights, restore
from longnet_dist.checkpoint.run_folder import set_aside
from longnet_dist.checkpoint.run_model import new_model
from longnet_dist.checkpoint.writer import CheckpointWriter, remove_partial
from longnet_dist.comm.agreement import agreed
from longnet_dist.comm.flight_recorder import record_collectives, write_collectives
from longnet_dist.comm.launch_env import LaunchEnvironment, meeting_store, process_group
from longnet_dist.comm.mesh import Mesh
from longnet_dist.comm.waits import CollectiveWaits
from longnet_dist.config.notes import notes
from longnet_dist.config.schema import Config
from longnet_dist.data.token_file import TokenFile
from longnet_dist.engine.execution import Execution
from longnet_dist.engine.replayed_passes import ReplayedPasses
from longnet_dist.errors import LongNetError
from longnet_dist.estimate.table import slow_step
from longnet_dist.extras import require_extra
from longnet_dist.geometry.documents import Documents
from longnet_dist.inference.evaluation import evaluate
from longnet_dist.model.longnet import LongNet
from longnet_dist.numerics import dtype_of
from longnet_dist.ops.deterministic import deterministic_algorithms
from longnet_dist.optim.schedules import course, learning_rate
from longnet_dist.optim.sequence_lengths import growth
from longnet_dist.private_interfaces import default_store
from longnet_dist.resilience.out_of_memory import explained
from longnet_dist.resilience.stop_signals import stop_requests
from longnet_dist.resilience.watchdog import Watchdog
from longnet_dist.telemetry.loggers import usable_loggers
from longnet_dist.telemetry.metrics import MetricsLog, StepMetrics
from longnet_dist.telemetry.profiler import StepProfiler
from longnet_dist.telemetry.throughput import Speed, Throughput
from longnet_dist.train.allocator import prepare_allocator
from longnet_dist.train.batch_prefetch import StepsAhead, pinned
from longnet_dist.train.conclusion import conclude, say_complete
from longnet_dist.train.deepspeed_engine import build_engine, prepare_deepspeed, release, unread_keys
from longnet_dist.train.setup import RunSetup
from longnet_dist.train.spikes import RecentSteps
from longnet_dist.train.start import Start, own_folder
from longnet_dist.train.step import MicroBatch, ReadRows, StepResult, train_step
from longnet_dist.train.stragglers import Pace, Stragglers
from longnet_dist.train.validations import Validations

STOP_ANSWER = "asked to stop: the run ends after this step; a second Ctrl-C ends it at once, without a checkpoint"
LOG_SECONDS = 10.0
"""Between two lines of a progress bar that a file or a launcher takes, where each is kept."""


def run_training(config: Config, launch: LaunchEnvironment, verify: bool = False) -> bool:
    """Train as configured. Every rank of the launch must call.

    Args:
        config: the run.
        launch: which process this one is.
        verify: compare the checksums of the token file first, on one rank of each machine.

    Returns:
        True after the last step, False if the run was asked to stop by a signal and left a checkpoint.

    Raises:
        LongNetError: a package of the extra ``train`` is absent; a mistake in configuration, data or checkpoint, on
            all ranks before they meet; divergence; a full disk or memory; another rank that failed or does not answer.
    """
    require_extra("train", "training")
    prepare_allocator(os.environ)
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    store = meeting_store(launch, timeout)
    start = agreed(store, launch, "start", partial(Start, config, launch, verify), Start.facts)
    plan, device, records = start.plan, start.device, start.plan.folder.flight_recorder
    if plan.is_complete:
        if launch.rank == 0:
            say_complete(plan)
        return True
    if launch.rank == 0 and (line := slow_step(start.needs)):
        print(f"note: {line}")
    algorithms = deterministic_algorithms(os.environ) if config.train.deterministic else nullcontext()
    with own_folder(plan, device, launch, store), algorithms:
        launch.share_cores()
        prepare_deepspeed(launch, device)
        record_collectives(records, config.parallel.flight_recorder, os.environ)
        watchdog = _watchdog(launch, timeout, partial(write_collectives, records, launch.rank))
        group = process_group(launch, device, timeout, store)
        with group, watchdog, explained(launch.rank, start.needs), CollectiveWaits(device) as waits:
            return trainer_of(plan, device, waits).run()


def trainer_of(plan: RunSetup, device: torch.device, waits: CollectiveWaits | None = None) -> Trainer:
    """Return the trainer of a run on text, or of one on features; as :class:`Trainer`."""
    if plan.config.data.features is None:
        return Trainer(plan, device, waits)
    from longnet_dist.train.features.feature_trainer import FeatureTrainer  # which extends the trainer of this file

    return FeatureTrainer(plan, device, waits)


@contextmanager
def _watchdog(launch: LaunchEnvironment, timeout: timedelta, record: Callable[[], object]) -> Iterator[None]:
    if launch.world_size == 1:
        yield
        return
    store = default_store()
    keeper = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
    with Watchdog(store, keeper, launch.rank, launch.world_size, timeout.total_seconds(), record):
        yield


class Trainer:
    """A run on one rank; torch.distributed must be up and every rank must make and run one.

    Args:
        plan: the same on every rank.
        device: of this rank.
        waits: of its collectives, if these are timed.

    Attributes:
        step: training steps done.
        tokens: rows trained on, all ranks together.
        samples: samples trained on, all ranks together.
        changes: what differs from the run as its checkpoint knows it.
        skipped: steps among them that changed nothing, because loss or gradient was not finite or a spike.
        spikes: the spikes among them.
    """

    def __init__(self, plan: RunSetup, device: torch.device, waits: CollectiveWaits | None = None) -> None:
        self.plan, self.config, self.device = plan, plan.config, device
        self.is_first, self._waits = dist.get_rank() == 0, waits or CollectiveWaits(device)
        self.token_file = plan.open_token_file()
        self.changes = plan.changes(self.token_file)
        self.batches: Any = plan.training_data(self.token_file)
        self.validation: Any = plan.validation_data(self.token_file) if plan.config.train.validate_every else None
        self.mesh = Mesh.build(plan.mesh, timedelta(minutes=plan.config.parallel.timeout_minutes))
        self.profiler = StepProfiler(plan.config.train.profile, plan.folder.path / "profile", device)
        self.spikes, self._recent, self._validations = 0, RecentSteps(), Validations()
        self._log: MetricsLog | None = None  # on rank 0, once a step has been done
        self._steps_ahead = StepsAhead(self._prepare_step, plan.config.train.steps)
        self.engine, self.step, self.tokens, self.samples, self.skipped = self._engine(), 0, 0, 0, 0
        if plan.resume.checkpoint and plan.resume.state:
            self._resume(plan.resume.checkpoint, plan.resume.state)

    def run(self) -> bool:
        """Train to the last step, or until a rank is asked to stop or validation does not improve any more.

        Returns:
            False if a rank was asked to stop.
        """
        train, folder = self.config.train, self.plan.folder
        bytes_per_token = self.token_file.bytes_per_token("train")
        with ExitStack() as stack:
            stop_requested = stack.enter_context(stop_requests(STOP_ANSWER if self.is_first else ""))
            self._say_changes()
            identity = self.plan.identity(self.token_file)
            seconds = 60 * self.config.parallel.timeout_minutes
            writer = stack.enter_context(CheckpointWriter(folder.path, train, self.config.model, identity, seconds))
            for metrics, stop in self._steps(bytes_per_token, stop_requested):
                last = metrics.step == train.steps
                if self.is_first:
                    self._log = self._log or self._open_folder(stack)
                    self._log.step(metrics)
                if self.validation and (last or (metrics.step % train.validate_every == 0 and not stop)):
                    self._validate(self.validation)
                ends = stop or self.is_complete
                if self._checkpoint_is_due(ends):
                    self.token_file.check_unchanged()
                    writer.save(self.engine, self.progress, last=ends)
                writer.check()
                if ends:
                    break
            # No rank may end, and its launcher stop the others, before the last checkpoint is on the disk.
            writer.finish()
            dist.barrier()
        if self.is_first:
            conclude(self.plan, self.step, self.is_complete, bytes_per_token, partial(release, self.engine))
        dist.barrier()
        return self.is_complete

    @property
    def progress(self) -> Progress:
        """Return how far the run has come, for a checkpoint."""
        done = {"step": self.step, "tokens": self.tokens, "samples": self.samples}
        recent = self._recent.values() if self.config.train.skip_spikes else []
        return Progress(
            **done,
            skipped=self.skipped,
            spikes=self.spikes,
            recent=recent,
            validation_loss=self._validations.loss_after(self.step),
            best_validation_loss=self._validations.best,
            validations_since_best=self._validations.since_best,
            schedule_start=self.plan.schedule_start,
        )

    @property
    def is_complete(self) -> bool:
        """Say whether there is no step left to take: the last one is done, or validation does not improve any more."""
        train = self.config.train
        return self.step == train.steps or self._validations.is_exhausted(train.patience)

    def _checkpoint_is_due(self, ends: bool) -> bool:
        """Say whether a checkpoint is written after this step, with which the run ends or not."""
        train = self.config.train
        if ends or not train.checkpoint_every:
            return train.checkpoint_every > 0
        return self.step % train.checkpoint_every == 0 or (train.keep_best and self._validations.is_best(self.step))

    def _say_changes(self) -> None:
        checkpoint = self.plan.resume.checkpoint
        if self.is_first and (self.changes or checkpoint):
            where = checkpoint or ("train.init" if self.config.train.init else "model.path")
            done = f" after step {self.step:,} of {self.config.train.steps:,}" if checkpoint else ""
            print("\n  ".join([f"going on from {where}{done}{' with' if self.changes else ''}", *self.changes]))
        if self.is_first:
            for line in [*notes(self.config), *unread_keys(self.config.deepspeed.extra)]:
                print(f"note: {line}")
            train, start, state = self.config.train, self.plan.schedule_start, self.plan.resume.state
            if start and state and start != state.schedule_start:
                print(f"learning rate: {course(train, start)}")
            if self.step < train.length_warmup:
                lengths = growth(train.length_warmup, train.shortest_length, self.config.data.sequence_length)
                print(f"sequences grow: {lengths}")

    def _open_folder(self, stack: ExitStack) -> MetricsLog:
        """Put the run's folder in order and write what describes the run, once a step has been done."""
        folder = self.plan.folder
        set_aside(self.plan.resume.damaged)
        for message in remove_partial(folder.path):
            print(f"warning: {message}", file=sys.stderr)
        described = self.plan.resolved(self.token_file)
        self._describe(described)
        if self.batches.packing_report:
            print(self.batches.packing_report)
        loggers = usable_loggers(self.config.train.loggers)
        return stack.enter_context(MetricsLog(folder, self.plan.steps_done, loggers, described))

    def _describe(self, described: dict[str, Any]) -> None:
        """Write what evaluation and generation need beside a checkpoint."""
        assert isinstance(self.token_file, TokenFile)
        self.plan.folder.describe(described, self.token_file.tokenizer)

    def _engine(self) -> Any:
        torch.manual_seed(self.config.train.seed)
        model = self._model()
        if self.plan.resume.checkpoint:
            load_weights(self.plan.resume.checkpoint, model)
        elif self.plan.init:
            self.plan.init.load(model)
        return build_engine(model, self.config, self.plan.precision, self.plan.micro_batch_size, self.plan.passes)

    def _model(self) -> nn.Module:
        model: nn.Module = new_model(
            self.config.model,
            group=self.mesh.sequence_group,
            overlap=self.config.parallel.overlap,
            backend=self.config.train.attention_backend,
            deterministic=self.config.train.deterministic,
            execution=Execution.of(self.config.train, self.device.type),
        )
        if self.config.train.cuda_graph:
            assert isinstance(model, LongNet)
            ReplayedPasses.attach(model)
        return model

    def _resume(self, checkpoint: Path, state: CheckpointState) -> None:
        restore(self.engine, checkpoint, state.step - state.skipped, self.config.train.optimizer)
        self.step, self.tokens, self.skipped = state.step, state.tokens, state.skipped
        self.samples = self.plan.samples_done
        self.spikes, self._recent = state.spikes, RecentSteps(state.recent)
        self._validations = Validations(state.best_validation_loss, state.validations_since_best)

    def _steps(
        self, bytes_per_token: float | None, stop_requested: Callable[[], bool]
    ) -> Iterator[tuple[StepMetrics, bool]]:
        """Do the steps that are left, and show them in a progress bar; say of each whether it must be the last."""
        train = self.config.train
        skipped_in_a_row = 0
        throughput, stragglers = Throughput(self.plan, self.device), Stragglers(self._waits)
        bar = tqdm(
            total=train.steps, initial=self.step, unit="step", disable=not self.is_first, dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else LOG_SECONDS,
        )  # fmt: skip
        with bar:
            while self.step < train.steps:
                began = time.perf_counter()
                rate = learning_rate(self.step + 1, train, self.plan.schedule_start)
                with self.profiler.step(self.step + 1), stragglers.step():
                    result = self._train_step(self.step, rate, stop_requested, stragglers.report())
                    seconds = time.perf_counter() - began
                tokens = self._tokens_of(self.step)
                self.step += 1
                self.tokens += tokens
                self.samples += train.batch_size
                self.skipped += result.skipped
                self.spikes += result.spike
                self._recent.add(result.loss, result.grad_norm)
                skipped_in_a_row = skipped_in_a_row + 1 if result.skipped else 0
                self._refuse_divergence(skipped_in_a_row, result)
                speed = throughput.step(seconds, self.config.length_of_step(self.step - 1), tokens)
                pace, message = stragglers.add(seconds, result.reports)
                if message and self.is_first:
                    tqdm.write(f"note: {message}")
                shown = f"loss {result.loss:.3f}, "
                if bytes_per_token is not None:
                    shown += f"{result.loss / math.log(2) / bytes_per_token:.3f} bits/byte, "
                shown += str(speed)
                bar.set_postfix_str(shown + f", {self.skipped} skipped" * bool(self.skipped), refresh=False)
                bar.update()
                yield self._metrics(result, rate, seconds, speed, pace), result.stop

    def _tokens_of(self, step: int) -> int:
        """Return the tokens that all ranks train in a step, counted from 0."""
        return self.config.train.batch_size * self.config.data.sequence_length

    def _metrics(
        self, result: StepResult, learning_rate: float, seconds: float, speed: Speed, pace: Pace | None
    ) -> StepMetrics:
        return StepMetrics(
            step=self.step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=learning_rate,
            tokens=self.tokens,
            step_seconds=seconds,
            skipped=self.skipped,
            spikes=self.spikes if self.config.train.skip_spikes else None,
            **speed._asdict(),
            **(pace._asdict() if pace else {}),
        )

    def _refuse_divergence(self, skipped_in_a_row: int, result: StepResult) -> None:
        if skipped_in_a_row >= self.config.train.max_skipped:
            raise LongNetError(
                f"training diverged: loss or gradient was not finite{' or a spike' * self.config.train.skip_spikes} in "
                f"the last {skipped_in_a_row} steps (train.max_skipped), in step {self.step} the loss was "
                f"{result.loss}; resume from an earlier checkpoint with a smaller train.learning_rate or "
                f"train.clip_norm"
            )

    def _train_step(
        self,
        step: int,
        learning_rate: float,
        stop_requested: Callable[[], bool] = lambda: False,
        report: Sequence[float] = (),
    ) -> StepResult:
        """Step ``step``, counted from 0."""
        sequence_length, chunk_length = self._sequence
        micro_batches = self._steps_ahead.of(step)
        self._check_read(micro_batches)
        is_spike = self._recent.is_spike if self.config.train.skip_spikes else None
        return train_step(
            self.engine, micro_batches, sequence_length, chunk_length, learning_rate, stop_requested, is_spike, report
        )

    def _check_read(self, micro_batches: list[MicroBatch]) -> None:
        """Raise what was found when the rows of a step were read, alike on all ranks; tokens have no such faults."""

    @property
    def _sequence(self) -> tuple[int, int]:
        """Rows of what passes through the model as one sequence, and of a chunk of it, all sequence ranks together.

        Samples with documents of their own are one sequence, one sample behind the other.
        """
        joined = self.plan.micro_batch_size if self.config.data.documents else 1
        return self.config.data.sequence_length * joined, self.plan.chunk_length * joined

    def _prepare_step(self, step: int) -> list[MicroBatch]:
        """Prepare the micro-batches of a step, in a thread beside the step before it."""
        return [self._micro_batch(step, number) for number in range(self.plan.accumulation)]

    def _micro_batch(self, step: int, number: int) -> MicroBatch:
        """Prepare a micro-batch: its plan, and its rows unless it is streamed, which may not fit in memory."""
        read, num_labels = self._reader(step, number), self._counter(step, number)
        sequence_length, chunk_length = self._sequence
        data_rank, data_size = self.mesh.data_rank, self.mesh.shape.data
        documents = self.batches.documents(step, data_rank, data_size, number, self.plan.accumulation)
        sample, length = self.config.data.sequence_length, self.config.length_of_step(step)
        if length < sample:
            documents = (documents or Documents.whole(sequence_length)).cut(length, sample)
        model = self.engine.module
        stream = model.stream(sequence_length, cu_seqlens=documents)
        dtype = dtype_of(self.plan.precision)
        plan_stream(model.attentions, stream, chunk_length, dtype, self.device)
        if chunk_length < sequence_length:
            return MicroBatch(read, num_labels, documents)
        (shards,) = stream.chunks(chunk_length)
        rows = pinned(read(shards.window(stream.rank)), self.device)
        return MicroBatch(lambda _: rows, num_labels, documents)

    def _reader(self, step: int, number: int) -> ReadRows:
        """Return what reads rows of micro-batch ``number`` of this data rank."""
        data_rank, data_size = self.mesh.data_rank, self.mesh.shape.data
        return lambda window: self.batches.local(step, data_rank, data_size, window, number, self.plan.accumulation)

    def _counter(self, step: int, number: int) -> Callable[[tuple[int, int]], int]:
        """Return what counts the labels of rows of micro-batch ``number`` of this data rank."""
        data_rank, data_size = self.mesh.data_rank, self.mesh.shape.data
        return lambda window: self.batches.num_labels(
            step, data_rank, data_size, window, number, self.plan.accumulation
        )

    def _validate(self, data: Any) -> Mapping[str, float]:
        """Evaluate on the validation data, record the result and return it."""
        self.engine.eval()
        evaluation = self._evaluate(data)
        self.engine.train()
        self._validations.add(self.step, evaluation["loss"])
        if self._log:
            self._log.validation(self.step, evaluation)
        return evaluation

    def _evaluate(self, data: Any) -> Mapping[str, float]:
        """Return the fields of an evaluation, ``loss`` among them, with the engine in evaluation mode."""
        num_tokens, plan = self.config.train.validation_tokens, self.plan
        return asdict(
            evaluate(self.engine, data, num_tokens, plan.micro_batch_size, self.mesh, self.device, plan.chunk_length)
        )
