"""The keys of a training run: one class a section, every key with its unit and default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import ConfigError
from longnet_dist.optim.schedules import SCHEDULES

Precision = Literal["fp32", "bf16"]

DEEPSPEED_KEYS_OF_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.clip_norm",
    "zero_optimization": "deepspeed.zero_stage",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "optimizer": "train.learning_rate",
    "scheduler": "train.warmup_steps",
    "sequence_parallel_size": "parallel.sequence",
    "mesh_param": "parallel.sequence",
}
# Training is exact because gradients are summed in float32 over micro-batches and ranks and divided once.
DEEPSPEED_KEYS_OF_SUMS = (
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "gradient_allreduce_op",
    "managed_gradient_accumulation",
    "torch_autocast",
)


class Section(BaseModel):
    """Base of all sections: immutable, and a key that is not in the schema is an error.

    A key that was renamed is accepted under its old name, with one warning.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.renamed.keys() & values.keys():
            return values
        from longnet_dist.numerics import log_once  # which imports torch; a configuration alone does not need it

        taken = dict(values)
        for old in cls.renamed.keys() & values.keys():
            new = cls.renamed[old]
            if new in values:
                raise ConfigError(f"{old} is the old name of {new}, but both are given; leave {old} out")
            log_once(f"the key {old} is now called {new}; the old name still works")
            taken[new] = taken.pop(old)
        return taken


class DataConfig(Section):
    """What is trained on.

    Attributes:
        path: a token file of ``longnet prepare``; if not given, the source text of the Python standard library
            that runs the training, as bytes.
        cache_dir: folder in which the token file of the standard library is made once.
        sequence_length: rows ``N`` of a sample, all sequence ranks together.
    """

    path: Path | None = None
    cache_dir: Path = Path("data")
    sequence_length: PositiveInt = 2048


class ProfileConfig(Section):
    """Which steps are profiled.

    Attributes:
        first: number of the first one, counted from 1.
        steps: how many.
    """

    first: PositiveInt = 3
    steps: PositiveInt = 1

    @property
    def last(self) -> int:
        """Number of the last one."""
        return self.first + self.steps - 1


class TrainConfig(Section):
    """How it is trained; the defaults of the optimizer are LongNet's (section 4.1, appendix A).

    Attributes:
        output_dir: folder of the run: configuration, metrics, checkpoints, loss curve, sample.
        steps: optimizer steps of the whole run; the learning rate decays over them.
        seed: seed of the initial weights and of the order of samples.
        precision: ``fp32``, ``bf16`` (with fp32 master weights and gradient sums), or ``auto``: bf16 on a GPU, fp32 on
            a CPU.
        batch_size: sequences of one step, all data ranks together, so that a run on another mesh sees the same samples.
        micro_batch_size: sequences that a data rank holds at once; its whole share of the batch if not given.
        chunk_length: rows of a sequence, all its ranks together, that are computed and differentiated at once; the
            whole sequence if not given. Shorter chunks hold less memory and cost a second forward. Causal models only.
        activation_checkpointing: what a block saves for backward. ``none``: all that autograd does. ``selective``: its
            input and the attention's output; the rest is recomputed. ``full``: its input; the attention is recomputed
            too.
        cache_qkv: number of final blocks that also save queries, keys and values, so that these are not recomputed;
            with ``selective``.
        offload_activations: copy saved activations, but for those, to pinned host memory during the computation; not
            with ``none``.
        resident_blocks: number of final layers whose saved activations stay on the GPU. Raise it when ``longnet plan``
            reports a non-zero ``offload`` time. If not given, what costs no memory at the peak: 2 with ``selective``, 1
            with ``full``.
        offload_qkv: number of blocks, the first of those with ``cache_qkv``, whose queries, keys and values are
            offloaded as well; with ``offload_activations``.
        feed_forward_tile: rows of projections, norms and feed-forward that a rank computes at once; all if not given.
        compile: ``torch.compile`` of the row-wise parts of a block and of the loss, in training; ``auto``: on a GPU.
        matmul: backend of the linear layers in compiled blocks. ``quack`` (package quack-kernels) fuses the norm before
            and the sum behind a linear layer, in bf16 on a Hopper GPU. ``auto`` takes it where it runs. Fewer than
            4,096 tokens at once take ``torch`` in any case.
        peak_tflops: what MFU is a share of, TFLOP/s of one GPU; if not given, the data sheet's dense bf16 peak.
        ignore_plan: start although the planner says that the memory does not suffice.
        profile: steps of which a trace and a snapshot of the GPU's memory are written into the run's folder.
        learning_rate: peak of the schedule.
        warmup_steps: steps of linear warm-up.
        schedule: how the learning rate decays after it: ``polynomial``, ``cosine``, or ``wsd`` (stable, then linear).
        decay_power: power of the polynomial decay; 1 is linear.
        decay_fraction: share of all steps in which ``wsd`` decays, at the end.
        final_learning_rate: where the decay ends.
        adam_betas: decay of the two running means of AdamW.
        adam_eps: epsilon of AdamW.
        weight_decay: of matrices; norms, biases and embeddings have none.
        clip_norm: largest norm of the whole gradient; 0 does not clip.
        validate_every: steps from one validation to the next (and one at the end); 0: never.
        validation_tokens: tokens of the validation split that one validation reads.
        checkpoint_every: steps from one checkpoint to the next (and one at the end); 0: never, and then no sample, for
            measurements.
        checkpoint_async: write checkpoints beside the training, from a copy in the memory of rank 0 (12 bytes a
            parameter); else training waits for the disk.
        keep_last: checkpoints kept; older ones are deleted. 0 keeps all.
        keep_every: checkpoints of every so many steps are kept for good, beside the last; 0: none.
        max_skipped: consecutive steps whose loss or gradient is not finite that end the run. Such a step changes
            nothing and is counted.
        resume: ``auto`` goes on from the newest checkpoint in ``output_dir`` if there is one, ``never`` refuses a
            folder that holds a run, anything else is the path of a checkpoint or of a run's folder.
        sample_prompt: text that the trained model continues into ``sample.txt`` at the end.
        sample_tokens: tokens of that sample; 0: none.
    """

    renamed = {"keep_projections": "cache_qkv", "offload_projections": "offload_qkv", "products": "matmul"}

    output_dir: Path
    steps: PositiveInt
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    batch_size: PositiveInt = 4
    micro_batch_size: PositiveInt | None = None
    chunk_length: PositiveInt | None = None
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    cache_qkv: int = Field(0, ge=0)
    offload_activations: bool = False
    resident_blocks: PositiveInt | None = None
    offload_qkv: int = Field(0, ge=0)
    feed_forward_tile: PositiveInt | None = None
    compile: bool | Literal["auto"] = "auto"
    matmul: Literal["auto", "torch", "quack"] = "auto"
    peak_tflops: PositiveFloat | None = None
    ignore_plan: bool = False
    profile: ProfileConfig | None = None
    learning_rate: PositiveFloat = 6e-4
    warmup_steps: int = Field(750, ge=0)
    schedule: str = "polynomial"
    decay_power: PositiveFloat = 1.0
    decay_fraction: float = Field(0.2, gt=0, le=1)
    final_learning_rate: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(2.0, ge=0)
    validate_every: int = Field(500, ge=0)
    validation_tokens: PositiveInt = 262144
    checkpoint_every: int = Field(1000, ge=0)
    checkpoint_async: bool = True
    keep_last: int = Field(3, ge=0)
    keep_every: int = Field(0, ge=0)
    max_skipped: PositiveInt = 10
    resume: str = "auto"
    sample_prompt: str = "def "
    sample_tokens: int = Field(200, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"adam_betas must be at least 0 and below 1, not {list(self.adam_betas)}")
        if self.profile and self.profile.last > self.steps:
            raise ConfigError(
                f"train.profile asks for steps {self.profile.first} to {self.profile.last} of a run of {self.steps}; "
                f"use a smaller train.profile.first or train.profile.steps"
            )
        if self.offload_activations and self.activation_checkpointing == "none":
            raise ConfigError(
                "train.offload_activations moves what activation checkpointing keeps, but "
                "train.activation_checkpointing is none; use selective or full"
            )
        if self.cache_qkv and self.activation_checkpointing != "selective":
            raise ConfigError(
                f"train.cache_qkv={self.cache_qkv} says how much more selective checkpointing saves, but "
                f"train.activation_checkpointing is {self.activation_checkpointing}; use selective, or "
                f"train.cache_qkv=0"
            )
        if self.resident_blocks and not self.offload_activations:
            raise ConfigError(
                f"train.resident_blocks={self.resident_blocks} blocks stay on the device where others are offloaded, "
                f"but train.offload_activations is false; use train.offload_activations=true or leave "
                f"train.resident_blocks out"
            )
        if self.offload_qkv > (self.cache_qkv if self.offload_activations else 0):
            raise ConfigError(
                f"train.offload_qkv={self.offload_qkv} blocks offload the queries, keys and values that they save, "
                f"but train.cache_qkv={self.cache_qkv} and train.offload_activations is "
                f"{str(self.offload_activations).lower()}; use offload_activations=true and cache_qkv="
                f"{max(self.offload_qkv, self.cache_qkv)}"
            )
        if self.matmul == "quack" and self.compile is False:
            raise ConfigError(
                "train.matmul=quack is for compiled blocks, but train.compile is false; use train.compile=auto or "
                "train.matmul=auto"
            )
        SCHEDULES.check(self.schedule, "train.schedule")
        for key, owner in (("decay_power", "polynomial"), ("decay_fraction", "wsd")):
            if key in self.model_fields_set and self.schedule != owner and getattr(self, key) != _default(self, key):
                raise ConfigError(
                    f"train.{key} belongs to train.schedule={owner}, but the schedule is {self.schedule}; leave {key} "
                    f"out, or use train.schedule={owner}"
                )
        if self.final_learning_rate > self.learning_rate:
            raise ConfigError(
                f"the learning rate decays from learning_rate to final_learning_rate, but these are "
                f"{self.learning_rate} and {self.final_learning_rate}; use a smaller final_learning_rate"
            )
        return self

    @property
    def least_resident(self) -> int:
        """Blocks that are on the device at the least: ``selective`` brings one back while the one above is computed."""
        return 2 if self.activation_checkpointing == "selective" else 1

    @property
    def resident(self) -> int:
        """``resident_blocks``, or its default, which costs no memory."""
        return self.resident_blocks or self.least_resident

    def compiles(self, device_type: str) -> bool:
        """Whether the row-wise parts are compiled on a kind of device, ``"cuda"`` or ``"cpu"``."""
        return device_type == "cuda" if self.compile == "auto" else self.compile


class ParallelConfig(Section):
    """How the ranks are laid out; the product of both sizes is their number.

    Attributes:
        sequence: ranks that share a sequence; ``auto``: all that ``data`` leaves.
        data: groups of ranks with different sequences; ``auto``: what ``sequence`` leaves, 1 if that is ``auto`` too.
        overlap: exchange rows of attention while the segments inside a rank's slice are computed; else before them.
        flight_recorder: collectives that each rank remembers; where ranks stop answering or do not meet, the last ones
            are written into the run's folder, ``flight_recorder/``. 0: none.
        timeout_minutes: how long a rank that does not answer is waited for, with a fraction if need be; then the run
            ends with its number.
    """

    sequence: PositiveInt | Literal["auto"] = "auto"
    data: PositiveInt | Literal["auto"] = "auto"
    overlap: bool = True
    flight_recorder: NonNegativeInt = 2000
    timeout_minutes: PositiveFloat = 30.0


class DeepSpeedConfig(Section):
    """What DeepSpeed shards.

    Attributes:
        zero_stage: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also parameters, over all ranks.
        offload_optimizer: keep the optimizer's state and the master weights in the memory of the host, and update them
            there; needs a stage that shards them.
        extra: further keys of DeepSpeed's own configuration, as they are. Keys that another section sets, and those
            that change how gradients are summed, are refused.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("deepspeed.offload_optimizer needs deepspeed.zero_stage 1, 2 or 3, not 0")
        for key in self.extra:
            if key in DEEPSPEED_KEYS_OF_OURS:
                raise ConfigError(
                    f"deepspeed.extra.{key} would bypass this configuration; use {DEEPSPEED_KEYS_OF_OURS[key]}"
                )
            if key in DEEPSPEED_KEYS_OF_SUMS:
                raise ConfigError(
                    f"deepspeed.extra.{key}={self.extra[key]!r} would change how gradients are summed, but exact "
                    f"training needs float32 sums that are divided once; leave deepspeed.extra.{key} out"
                )
        return self


class Config(Section):
    """A whole training run."""

    model: LongNetConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.precision == "bf16":
            check_precision("bf16", self.deepspeed.zero_stage)
        chunk_length, length = self.train.chunk_length, self.data.sequence_length
        if chunk_length is not None and chunk_length < length and not self.model.causal:
            raise ConfigError(
                f"rows of a model with model.causal=false see later ones, so sequences of {length} rows cannot be "
                f"trained in chunks of train.chunk_length={chunk_length}; leave chunk_length out"
            )
        return self

    def precision(self, device_type: str) -> Precision:
        """The precision on a kind of device, ``"cuda"`` or ``"cpu"``.

        Raises:
            ConfigError: bf16 with a stage that cannot train in it.
        """
        chosen = self.train.precision
        precision: Precision = ("bf16" if device_type == "cuda" else "fp32") if chosen == "auto" else chosen
        check_precision(precision, self.deepspeed.zero_stage)
        return precision


def check_precision(precision: Precision, zero_stage: int) -> None:
    """Refuse bf16 without sharding: DeepSpeed 0.19's optimizer for it starts with a step of zero gradients."""
    if precision == "bf16" and zero_stage == 0:
        raise ConfigError(
            "bf16 needs deepspeed.zero_stage 1, 2 or 3 (stage 0 trains inexactly in it); use deepspeed.zero_stage=1 "
            "or train.precision=fp32"
        )


def _default(section: Section, key: str) -> Any:
    return type(section).model_fields[key].default
