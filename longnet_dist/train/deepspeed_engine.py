"""DeepSpeed set up around a model: the only module that knows how DeepSpeed is started and where it keeps things."""

from __future__ import annotations

import difflib
import gc
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longnet_dist.checkpoint.parameter_roles import parameter_roles
from longnet_dist.checkpoint.zero_shards import shards_of_matrices
from longnet_dist.checkpoint.zero_tensors import inner_optimizer
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.config.deepspeed import deepspeed_config
from longnet_dist.config.schema import Config, Precision, TrainConfig
from longnet_dist.errors import ConfigError
from longnet_dist.extras import DESTRUCTIVE_DEEPSPEED, install_command
from longnet_dist.optim.optimizers import OPTIMIZERS, ParameterOf
from longnet_dist.private_interfaces import replace_view_updates, set_deepspeed_timeout

# What torch 2.13 says about calls that DeepSpeed 0.19 makes, at import and in every step.
_FOREIGN_WARNINGS = (
    (r".?torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor).? is deprecated", FutureWarning),
    (r".?torch\.jit\.script_method.? is deprecated", DeprecationWarning),
)


# The modules whose optimizers look at the norm of the gradient before an update.
_NORM_CHECKS = tuple(f"deepspeed.runtime.{name}" for name in ("zero.stage_1_and_2", "zero.stage3", "bf16_optimizer"))


def prepare_deepspeed(launch: LaunchEnvironment, device: torch.device) -> None:
    """Set what DeepSpeed reads from the process around it; call before anything else imports ``deepspeed``.

    On a CPU its choice of accelerator must be made for it, and it would compile a C++ extension for a minute.

    Raises:
        ConfigError: the installed version of DeepSpeed destroys models.
    """
    _refuse_destructive(version("deepspeed"))
    os.environ["LOCAL_RANK"] = str(launch.local_rank)  # one left over would contradict what MPI says
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for message, category in _FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _refuse_destructive(installed: str) -> None:
    if installed in DESTRUCTIVE_DEEPSPEED:
        raise ConfigError(
            f"DeepSpeed {installed} makes every weight NaN after one gradient that is not finite; install 0.19.8 or "
            f"newer: {install_command('train')}"
        )


def unread_keys(extra: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of ``deepspeed.extra`` that no configuration of the installed DeepSpeed reads.

    DeepSpeed itself ignores such keys. Its known ones are the strings in the files that read its configuration.
    """
    if not extra:
        return []
    import deepspeed

    root = Path(deepspeed.__file__).parent
    sources = [file for name in ("config", "constants") for file in root.rglob(f"*{name}*.py")]
    known = {word for file in sources for word in re.findall(r"[\"']?(\w+)[\"']?", file.read_text(encoding="utf-8"))}
    lines = []
    for key in _keys(extra):
        name = key.rpartition(".")[2]
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; the nearest key is {near[0]}" if near else ""
            lines.append(f"deepspeed.extra.{key} is read by nothing in DeepSpeed {version('deepspeed')}{hint}")
    return lines


def _keys(extra: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in extra.items():
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")


def build_engine(model: Any, config: Config, precision: Precision, micro_batch_size: int, accumulation: int) -> Any:
    """Make a ``DeepSpeedEngine`` that trains ``model``. Every rank must call; torch.distributed must be up.

    Args:
        model: with the same weights on every rank.
        config: the run.
        precision: ``bf16`` converts the model's weights and keeps float32 master weights.
        micro_batch_size: sequences that a data rank holds at once.
        accumulation: micro-batches of a step.
    """
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    if config.deepspeed.zero_stage == 3:
        # A block uses the weights of all its parts, in backward too: they are gathered around it, not around each part.
        set_z3_leaf_modules(model, model.block_types)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.train),
        config=deepspeed_config(config, precision, micro_batch_size, accumulation),
        dist_init_required=False,
    )
    set_deepspeed_timeout(timedelta(minutes=config.parallel.timeout_minutes))
    _spare_launches(engine.optimizer)
    if OPTIMIZERS[config.train.optimizer].gathers_matrices and config.deepspeed.zero_stage:
        shards = shards_of_matrices(engine.optimizer)
        inner_optimizer(engine).shards = {id(shard): matrices for shard, matrices in shards}
    return engine


def _spare_launches(optimizer: Any) -> None:
    """Let ZeRO 1 and 2 do for all parameters of a group at once what DeepSpeed does for each.

    A GPU is idle meanwhile: it is done with the backward by which its host was ahead.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    # Seven launches a parameter look for numbers that are not finite; the norm, next, shows them as well.
    optimizer.check_overflow = lambda partition_gradients: None
    optimizer.get_grad_norm_direct = partial(_norm_over_ranks, optimizer.dp_process_group)

    # After an update every parameter is made the view of its group's weights that it is already, unless these moved.
    def only_if_moved(make_views: Callable[[int], None]) -> Callable[[int], None]:
        def make_views_if_moved(group: int) -> None:
            parameter, weights = optimizer.round_robin_bit16_groups[group][0], optimizer.bit16_groups_flat[group]
            if parameter.untyped_storage().data_ptr() != weights.untyped_storage().data_ptr():
                make_views(group)

        return make_views_if_moved

    replace_view_updates(optimizer, only_if_moved)


def _norm_over_ranks(ranks: Any, gradients: Any, _parameters: Any, norm_type: float = 2.0) -> Tensor:
    """Norm of a group's gradients, of which every rank has a share: in bf16 views of one flat tensor."""
    assert norm_type == 2
    flat = getattr(gradients, "flat_partition", None)
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (gradients if flat is None else [flat])]
    total = torch.stack(norms).square().sum()
    dist.all_reduce(total, group=ranks)
    return total.sqrt().float()


def release(engine: Any) -> None:
    """Give back the memory of an engine that is not needed any more; neither it nor its model can be used again.

    DeepSpeed 0.19 keeps references to a model and its weights in modules and classes of its own, so dropping the engine
    frees little. Hence the storages themselves are emptied.
    """
    for tensor in _tensors_of([*engine.module.parameters(), *engine.module.buffers(), engine.optimizer]):
        storage = tensor.untyped_storage()
        if storage.resizable():
            storage.resize_(0)
    vars(engine.module).pop("forward", None)  # and the graphs that replaced it, with their memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tensors_of(values: list[Any]) -> Iterator[Tensor]:
    """The tensors among some values, in their containers, and in the attributes of optimizers and of tensors."""
    seen: set[int] = set()
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
            values += [value.grad] if value.is_leaf else []
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple | set):
            values += value
        elif isinstance(value, Tensor | torch.optim.Optimizer) or type(value).__module__.startswith("deepspeed."):
            values += getattr(value, "__dict__", {}).values()


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a run for a model that is not sharded yet. The schedule sets the learning rate.

    Args:
        model: with whole parameters.
        train: ``optimizer`` and the keys that it reads.
    """
    roles = parameter_roles(model)
    parameters = [ParameterOf(roles[name], parameter) for name, parameter in model.named_parameters()]
    return OPTIMIZERS[train.optimizer].build(parameters, train)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use ``learning_rate`` in the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_step(engine: Any, refuse: Callable[[float], bool] | None = None) -> float | None:
    """Tell DeepSpeed that a micro-batch is done; after the last one of a step it updates the weights.

    A gradient that is not finite changes nothing: neither weights nor the optimizer's states and its count of steps.
    Nor does one that ``refuse`` refuses.

    Args:
        engine: of the run.
        refuse: says of the norm of a finite gradient whether the update is refused. It is called once, on every rank,
            and must say the same on all.

    Returns:
        After the last micro-batch the norm of the whole gradient, averaged over ranks and before clipping, not finite
        if the gradient was not; else None.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if engine.zero_optimization_stage() > 0:
        with _norm_check(refuse) as norms:
            engine.step()  # which discards a gradient that is not finite, and then gives inf as its norm
        return norms[0] if norms else float(engine.get_global_grad_norm())
    # Without ZeRO DeepSpeed keeps no norm, but every rank holds the averaged gradient until the step.
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    if math.isfinite(norm) and not (refuse and refuse(norm)):
        engine.step()
    else:
        engine.module.zero_grad()
        engine.set_gradient_accumulation_boundary(False)  # count the micro-batch, but do not update
        engine.step()
        engine.set_gradient_accumulation_boundary(None)  # from its count again
    return norm


@contextmanager
def _norm_check(refuse: Callable[[float], bool] | None) -> Iterator[list[float]]:
    """Let DeepSpeed discard a gradient of whose norm ``refuse`` says so; yield a list that gets this norm.

    All its sharding optimizers discard a gradient of whose norm ``is_invalid_grad_norm`` says that it is not finite.
    """
    norms: list[float] = []
    modules = [import_module(name) for name in _NORM_CHECKS] if refuse else []
    originals = [module.is_invalid_grad_norm for module in modules]

    def check(norm: Any) -> bool:
        if originals[0](norm) or norms or refuse is None:
            return bool(originals[0](norm))
        norms.append(float(norm))
        return refuse(norms[0])

    try:
        for module in modules:
            module.is_invalid_grad_norm = check  # type: ignore[attr-defined]
        yield norms
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.is_invalid_grad_norm = original  # type: ignore[attr-defined]
