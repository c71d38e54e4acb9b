"""The schema lists the keys of a training run: one class for each section, each key with unit and default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from longnet_dist.config.encoder_model import EncoderConfig
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.config.model import LongNetConfig
from longnet_dist.errors import ConfigError
from longnet_dist.optim.optimizers import OPTIMIZERS
from longnet_dist.optim.schedules import SCHEDULES
from longnet_dist.optim.sequence_lengths import length_of, lengths_of
from longnet_dist.registry import ATTENTION_BACKENDS, FEATURE_TASKS

Precision = Literal["fp32", "bf16"]
AUTO = "auto"
MOST_MINUTES = 60 * 24 * 365  # a year; torch counts a time-out in nanoseconds, of which 64 bits have 292 years
PARTS_FROM_BYTES = 2**30  # the least size of a checkpoint that ranks write in parts unless asked


def _expanded(path: Path) -> Path:
    """Replace ``~`` or ``~user`` by the home folder, as a shell would."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} begins with a home folder that is unknown ({error}); write the whole path") from None


Place = Annotated[Path, AfterValidator(_expanded)]


def _model_of_kind(fields: Any) -> Any:
    """Return an encoder for fields with ``kind``, a model of transformers for ``path`` or ``config``; others as is."""
    if isinstance(fields, dict) and "kind" in fields:
        if fields["kind"] != "encoder":
            raise ConfigError(f"kind must be encoder, or left out for a language model, not {fields['kind']!r}")
        return EncoderConfig(**fields)
    named = isinstance(fields, dict) and any(fields.get(name) is not None for name in ("path", "config"))
    return HuggingFaceConfig(**fields) if named else fields


Model = Annotated[SerializeAsAny[LongNetConfig], BeforeValidator(_model_of_kind)]

DEEPSPEED_KEYS_OF_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.clip_norm",
    "zero_optimization": "deepspeed.zero_stage",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.precision",
    "optimizer": "train.optimizer",
    "zero_allow_untested_optimizer": "train.optimizer",
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
    """A Section is immutable and rejects keys that are not in the schema.

    A renamed key is still accepted under its old name, with one warning.

    Attributes:
        renamed: new name of each old key.
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


FEATURE_KEYS = ("features", "task", "labels", "mask_share", "validation_share", "validation_names")
"""Keys of section ``data`` that runs on text have not."""


class DataConfig(Section):
    """The section ``data`` selects the text, or the features, that a run trains on.

    Attributes:
        path: token file made by ``longnet prepare``; if not given, the source code of Python's standard library, as
            bytes.
        cache_dir: folder for the token file of the standard library, which is made once.
        sequence_length: tokens ``N`` of a sample, over all sequence ranks together. With ``features`` it is the rows of
            the longest file, whatever is given.
        documents: keep the documents of a sample apart: each is computed as if it were alone, and no label crosses an
            edge. Validation and ``longnet evaluate`` do the same. False: a sample is one text.
        packing: how samples are filled: ``contiguous`` (stretches of the token file), or ``best_fit`` (whole documents,
            of which only those longer than a sample are cut; the rest of a sample is padding), which needs
            ``documents=true``.
        features: folder with a file of features for each sequence (HDF5, .npy, .pt); an encoder trains on them in place
            of text.
        task: what an encoder learns from features, a name of ``model/feature_tasks``: ``masked_features`` or
            ``classification``. If not given, classification where ``labels`` are given.
        labels: file with the class of each sequence: CSV lines ``name,label``, with or without a header, or JSON lines
            with these two keys.
        mask_share: share of the rows that ``masked_features`` hides and predicts.
        validation_share: share of the files that are kept for validation; chosen by their names, from each class.
        validation_names: file with the names of the files that are kept for validation, one a line; in place of the
            share.
    """

    path: Place | None = None
    cache_dir: Place = Path("data")
    sequence_length: PositiveInt = 2048
    documents: bool = False
    packing: Literal["contiguous", "best_fit"] = "contiguous"
    features: Place | None = None
    task: str | None = None
    labels: Place | None = None
    mask_share: float = Field(0.6, gt=0, lt=1)
    validation_share: float = Field(0.1, ge=0, lt=1)
    validation_names: Place | None = None

    @property
    def feature_task(self) -> str:
        """Return ``task``, or what follows from the labels."""
        return self.task or ("masked_features" if self.labels is None else "classification")

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        defaults = type(self).model_fields
        of_text = ("path", "cache_dir", "documents", "packing")
        for key in of_text if self.features else FEATURE_KEYS[1:]:
            if getattr(self, key) != defaults[key].default:
                raise ConfigError(
                    f"data.{key} is for runs on text, but data.features is given; leave one of them out"
                    if self.features
                    else f"data.{key} is for runs on features, but data.features is not given; give it too"
                )
        if self.task is not None:
            FEATURE_TASKS.check(self.task, "data.task")
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.packing == "best_fit" and not self.documents:
            raise ConfigError(
                "data.packing=best_fit packs documents that are kept apart, but data.documents is false; use "
                "data.documents=true or data.packing=contiguous"
            )
        return self


class ProfileConfig(Section):
    """The section ``train.profile`` selects the steps to profile.

    Attributes:
        first: number of the first profiled step, counted from 1.
        steps: number of profiled steps.
    """

    first: PositiveInt = 3
    steps: PositiveInt = 1

    @property
    def last(self) -> int:
        """Return the number of the last profiled step."""
        return self.first + self.steps - 1


class TrainConfig(Section):
    """The section ``train`` sets how a run trains; optimizer defaults are LongNet's (section 4.1, appendix A).

    Attributes:
        output_dir: folder of the run: configuration, metrics, checkpoints, loss curve, sample.
        steps: optimizer steps of the whole run; the learning rate decays over them.
        seed: seed of the initial weights and of the order of samples.
        precision: ``fp32``, ``bf16`` (with fp32 master weights and gradient sums), or ``auto``: bf16 on a GPU, fp32 on
            a CPU.
        batch_size: sequences of one step, over all data ranks together. A run on another mesh sees the same samples.
        micro_batch_size: sequences that a data rank computes at once; its whole share of the batch if not given.
        chunk_length: tokens of a sequence, over all its ranks together, that are computed and differentiated at once;
            the whole sequence if not given. Shorter chunks need less memory and a second forward. Causal models only.
        activation_checkpointing: what a block saves for backward: ``none``, ``selective`` or ``full``. ``none``: all
            that autograd saves. ``selective``: its input and the attention's output; the rest is recomputed. ``full``:
            its input only; the attention is recomputed too.
        cache_qkv: number of final blocks that save queries, keys and values too, so that these are not recomputed;
            needs ``activation_checkpointing=selective``.
        offload_activations: copy saved activations to pinned host memory during the computation, except the queries,
            keys and values of ``cache_qkv``; needs ``selective`` or ``full`` checkpointing.
        resident_blocks: number of final layers whose saved activations stay on the GPU. Raise it when ``longnet plan``
            reports a non-zero ``offload`` time. If not given, the largest number that does not raise the peak memory:
            2 with ``selective``, 1 with ``full``.
        offload_qkv: number of blocks, the first ones with ``cache_qkv``, whose queries, keys and values are offloaded
            too; needs ``offload_activations``.
        feed_forward_tile: tokens for which a rank computes projections, norms and feed-forward at once; all if not
            given.
        compile: compile the row-wise parts of a block and the loss with ``torch.compile``, in training; ``auto``: on a
            GPU.
        compile_cache: folder in which compiled code and kernels survive the process, for all ranks and later runs;
            ``auto``: ``longnet_dist`` in ``XDG_CACHE_HOME`` or ``~/.cache``; null: wherever each compiler keeps them.
            Variables such as ``TORCHINDUCTOR_CACHE_DIR`` go before it.
        cuda_graph: replay forward and backward of a micro-batch as CUDA graphs, which spares the host its launches: for
            small models, which are done before their host. It holds the memory of a micro-batch throughout the run.
            For whole sequences of one rank, without packed documents; ``length_warmup`` is computed as without.
        matmul: backend of the linear layers in compiled blocks. ``quack`` (package quack-kernels) fuses the norm before
            and the addition after a linear layer, in bf16 on a Hopper GPU. ``auto`` uses it where it runs. With fewer
            than 4,096 tokens at once, ``torch`` is used in any case.
        attention_backend: backend of dilated attention: ``auto`` (the fastest that runs), ``triton``, ``flash``,
            ``sdpa``, ``reference``, or another that is registered.
        deterministic: take algorithms that repeat in every bit from run to run; on a Hopper GPU the backward of
            attention is slower then.
        peak_tflops: peak of one GPU for the model FLOPs utilization, TFLOP/s; if not given, the data sheet's dense
            bf16 peak.
        ignore_plan: start even if the estimated memory is larger than that of the device.
        profile: steps of which a trace and a snapshot of the GPU's memory are written into the run's folder.
        optimizer: ``adamw``, ``muon`` (for hidden matrices; AdamW for the rest), ``adafactor``, or another that is
            registered.
        learning_rate: peak learning rate of the schedule.
        warmup_steps: steps of linear warm-up.
        length_warmup: steps in which sequences grow to ``data.sequence_length``, doubling. A sample is cut into shorter
            sequences, so a step has as many tokens as ever; 0: samples are whole from the first step on.
        shortest_length: fewest tokens of a sequence in ``length_warmup``.
        schedule: decay after warm-up: ``polynomial``, ``cosine``, or ``wsd`` (stable, then linear).
        decay_power: power of the polynomial decay; 1 is linear.
        decay_fraction: share of all steps in which ``wsd`` decays, at the end.
        final_learning_rate: learning rate at the end of the decay.
        adam_betas: decay rates of the two moments of AdamW.
        adam_eps: epsilon of AdamW.
        muon_momentum: decay rate of the momentum of Muon.
        weight_decay: weight decay of matrices; norms, biases and embeddings have none.
        clip_norm: largest norm of the whole gradient, beyond which it is scaled down; 0: no clipping.
        validate_every: steps between two validations, with another at the end; 0: never.
        validation_tokens: tokens of the validation split that one validation reads.
        checkpoint_every: steps between two checkpoints, with another at the end; 0: no checkpoints and no sample, for
            measurements.
        checkpoint_async: write checkpoints during training, from a copy in host memory, 12 bytes for each parameter;
            else training waits for the disk.
        checkpoint_parts: ``ranks``: each rank writes a part of a checkpoint, what it holds, at the same time; ``one``:
            rank 0 gathers and writes whole tensors; ``auto``: ``ranks`` for checkpoints of 1 GiB or more. Any layout
            reads both.
        keep_last: number of newest checkpoints to keep; older ones are deleted. 0: keep all.
        keep_every: keep, in addition, the checkpoints at multiples of this many steps; 0: none.
        keep_best: write a checkpoint after a validation whose loss is the least so far, and keep it until there is a
            better one.
        patience: validations in a row without a lower loss that end the run early; 0: never.
        checkpoint_failures: checkpoints in a row that cannot be written and end the run; each one before is a warning.
        max_skipped: consecutive skipped steps that end the run. A step whose loss or gradient is not finite is skipped:
            it changes nothing and is counted.
        skip_spikes: skip, too, a step whose loss or gradient norm is more than six standard deviations above the mean
            of the last 128 steps; such steps are counted apart.
        loggers: what records metrics: ``jsonl`` (from which the loss curve is drawn), ``tensorboard``, ``wandb``,
            ``trackio``.
        resume: ``auto``, ``never``, or the path of a checkpoint or of a run's folder. ``auto`` resumes from the newest
            checkpoint in ``output_dir``, if there is one. ``never`` refuses a folder that contains a run.
        init: checkpoint, run's folder or exported model whose weights a new run begins with, at step 0; data, sequence
            length and pattern may be others. Ignored when the run resumes. Without ``model.dim`` and ``model.name``,
            the run also takes its model, of which the given ``model`` keys replace single fields.
        ignore_tokenizer: begin even if the tokens of the data are of another tokenizer than the one that the initial
            weights were trained with, such as for a new vocabulary.
        sample_prompt: text that the trained model continues at the end, into ``sample.txt``.
        sample_tokens: tokens of this sample; 0: no sample.
    """

    renamed = {"keep_projections": "cache_qkv", "offload_projections": "offload_qkv", "products": "matmul"}

    output_dir: Place
    steps: PositiveInt
    seed: int = Field(0, ge=0, lt=2**64)
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
    compile_cache: Literal["auto"] | Place | None = "auto"
    cuda_graph: bool = False
    matmul: Literal["auto", "torch", "quack"] = "auto"
    attention_backend: str = AUTO
    deterministic: bool = False
    peak_tflops: PositiveFloat | None = None
    ignore_plan: bool = False
    profile: ProfileConfig | None = None
    optimizer: str = "adamw"
    learning_rate: PositiveFloat = 6e-4
    warmup_steps: int = Field(750, ge=0)
    length_warmup: int = Field(0, ge=0)
    shortest_length: PositiveInt = 2048
    schedule: str = "polynomial"
    decay_power: PositiveFloat = 1.0
    decay_fraction: float = Field(0.2, gt=0, le=1)
    final_learning_rate: float = Field(0.0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_eps: PositiveFloat = 1e-8
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(2.0, ge=0)
    validate_every: int = Field(500, ge=0)
    validation_tokens: PositiveInt = 262144
    checkpoint_every: int = Field(1000, ge=0)
    checkpoint_async: bool = True
    checkpoint_parts: Literal["auto", "one", "ranks"] = "auto"
    keep_last: int = Field(3, ge=0)
    keep_every: int = Field(0, ge=0)
    keep_best: bool = False
    patience: NonNegativeInt = 0
    checkpoint_failures: PositiveInt = 3
    max_skipped: PositiveInt = 10
    skip_spikes: bool = False
    loggers: tuple[str, ...] = ("jsonl", "tensorboard")
    resume: str = "auto"
    init: Place | None = None
    ignore_tokenizer: bool = False
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
        return self

    @field_validator("attention_backend")
    @classmethod
    def _check_backend(cls, backend: str) -> str:
        ATTENTION_BACKENDS.check(backend, "train.attention_backend", AUTO)
        return backend

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.init is not None and self.resume not in ("auto", "never"):
            raise ConfigError(
                f"train.init={self.init} begins a new run and train.resume={self.resume} goes on with another one; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        OPTIMIZERS.check(self.optimizer, "train.optimizer")
        for key in ("adam_betas", "adam_eps", "muon_momentum"):
            if key in OPTIMIZERS[self.optimizer].keys or getattr(self, key) == _default(self, key):
                continue
            owners = [name for name in OPTIMIZERS.names() if key in OPTIMIZERS[name].keys]
            raise ConfigError(
                f"train.{key} belongs to train.optimizer={' or '.join(owners)}, but the optimizer is "
                f"{self.optimizer}; leave {key} out, or use train.optimizer={owners[0]}"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
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
        """Return the least number of blocks whose saved activations are on the device at the same time.

        With ``selective``, backward brings one block back during the computation of the block above it.
        """
        return 2 if self.activation_checkpointing == "selective" else 1

    @property
    def resident(self) -> int:
        """Return ``resident_blocks``, or its default, which does not raise the peak memory."""
        return self.resident_blocks or self.least_resident

    def writes_parts(self, num_bytes: int, num_ranks: int) -> bool:
        """Say whether each rank writes a part of a checkpoint of ``num_bytes``; else rank 0 writes it.

        Many small files would take a file system longer than one.
        """
        parts = self.checkpoint_parts
        return num_ranks > 1 and (num_bytes >= PARTS_FROM_BYTES if parts == "auto" else parts == "ranks")

    def compiles(self, device_type: str) -> bool:
        """Say whether the row-wise parts are compiled on a device type, ``"cuda"`` or ``"cpu"``."""
        return device_type == "cuda" if self.compile == "auto" else self.compile


class ParallelConfig(Section):
    """The section ``parallel`` arranges the ranks in a mesh; their number is the product of ``data`` and ``sequence``.

    Attributes:
        sequence: ranks that share a sequence; ``auto``: the number of ranks divided by ``data``.
        data: groups of ranks with different sequences; ``auto``: the number of ranks divided by ``sequence``, or 1 if
            that is ``auto`` too.
        overlap: exchange keys and values during the computation of the segments inside a rank's slice; else before it.
        flight_recorder: number of last collectives that each rank records; 0: none. If ranks stop answering or do not
            meet, the records are written into ``flight_recorder/`` in the run's folder.
        timeout_minutes: minutes to wait for a rank that does not answer, may be a fraction; then the run ends with the
            number of the rank.
    """

    sequence: PositiveInt | Literal["auto"] = "auto"
    data: PositiveInt | Literal["auto"] = "auto"
    overlap: bool = True
    flight_recorder: NonNegativeInt = 2000
    timeout_minutes: float = Field(30.0, gt=0, le=MOST_MINUTES)


class DeepSpeedConfig(Section):
    """The section ``deepspeed`` sets what DeepSpeed shards over all ranks.

    Attributes:
        zero_stage: ZeRO stage, which shards: 0 nothing, 1 the optimizer state, 2 gradients too, 3 parameters too.
        offload_optimizer: keep the optimizer state and the master weights in host memory and update them on the CPU;
            needs stage 1, 2 or 3.
        extra: further keys of DeepSpeed's own configuration, passed on unchanged. Keys that another section sets, and
            those that change how gradients are summed, are refused.
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
    """A Config describes a whole training run, in five sections."""

    model: Model
    data: DataConfig = DataConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _check_settings_of_blocks(self) -> Self:
        """Refuse settings that a model of transformers cannot follow, since its blocks are not ours."""
        train, fields = self.train, TrainConfig.model_fields
        if not isinstance(self.model, HuggingFaceConfig):
            return self
        ours = (
            "offload_activations",
            "cache_qkv",
            "resident_blocks",
            "offload_qkv",
            "matmul",
            "length_warmup",
            "cuda_graph",
        )
        for key in ours:
            if getattr(train, key) != fields[key].default:
                raise ConfigError(
                    f"train.{key}={getattr(train, key)} is for LongNet's own blocks, but the run trains the model of "
                    f"model.path={self.model.path}; leave it out (train.activation_checkpointing=full saves memory)"
                )
        if train.activation_checkpointing == "selective" or train.compile is True:
            key = "compile=true" if train.compile is True else "activation_checkpointing=selective"
            raise ConfigError(
                f"train.{key} is for LongNet's own blocks, but the run trains the model of model.path="
                f"{self.model.path}; use train.compile=auto and train.activation_checkpointing=full or none"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.precision == "bf16":
            check_precision("bf16", self.deepspeed.zero_stage)
        check_optimizer(self.train.optimizer, self.deepspeed)
        chunk_length, length = self.train.chunk_length, self.data.sequence_length
        if chunk_length is not None and chunk_length < length and not self.model.causal:
            raise ConfigError(
                f"tokens of a model with model.causal=false see later ones, so sequences of {length} cannot be "
                f"trained in chunks of train.chunk_length={chunk_length}; leave chunk_length out"
            )
        if self.train.length_warmup and not lengths_of(self.train.shortest_length, length):
            raise ConfigError(
                f"train.length_warmup={self.train.length_warmup} lets sequences double from "
                f"train.shortest_length={self.train.shortest_length} on, which is more than half of "
                f"data.sequence_length={length}; use a smaller shortest_length or length_warmup=0"
            )
        return self

    def length_of_step(self, step: int) -> int:
        """Return the tokens of a sequence in a step, counted from 0; fewer than those of a sample in the warm-up."""
        train = self.train
        return length_of(step, train.length_warmup, train.shortest_length, self.data.sequence_length)

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        encoder = isinstance(self.model, EncoderConfig)
        if self.data.features is None and encoder:
            raise ConfigError(
                "a model with kind=encoder trains on features, but data.features is not given; give a folder of "
                "features, or leave model.kind out for a language model"
            )
        if self.data.features is None:
            return self
        if not encoder:
            raise ConfigError(
                "data.features trains an encoder, but the model is a language model; set model.kind=encoder, or leave "
                "the model's sizes out and give train.init, a folder that longnet convert wrote"
            )
        if self.train.chunk_length is not None:
            raise ConfigError(
                f"sequences of features are computed whole, but train.chunk_length={self.train.chunk_length}; leave it "
                "out, or use more parallel.sequence ranks"
            )
        if self.train.cuda_graph:
            raise ConfigError(
                "sequences of features have the lengths of their files, so train.cuda_graph=true cannot replay them; "
                "leave it out"
            )
        if self.train.length_warmup:
            raise ConfigError(
                f"sequences of features have the lengths of their files, but train.length_warmup is "
                f"{self.train.length_warmup}; leave it out"
            )
        return self

    def precision(self, device_type: str) -> Precision:
        """Resolve the precision for a device type, ``"cuda"`` or ``"cpu"``.

        Raises:
            ConfigError: the precision is bf16 and the ZeRO stage is 0.
        """
        chosen = self.train.precision
        precision: Precision = ("bf16" if device_type == "cuda" else "fp32") if chosen == "auto" else chosen
        check_precision(precision, self.deepspeed.zero_stage)
        return precision


def check_optimizer(name: str, deepspeed: DeepSpeedConfig) -> None:
    """Refuse an optimizer with a ZeRO stage or an offload in which it does not train exactly.

    Raises:
        ConfigError: the optimizer cannot be sharded like this, or cannot update on the CPU.
    """
    rule, stage = OPTIMIZERS[name], deepspeed.zero_stage
    if stage not in rule.zero_stages:
        stages = " or ".join(map(str, rule.zero_stages))
        raise ConfigError(
            f"train.optimizer={name} needs deepspeed.zero_stage {stages}, not {stage}, whose shards it cannot update "
            f"exactly; use deepspeed.zero_stage={rule.zero_stages[0]}"
            f"{' with train.precision=fp32' if rule.zero_stages == (0,) else ''}, or train.optimizer=adamw"
        )
    if deepspeed.offload_optimizer and not rule.host_offload:
        raise ConfigError(
            f"train.optimizer={name} updates on the GPU, but deepspeed.offload_optimizer is true; use "
            f"deepspeed.offload_optimizer=false, or train.optimizer=adamw"
        )


def check_precision(precision: Precision, zero_stage: int) -> None:
    """Refuse bf16 at ZeRO stage 0.

    There, DeepSpeed 0.19's bf16 optimizer starts with a step of zero gradients.

    Raises:
        ConfigError: the precision is bf16 and the stage is 0.
    """
    if precision == "bf16" and zero_stage == 0:
        raise ConfigError(
            "bf16 needs deepspeed.zero_stage 1, 2 or 3 (stage 0 trains inexactly in it); use deepspeed.zero_stage=1 "
            "or train.precision=fp32"
        )


def _default(section: Section, key: str) -> Any:
    return type(section).model_fields[key].default
