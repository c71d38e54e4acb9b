"""What a run tells: lines of JSON, TensorBoard, the picture of its loss."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from longnet_dist.checkpoint.run_folder import RunFolder, write_text
from longnet_dist.errors import CheckpointError
from longnet_dist.inference.evaluation import Evaluation


@dataclass(frozen=True)
class StepMetrics:
    """A line of ``metrics.jsonl``.

    Attributes:
        step: counted from 1.
        loss: nats a labelled token, all ranks; null in the file if it is not finite.
        grad_norm: of the whole gradient, before clipping; null in the file if it is not finite.
        lr: learning rate of this step.
        tokens: rows trained on since the start of the run, all ranks.
        step_seconds: wall-clock time of the step.
        tokens_per_second: of this step, all ranks.
        skipped: steps of the run until now that changed nothing, because loss or gradient was not finite.
        tflops_per_gpu, mfu, peak_memory_allocated, peak_memory_reserved: as in
            :class:`~longnet_dist.telemetry.throughput.Speed`; not in the file where they are None.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    step_seconds: float
    tokens_per_second: float
    skipped: int
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    peak_memory_allocated: int | None = None
    peak_memory_reserved: int | None = None


class MetricsLog:
    """Writes metrics as they come; rank 0 has one.

    Args:
        folder: of the run.
        last_step: of the checkpoint that the run goes on from, 0 for a new run; what was written after it is dropped.
    """

    def __init__(self, folder: RunFolder, last_step: int) -> None:
        # TensorBoard takes a second to import, which evaluation and generation need not wait for.
        from torch.utils.tensorboard import SummaryWriter

        for file in (folder.metrics_file, folder.validation_file):
            kept = [line for line in read_jsonl(file) if line["step"] <= last_step]
            write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = folder.metrics_file.open("a", encoding="utf-8", buffering=1)
        self._validation = folder.validation_file.open("a", encoding="utf-8", buffering=1)
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=last_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()
        self._validation.close()
        self._board.close()

    def step(self, metrics: StepMetrics) -> None:
        """Write one step."""
        known = {name: value for name, value in asdict(metrics).items() if value is not None}
        fields = {name: value if math.isfinite(value) else None for name, value in known.items()}
        self._metrics.write(json.dumps(fields) + "\n")
        step = fields.pop("step")
        for name, value in fields.items():
            if value is not None:
                self._board.add_scalar(f"train/{name}", value, step)

    def validation(self, step: int, evaluation: Evaluation) -> None:
        """Write one validation."""
        fields = asdict(evaluation)
        self._validation.write(json.dumps({"step": step, **fields}) + "\n")
        for name, value in fields.items():
            self._board.add_scalar(f"validation/{name}", value, step)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, none if it does not exist. A last line cut short by a crash is left out.

    Raises:
        CheckpointError: another line is damaged.
    """
    if not file.exists():
        return []
    *whole, _ = file.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}; remove it to start its record anew") from None


def draw_loss_curve(folder: RunFolder, bytes_per_token: float) -> None:
    """Draw the loss of training and validation over steps into ``loss.png``, in bits per byte of text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [line for line in read_jsonl(folder.metrics_file) if line["loss"] is not None]
    bits = 1 / (math.log(2) * bytes_per_token)
    axes.plot([line["step"] for line in steps], [line["loss"] * bits for line in steps], lw=1, label="training")
    if validations := read_jsonl(folder.validation_file):
        points = [line["step"] for line in validations], [line["bits_per_byte"] for line in validations]
        axes.plot(*points, "o-", ms=4, lw=1.5, label=f"validation (last {points[1][-1]:.3f})")
    axes.set(xlabel="step", ylabel="bits per byte", title=folder.path.name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder.curve_file, dpi=150)
