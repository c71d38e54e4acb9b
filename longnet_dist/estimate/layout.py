"""A RunLayout splits the work of a step over ranks, micro-batches and chunks."""

from __future__ import annotations

from dataclasses import dataclass

from longnet_dist.comm.mesh import MeshShape
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.config.schema import Config, Precision
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.window import Shards
from longnet_dist.registry import ATTENTION_BACKENDS


@dataclass(frozen=True)
class RunLayout:
    """A RunLayout says how a configuration runs on a number of ranks; it is the same on every rank.

    Attributes:
        config: the configuration of the run.
        device_type: ``"cuda"`` or ``"cpu"``.
        precision: ``"bf16"`` or ``"fp32"``, with ``auto`` resolved for the device.
        mesh: ranks along each axis.
        micro_batch_size: sequences that a data rank computes at once.
        accumulation: micro-batches of a step.
        chunk_length: tokens of a sequence that its ranks compute at once, all together.
        passes: chunks of all micro-batches of a step, each one forward and backward.
    """

    config: Config
    device_type: str
    precision: Precision
    mesh: MeshShape
    micro_batch_size: int
    accumulation: int
    chunk_length: int
    passes: int

    @classmethod
    def of(cls, config: Config, world_size: int, device_type: str) -> RunLayout:
        """Split the work of a run.

        Args:
            config: the run.
            world_size: number of ranks.
            device_type: ``"cuda"`` or ``"cpu"``.

        Raises:
            ConfigError: ranks, batch, micro-batch and chunk do not fit together, or the precision cannot be trained in.
            ShapeError: a rank would have no token.
        """
        mesh = MeshShape.of(config.parallel, world_size)
        micro_batch_size, accumulation = _split_batch(config, mesh)
        chunk_length = _chunk_length(config, mesh)
        layout = cls(
            config=config,
            device_type=device_type,
            precision=config.precision(device_type),
            mesh=mesh,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            chunk_length=chunk_length,
            passes=accumulation * -(-config.data.sequence_length // chunk_length),
        )
        _check_whole_sequences(layout)
        _check_replays(layout)
        layout.last_chunk  # noqa: B018 (raises if a rank has no token of it; the other chunks divide evenly)
        return layout

    @property
    def num_ranks(self) -> int:
        """Return the number of all ranks, data × sequence."""
        return self.mesh.data * self.mesh.sequence

    @property
    def compiled(self) -> bool:
        """Say whether ``torch.compile`` compiles the row-wise parts of the blocks."""
        return self.config.train.compiles(self.device_type) and not isinstance(self.config.model, HuggingFaceConfig)

    @property
    def merges_overlaps(self) -> bool:
        """Say whether the kernels compute a pair that several branches have only once; of a GPU the fastest do."""
        backend = self.config.train.attention_backend
        if backend == "auto":
            return self.device_type == "cuda"
        merges: bool = ATTENTION_BACKENDS[backend].merges_overlaps
        return merges

    @property
    def num_chunks(self) -> int:
        """Return the number of chunks of a sequence."""
        return self.passes // self.accumulation

    @property
    def last_chunk(self) -> Shards:
        """Return the slices of the last chunk of a sequence, which needs the most rows of earlier chunks."""
        length = self.config.data.sequence_length
        return Shards.even(length, self.mesh.sequence, (self.num_chunks - 1) * self.chunk_length)

    @property
    def local_tokens(self) -> int:
        """Return the tokens that a rank computes at once, of all sequences of a micro-batch."""
        return -(-self.chunk_length // self.mesh.sequence) * self.micro_batch_size

    @property
    def itemsize(self) -> int:
        """Return the bytes of a number in the activations."""
        return 2 if self.precision == "bf16" else 4


def _check_whole_sequences(layout: RunLayout) -> None:
    """Refuse to split sequences for a kind of attention that computes them whole."""
    model = layout.config.model
    if not model.needs_whole_sequences:
        return
    data = layout.config.data
    for key, value, split, whole in (
        ("parallel.sequence", layout.mesh.sequence, layout.mesh.sequence > 1, 1),
        ("train.chunk_length", layout.chunk_length, layout.num_chunks > 1, data.sequence_length),
        ("data.documents", "true", data.documents, "false"),
        ("train.length_warmup", layout.config.train.length_warmup, layout.config.train.length_warmup > 0, 0),
    ):
        if split:
            raise ConfigError(
                f"model.attention={model.attention} computes a sequence whole, on one device and as one document, but "
                f"{key} is {value}; use {key}={whole}, or model.attention=dilated or full"
            )


def _check_replays(layout: RunLayout) -> None:
    """Refuse CUDA graphs where a micro-batch is not the same kernels on the same memory each time."""
    config = layout.config
    train, model = config.train, config.model
    if not train.cuda_graph:
        return
    for key, value, differs, alike in (
        ("parallel.sequence", layout.mesh.sequence, layout.mesh.sequence > 1, "1"),
        ("train.chunk_length", layout.chunk_length, layout.num_chunks > 1, str(config.data.sequence_length)),
        ("data.documents", "true", config.data.documents, "false"),
        ("train.offload_activations", "true", train.offload_activations, "false"),
        ("deepspeed.zero_stage", config.deepspeed.zero_stage, config.deepspeed.zero_stage == 3, "1 or 2"),
        ("model.attention", getattr(model, "attention", ""), model.needs_whole_sequences, "dilated or full"),
    ):
        if differs:
            raise ConfigError(
                f"train.cuda_graph=true replays whole sequences of one rank, each one document, from memory that stays "
                f"in place, but {key} is {value}; use {key}={alike}, or train.cuda_graph=false"
            )


def _split_batch(config: Config, mesh: MeshShape) -> tuple[int, int]:
    """Return the sequences of a micro-batch and the micro-batches of a step."""
    batch_size = config.train.batch_size
    micro_batch_size = config.train.micro_batch_size or max(1, batch_size // mesh.data)
    if batch_size % (micro_batch_size * mesh.data):
        raise ConfigError(
            f"train.batch_size must be a multiple of train.micro_batch_size × data ranks, but it is {batch_size} for "
            f"micro-batches of {micro_batch_size} on {mesh.data} data ranks; use train.batch_size="
            f"{-(-batch_size // (micro_batch_size * mesh.data)) * micro_batch_size * mesh.data} or another mesh"
        )
    return micro_batch_size, batch_size // (micro_batch_size * mesh.data)


def _chunk_length(config: Config, mesh: MeshShape) -> int:
    """Return the tokens of a chunk, of all sequence ranks together."""
    length = config.train.chunk_length
    if length is None or length >= config.data.sequence_length:
        return config.data.sequence_length
    if length % mesh.sequence:
        raise ConfigError(
            f"train.chunk_length must be a multiple of the sequence ranks, which share a chunk, but {length} is none "
            f"of {mesh.sequence}; use {-(-length // mesh.sequence) * mesh.sequence}"
        )
    return length
