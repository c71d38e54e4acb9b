"""A run records metrics of each step and validation with its loggers, and draws its loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Self

from tqdm import tqdm

from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.telemetry.loggers import Kind, Logger


@dataclass(frozen=True)
class StepMetrics:
    """A StepMetrics is one line of ``metrics.jsonl``.

    Attributes:
        step: number of the step, from 1.
        loss: mean loss over the labelled tokens of all ranks, nats; null in the file if it is not finite.
        grad_norm: norm of the whole gradient before clipping; null in the file if it is not finite.
        lr: learning rate of this step.
        tokens: tokens trained on since the start of the run, over all ranks.
        step_seconds: wall-clock time of the step.
        tokens_per_second: tokens of this step for each second, over all ranks.
        skipped: number of skipped steps so far; a step is skipped if its loss or gradient is not finite or a spike.
        spikes: the spikes among them; left out of the file without ``train.skip_spikes``.
        slowest_rank, slowest_rank_seconds, median_rank_seconds: rank that works longest in a step, its seconds without
            waits, and the median of the others; only in some steps, and with several ranks.
        tflops_per_gpu, mfu, peak_memory_allocated, peak_memory_reserved: as in
            :class:`~longnet_dist.telemetry.throughput.Speed`; left out of the file if they are None.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    skipped: int
    spikes: int | None = None
    slowest_rank: int | None = None
    slowest_rank_seconds: float | None = None
    median_rank_seconds: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    peak_memory_allocated: int | None = None
    peak_memory_reserved: int | None = None


class MetricsLog:
    """A MetricsLog gives metrics to all loggers of a run; only rank 0 has one.

    Args:
        folder: folder of the run.
        last_step: step of the checkpoint from which the run resumes, 0 for a new run. Metrics of later steps are
            deleted, since these steps are computed again.
        loggers: classes of the loggers.
        config: configuration of the run as nested values.
    """

    def __init__(
        self,
        folder: RunFolder,
        last_step: int,
        loggers: Sequence[type[Logger]],
        config: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._loggers = [logger(folder, last_step, config) for logger in loggers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for logger in list(self._loggers):
            self._try(logger, logger.close)

    def step(self, metrics: StepMetrics) -> None:
        """Record one step; numbers that are not finite are null."""
        known = {name: value for name, value in asdict(metrics).items() if value is not None and name != "step"}
        fields = {name: value if math.isfinite(value) else None for name, value in known.items()}
        self._log("train", metrics.step, fields)

    def validation(self, step: int, fields: Mapping[str, float]) -> None:
        """Record the result of one validation, after ``step``."""
        self._log("validation", step, {name: value if math.isfinite(value) else None for name, value in fields.items()})

    def _log(self, kind: Kind, step: int, fields: Mapping[str, float | None]) -> None:
        for logger in list(self._loggers):
            self._try(logger, partial(logger.log, kind, step, fields))

    def _try(self, logger: Logger, record: Callable[[], None]) -> None:
        """Record, or go on without a logger that a full or absent disk has broken: training does not end for it."""
        try:
            record()
        except OSError as error:
            self._loggers.remove(logger)
            tqdm.write(f"warning: {type(logger).__name__} records no more: {error}", file=sys.stderr)


def draw_loss_curve(folder: RunFolder, bytes_per_token: float | None) -> None:
    """Draw the loss of training and validation over steps into ``loss.png``.

    Args:
        folder: of the run.
        bytes_per_token: of a run on text, whose loss is drawn in bits per byte; None: the loss is drawn as it is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [line for line in read_jsonl(folder.metrics_file) if line.get("loss") is not None]
    key, unit, title = ("loss", 1.0, "loss") if bytes_per_token is None else (
        "bits_per_byte", 1 / (math.log(2) * bytes_per_token), "bits per byte",
    )  # fmt: skip
    axes.plot([line["step"] for line in steps], [line["loss"] * unit for line in steps], lw=1, label="training")
    if validations := [line for line in read_jsonl(folder.validation_file) if line.get(key) is not None]:
        points = [line["step"] for line in validations], [line[key] for line in validations]
        axes.plot(*points, "o-", ms=4, lw=1.5, label=f"validation (last {points[1][-1]:.3f})")
    axes.set(xlabel="step", ylabel=title, title=folder.path.name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder.curve_file, dpi=150)
