"""What a run leaves and says at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from longnet_dist.checkpoint.format import checkpoint_folder
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import LongNetError
from longnet_dist.inference.generation import Sampling
from longnet_dist.inference.runs import continue_text
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.telemetry.metrics import draw_loss_curve
from longnet_dist.train.setup import RunSetup


def conclude(
    plan: RunSetup, step: int, is_complete: bool, bytes_per_token: float | None, release: Callable[[], None]
) -> None:
    """Draw the curve, let the trained model write a sample, and say where both are; or say where to go on.

    Args:
        plan: of the run.
        step: the last one that was done.
        is_complete: whether the run has no more steps to take.
        bytes_per_token: of the training split; None of features.
        release: gives the memory of training back.
    """
    train, folder = plan.config.train, plan.folder
    if not is_complete:
        place = f"is in {checkpoint_folder(folder.path, step)}; go on with train.resume=auto"
        if not train.checkpoint_every:
            place = "was the last; with train.checkpoint_every=0 there is no checkpoint to go on from"
        print(f"asked to stop: step {step} of {train.steps} {place}")
        return
    if step < train.steps:
        print(
            f"ended early after step {step} of {train.steps}: {train.patience} validations (train.patience) no better"
        )
    draw_loss_curve(folder, bytes_per_token)
    for validation in read_jsonl(folder.validation_file)[-1:]:
        print(f"validation: {_shown(validation, bytes_per_token is None)} after {validation['step']} steps")
    print(f"loss curve: {folder.curve_file}")
    if plan.writes_sample:
        release()
        _write_sample(plan, step)


def say_complete(plan: RunSetup) -> None:
    """Say that a run has done its last step already, and make up for a curve or sample that is missing.

    Args:
        plan: of the run.
    """
    folder, more = plan.folder, "train.patience" if plan.ended_early else "train.steps"
    print(
        f"the run in {folder.path} is complete: {plan.resume.checkpoint} has step {plan.steps_done}, the last one; "
        f"nothing was changed. Use more {more} to train on, or another train.output_dir for a new run"
    )
    try:
        token_file = plan.token_file or TokenFile.open(folder.config().data.path or "")
        if changes := plan.changes(token_file):
            print("\n  ".join(["not used, since there is no step to take:", *changes]))
        if not folder.curve_file.exists():
            draw_loss_curve(folder, token_file.bytes_per_token("train"))
            print(f"loss curve: {folder.curve_file}")
    except LongNetError as error:
        print(f"its settings and loss curve could not be looked at: {error}")
    if plan.writes_sample and not folder.sample_file.exists():
        _write_sample(plan, plan.steps_done)


def _shown(validation: Mapping[str, Any], is_features: bool) -> str:
    """Return the result of a validation, for people."""
    if is_features:
        fields = {name: value for name, value in validation.items() if name not in ("step", "sequences")}
        return ", ".join(
            f"{name} {'not finite' if value is None else f'{value:.4f}'}" for name, value in fields.items()
        )
    bits = validation.get("bits_per_byte")
    return f"{'no finite number of' if bits is None else f'{bits:.3f}'} bits per byte"


def _write_sample(plan: RunSetup, step: int) -> None:
    """Let the trained model write a sample. The run is complete, so what prevents the sample is only said.

    The model is loaded anew, on one device and with whole weights, into the memory that training gave back.
    """
    train, folder = plan.config.train, plan.folder
    last = checkpoint_folder(folder.path, step)
    try:
        (text,) = continue_text(last, train.sample_prompt, train.sample_tokens, Sampling(seed=train.seed))
        folder.sample_file.write_text(text, encoding="utf-8")
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"no sample could be written ({reason}); the run is complete, and its last checkpoint is in {last}")
        return
    print(f"sample ({folder.sample_file}):\n\n{text}")
