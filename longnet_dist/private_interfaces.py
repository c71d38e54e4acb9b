"""The only file that uses private interfaces of other packages, each behind a function.

A release of theirs may change such an interface without notice. ``INTERFACES`` lists all with the reason why a public
one does not do, and ``tests/test_private_interfaces.py`` looks for each with the versions that are installed. The
kernels for Hopper use private parts of Triton's Gluon; ``attention/kernels/hopper/gluon_api.py`` is their file.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError


class Interface(NamedTuple):
    """Describe a private interface.

    Attributes:
        reason: why it is used.
        parameters: names of its parameters that are given; empty if it is not a Python function.
    """

    reason: str
    parameters: tuple[str, ...] = ()


_C10D = "torch.distributed.distributed_c10d"
_FR = "torch._C._distributed_c10d"
_INTERFACE_OF_FLASH_4 = "flash_attn.cute.interface"

INTERFACES = {
    f"{_C10D}:_get_default_store": Interface("the watchdog watches ranks through the store in which they met"),
    f"{_C10D}:_abort_process_group": Interface("a failing rank cannot wait for collectives that others never join"),
    f"{_C10D}:_set_pg_timeout": Interface(
        "DeepSpeed makes its group with torch's default time-out", ("timeout", "group")
    ),
    f"{_FR}:_dump_fr_trace_json": Interface("the flight recorder has no public reader inside a process"),
    "torch.nn.modules.module:_has_any_global_hook": Interface("the engine calls no modules, so it must see hooks"),
    "torch.nn:Module._forward_hooks": Interface("the engine must see the hooks of a module"),
    "torch.cuda.memory:_record_memory_history": Interface(
        "a profile shows what holds memory", ("stacks", "max_entries", "enabled")
    ),
    "torch.cuda.memory:_dump_snapshot": Interface("a profile shows what holds memory", ("filename",)),
    "torch._dynamo.exc:FailOnRecompileLimitHit": Interface("a function that meets many shapes runs uncompiled"),
    "torch._dynamo:config": Interface("blocks meet more shapes than torch's limit of compilations"),
    "torch._inductor:config.deterministic": Interface("nothing public keeps Inductor from choosing by measured times"),
    "torch._inductor.virtualized:V": Interface("Inductor has no public way to hold rows of a norm in registers"),
    "torch._inductor.choices:InductorChoices.should_use_persistent_reduction": Interface(
        "Inductor has no public way to hold rows of a norm in registers", ("features", "cooperative_reduction")
    ),
    "torch._inductor.runtime.hints:ReductionHint": Interface("tells the rows of a norm from other sums"),
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu.default": Interface(
        "scaled_dot_product_attention returns no log-sum-exp"
    ),
    "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default": Interface(
        "the gradient of a mixture takes the merged output and log-sum-exp"
    ),
    "torch:ops.aten._scaled_dot_product_flash_attention": Interface("the same on a GPU"),
    "torch:ops.aten._scaled_dot_product_flash_attention_backward": Interface("the same on a GPU"),
    f"{_INTERFACE_OF_FLASH_4}:_flash_attn_fwd": Interface(
        "flash-attn's public function does not let the log-sum-exp be merged", ("softmax_scale", "causal", "return_lse")
    ),
    f"{_INTERFACE_OF_FLASH_4}:_flash_attn_bwd": Interface(
        "the gradient takes the merged output and log-sum-exp", ("softmax_scale", "causal", "deterministic")
    ),
    "transformers:PreTrainedConfig._attn_implementation": Interface(
        "transformers has a public way to set the attention of a model, but not of a configuration"
    ),
    "transformers:PreTrainedModel._can_set_attn_implementation": Interface(
        "transformers only warns where a model computes its attention by itself"
    ),
    "transformers:PreTrainedModel._set_gradient_checkpointing": Interface(
        "transformers keeps the function that checkpoints in the modules that it checkpoints",
        ("enable", "gradient_checkpointing_func"),
    ),
    "deepspeed.utils.groups:_clone_world_group": Interface("DeepSpeed has no time-out for the group that it makes"),
    "deepspeed.utils.tensor_fragment:tensor_fragment.get_hp_fragment": Interface(
        "DeepSpeed gathers whole tensors of ZeRO 1 and 2, and has no public way to what a rank has",
        ("optim_state_key",),
    ),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._update_model_bit16_weights": Interface(
        "DeepSpeed makes views anew for every parameter after each update", ("group_index",)
    ),
}


@bounded_cache(maxsize=64)
def private(path: str) -> Any:
    """Return a private interface.

    Args:
        path: a key of ``INTERFACES``, ``"module:attribute"``.

    Raises:
        ConfigError: the installed version does not have it.
    """
    module, _, names = path.partition(":")
    reason = INTERFACES[path].reason
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            # An instance has what its class makes for it, as torch.nn.Module its hooks.
            found = getattr(found() if name == "_forward_hooks" else found, name)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{package} {_version(package)} has no {module}.{names} ({error}), which longnet_dist uses because "
            f"{reason}; install a version that longnet_dist allows"
        ) from None
    return found


def _version(package: str) -> str:
    try:
        return version({"flash_attn": "flash-attn-4"}.get(package, package))
    except PackageNotFoundError:
        return "(not installed)"


def default_store() -> Any:
    """Return the store in which the ranks of the default process group met."""
    return private(f"{_C10D}:_get_default_store")()


def abort_process_group() -> None:
    """End the default process group without waiting for its collectives."""
    private(f"{_C10D}:_abort_process_group")()


def recorded_collectives(nccl: bool) -> bytes:
    """Return torch's flight record of this process as JSON, with collectives and without stacks.

    Args:
        nccl: whether NCCL recorded them; builds without CUDA have no such record.
    """
    if nccl:
        import torch

        dump = torch._C._distributed_c10d._dump_nccl_trace_json  # type: ignore[attr-defined]
    else:
        dump = private(f"{_FR}:_dump_fr_trace_json")
    record: bytes = dump(True, False)
    return record


def set_group_timeout(options: Any, timeout: Any) -> None:
    """Give NCCL's options the time-out of the group; torch warns where the two differ, and has no argument for it."""
    options._timeout = timeout


def set_deepspeed_timeout(timeout: Any) -> None:
    """Give DeepSpeed's own group of all ranks a time-out; every rank must call.

    Args:
        timeout: a ``timedelta``, after which a collective of the group fails.
    """
    import torch

    group = private("deepspeed.utils.groups:_clone_world_group")()
    # Newer releases of torch have a public function, and warn of the private one.
    public = getattr(torch.distributed, "set_timeout", None)
    (public or private(f"{_C10D}:_set_pg_timeout"))(timeout=timeout, group=group)


def has_global_hook() -> bool:
    """Say whether hooks for all modules are registered."""
    found: bool = private("torch.nn.modules.module:_has_any_global_hook")()
    return found


def has_hooks(module: Any) -> bool:
    """Say whether a module has hooks of its own, forward or backward."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(module.__dict__.get(hooks) for hooks in names)


def own_module(module: Any, name: str) -> Any:
    """Return a submodule by its name, past properties and ``__getattr__`` of a wrapper."""
    return module._modules[name]


def own_parameters(module: Any) -> dict[str, Any]:
    """Return a module's parameters by name, None for one that is left out; parametrized ones are missing."""
    parameters: dict[str, Any] = module._parameters
    return parameters


def record_memory(entries: int | None) -> None:
    """Record the last ``entries`` events of CUDA's allocator with Python's stacks; None ends the record.

    Resolving the names of C++ frames would take minutes.
    """
    record = private("torch.cuda.memory:_record_memory_history")
    if entries is None:
        record(enabled=None)
    else:
        record(stacks="python", max_entries=entries)


def dump_memory(file: str) -> None:
    """Write the recorded events of CUDA's allocator, a pickle for pytorch.org/memory_viz."""
    private("torch.cuda.memory:_dump_snapshot")(file)


def recompile_limit_error() -> type[BaseException]:
    """Return what ``torch.compile`` raises at one shape too many; importing it takes a second."""
    error: type[BaseException] = private("torch._dynamo.exc:FailOnRecompileLimitHit")
    return error


def recompile_limit(number: int) -> Any:
    """Return a context in which ``torch.compile`` compiles a function for ``number`` shapes."""
    return private("torch._dynamo:config").patch(recompile_limit=number)


def compiling_by_rule() -> Any:
    """Return a context in which Inductor measures nothing in order to choose."""
    private("torch._inductor:config.deterministic")
    return import_module("torch._inductor.config").patch(deterministic=True)


def inductor_choices(handler: Any) -> Any:
    """Return a context in which Inductor asks ``handler``, an ``InductorChoices``."""
    return private("torch._inductor.virtualized:V").set_choices_handler(handler)


def persistent_rows(widest: int, identity: str) -> Any:
    """Return Inductor's own choices, except that rows of up to ``widest`` numbers stay in registers.

    Args:
        widest: numbers of a row; Inductor's own limit is 1,024.
        identity: of these choices, part of the key of torch's cache, so that graphs of other choices are not reused.
    """
    should = "should_use_persistent_reduction"
    private(f"torch._inductor.choices:InductorChoices.{should}")
    graph, hint = private("torch._inductor.virtualized:V"), private("torch._inductor.runtime.hints:ReductionHint")
    choices = import_module("torch._inductor.choices").InductorChoices

    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        if features.get_reduction_hint() == hint.INNER and not cooperative_reduction:
            return bool(graph.graph.sizevars.statically_known_leq(features.reduction_numel, widest))
        own: bool = choices.should_use_persistent_reduction(features, cooperative_reduction)
        return own

    body = {should: staticmethod(should_use_persistent_reduction), "uuid": lambda self: identity}
    return type("PersistentRows", (choices,), body)()


def cpu_flash() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return torch's flash attention for CPUs, forward and backward, with log-sum-exp."""
    name = "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu"
    return private(f"{name}.default"), private(f"{name}_backward.default")


def gpu_flash() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return FlashAttention-2 as torch carries it, forward and backward, with log-sum-exp."""
    name = "torch:ops.aten._scaled_dot_product_flash_attention"
    return private(name), private(f"{name}_backward")


def flash_4() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return flash-attn 4's functions beneath its autograd Function; they are compiled at import."""
    return private(f"{_INTERFACE_OF_FLASH_4}:_flash_attn_fwd"), private(f"{_INTERFACE_OF_FLASH_4}:_flash_attn_bwd")


def replace_view_updates(zero_optimizer: Any, make: Callable[[Callable[[int], None]], Callable[[int], None]]) -> None:
    """Replace how ZeRO 1 and 2 make parameters views of their group's weights after an update.

    Args:
        zero_optimizer: DeepSpeed's ``DeepSpeedZeroOptimizer``.
        make: given DeepSpeed's own function of a group's number, returns the one to use.
    """
    zero_optimizer._update_model_bit16_weights = make(zero_optimizer._update_model_bit16_weights)


def fragment_of(parameter: Any, state: str | None = None) -> tuple[tuple[int, int], Any]:
    """Return what this rank has of a parameter with ZeRO 1 or 2: the numbers ``[first, last)``, and them.

    Args:
        parameter: of DeepSpeed's engine.
        state: a name of the optimizer's states; None for the float32 weight.

    Returns:
        the range, and a view of the rank's flat tensor; ``(0, 0)`` and None if the rank has nothing of it.
    """
    private("deepspeed.utils.tensor_fragment:tensor_fragment.get_hp_fragment")
    mapping = parameter._hp_mapping
    if mapping is None:
        return (0, 0), None
    place = mapping.lp_fragment_address
    return (place.start, place.start + place.numel), mapping.get_hp_fragment(state).detach()


def attention_of(config: Any) -> str | None:
    """Return the name of the attention that a configuration of transformers asks for."""
    name: str | None = config._attn_implementation
    return name


def set_attention(config: Any, name: str) -> None:
    """Let a configuration of transformers ask for an attention by its registered name."""
    config._attn_implementation = name


def takes_attention(model_class: Any) -> bool:
    """Say whether a class of transformers computes attention by the function that a configuration names."""
    takes: bool = model_class._can_set_attn_implementation()
    return takes


def checkpoint_function(module: Any) -> Callable[..., Any]:
    """Return the function that ``_set_gradient_checkpointing`` has given to a module."""
    function: Callable[..., Any] = module._gradient_checkpointing_func
    return function
