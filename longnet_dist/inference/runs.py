"""What is done with a run that has been trained: measuring it, and letting it write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from longnet_dist.checkpoint.format import (
    CheckpointState,
    load_weights,
    newest_checkpoint,
    read_state,
)
from longnet_dist.checkpoint.identity import code_versions, digest_of, digest_of_tokenizer
from longnet_dist.checkpoint.lock import Lock, held_by_first
from longnet_dist.checkpoint.run_folder import RunFolder
from longnet_dist.checkpoint.run_model import new_model
from longnet_dist.comm.agreement import agreed
from longnet_dist.comm.launch_env import LaunchEnvironment, meeting_store, process_group
from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.config.loading import parse_config
from longnet_dist.config.schema import Config, Precision
from longnet_dist.data.batches import Windows, objective
from longnet_dist.data.token_file import SplitName, TokenFile
from longnet_dist.data.tokenizers import Tokenizer, encode_prompt, ids_with_text
from longnet_dist.engine.execution import Execution
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.extras import require_extra
from longnet_dist.inference.evaluation import Evaluation, evaluate
from longnet_dist.inference.generation import Sampling, TextStream, generate
from longnet_dist.inference.model_folder import ModelFolder
from longnet_dist.inference.stream_state import StreamTask
from longnet_dist.inference.streamed_evaluation import StateFile, evaluate_stream
from longnet_dist.model.longnet import LongNet
from longnet_dist.model.pretrained import TOKENIZER_FILE, save_pretrained
from longnet_dist.numerics import dtype_of
from longnet_dist.ops.compile_cache import prepare_compile_cache

COMPILED_FROM = 2**24  # tokens
COMPILED_TILE = 2**16  # rows
MEETING_TIME = timedelta(minutes=30)  # for ranks that do not know the run's own time-out yet
_PLAIN = Execution()
Result = TypeVar("Result")


def evaluate_run(
    path: Path,
    data: Path,
    contexts: Sequence[int],
    num_tokens: int,
    split: SplitName,
    launch: LaunchEnvironment,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[int, Evaluation]:
    """Evaluate a run at several context lengths. Every rank of the launch must call; all share each sequence.

    Args:
        path: folder of a run, or one of its checkpoints.
        data: a token file of the run's tokenizer.
        contexts: rows of the windows into which the text is cut.
        num_tokens: rows to predict, the first of the split, the same at every context.
        split: of the token file.
        launch: this process.
        changes: fields of the model's configuration to replace, such as another pattern for the same weights.

    Raises:
        LongNetError: no such run, checkpoint or file, or one that does not fit; on all ranks before they meet.
    """

    def opened() -> tuple[_Run, dict[int, Windows]]:
        if min(num_tokens, *contexts) < 1:
            raise ConfigError(f"contexts and tokens must be at least 1, but are {list(contexts)} and {num_tokens}")
        run = _Run.open(path).with_model(changes)
        return run, {context: run.windows(data, split, context) for context in contexts}

    store = meeting_store(launch, MEETING_TIME)
    asked = {"the arguments": f"{list(contexts)}, {num_tokens}, {split}"}
    run, windows = agreed(store, launch, "evaluate", opened, lambda part: part[0].facts(*part[1].values()) | asked)
    with run.model_on(launch, store=store) as (model, mesh, device):
        # As many windows at once as take no more memory than one of the longest.
        most = max(contexts)
        return {
            context: evaluate(model, part, num_tokens, most // context, mesh, device)
            for context, part in windows.items()
        }


def measure_run(
    path: Path,
    data: Path | None,
    length: int,
    launch: LaunchEnvironment,
    measure: Callable[[LongNet, Windows | None, torch.device], Result],
) -> Result:
    """Measure a run on one device with a function of one's own.

    Args:
        path: folder of a run, or one of its checkpoints.
        data: a token file of the run's tokenizer, of which the function gets the validation split; None for none.
        length: tokens of the windows.
        launch: this process, which must be the only one.
        measure: is given the model, the windows and the device.

    Raises:
        LongNetError: no such run, checkpoint or file, or one that does not fit.
    """
    run = _Run.open(path)
    windows = None if data is None else run.windows(data, "validation", length)
    with run.model_on(launch) as (model, _, device):
        return measure(model, windows, device)


def evaluate_run_streamed(
    path: Path,
    data: Path,
    chunk_length: int,
    num_tokens: int | None,
    split: SplitName,
    launch: LaunchEnvironment,
    state_path: Path | None = None,
    resume: bool = False,
) -> Evaluation:
    """Evaluate a run on a text as one sequence of any length, chunk by chunk. Every rank of the launch must call.

    Args:
        path: folder of a run, or one of its checkpoints.
        data: a token file of the run's tokenizer.
        chunk_length: rows that all ranks hold together at once, a multiple of the number of ranks.
        num_tokens: rows to predict, the first of the split; all if not given, or as many as ranks can share evenly.
        split: of the token file.
        launch: this process.
        state_path: file that keeps the state meanwhile, in the run's folder if not given.
        resume: whether to go on from that file.

    Raises:
        LongNetError: as :func:`evaluate_run`; a state of another evaluation.
        KeyboardInterrupt: on an interrupt, after the state has been saved.
    """
    ranks = launch.world_size

    def compiles(rows: int) -> bool:
        """Say whether the model is compiled: for a shorter text that takes longer than it saves."""
        return launch.device().type == "cuda" and rows >= COMPILED_FROM

    def opened() -> tuple[_Run, Windows]:
        if chunk_length < 1 or chunk_length % ranks:
            raise ConfigError(f"the chunk must be a positive multiple of the {ranks} ranks, but is {chunk_length} rows")
        run = _Run.open(path)
        rows = run.windows(data, split, 1).num_positions
        rows = rows if num_tokens is None else min(rows, num_tokens)
        if rows < ranks:
            raise ConfigError(f"every rank needs a row, but {rows} tokens are to be predicted on {ranks} ranks")
        if compiles(rows):
            prepare_compile_cache(run.config.train.compile_cache, os.environ)
        return run, run.windows(data, split, rows - rows % ranks)

    store = meeting_store(launch, MEETING_TIME)
    asked = {"the arguments": f"{chunk_length}, {num_tokens}, {split}, {resume}"}
    run, windows = agreed(store, launch, "evaluate", opened, lambda part: part[0].facts(part[1]) | asked)
    state_path = state_path or run.folder.path / f"{data.stem}.stream.safetensors"
    lock = Lock(state_path.with_name(f"{state_path.name}.lock"), f"the state of the stream (--state {state_path})")
    rows = windows.length_of(0)
    execution = Execution("selective", tile=COMPILED_TILE, compile=True) if compiles(rows) else Execution()
    model_on = run.model_on(launch, execution, store)
    with held_by_first(lock, launch, store), model_on as (model, _, device):
        sha256 = run.state.weights_sha256, windows.token_file.header.sha256
        dtype = str(next(model.parameters()).dtype)
        task = StreamTask(*sha256, split, windows.length_of(0), dtype, windows.documents)
        file = StateFile(state_path, task, resume)
        return evaluate_stream(model, windows, chunk_length, device, file)


def load_trained(path: Path) -> tuple[LongNet, Tokenizer]:
    """Return a trained model, in evaluation mode on this process's device, and the tokenizer of its text.

    Args:
        path: folder of a run, one of its checkpoints, or an exported model.

    Raises:
        LongNetError: no such run, or an exported encoder.
    """
    if ModelFolder.is_at(path):
        folder = ModelFolder.open(path)
        return folder.load(LaunchEnvironment().device()), folder.tokenizer()
    run = _Run.open(path)
    return run.model(None, LaunchEnvironment().device()), run.folder.tokenizer()


def continue_text(
    path: Path,
    prompt: str | bytes,
    num_tokens: int,
    sampling: Sampling,
    samples: int = 1,
    stop: Sequence[str] = (),
    show: Callable[[str], object] | None = None,
) -> list[str]:
    """Return texts of the prompt and ``num_tokens`` tokens that the model adds to it.

    Args:
        path: folder of a run, or one of its checkpoints.
        prompt: the text to continue, of any length; bytes need not be UTF-8.
        num_tokens: how many tokens to add, at most.
        sampling: how to draw them.
        samples: how many texts, drawn independently.
        stop: texts that end a sample, and are no part of it.
        show: called with every piece of the first sample as soon as it is known; else a progress bar is shown.

    Raises:
        LongNetError: no such run, or one that cannot continue a text.
    """
    model, tokenizer = load_trained(path)
    vocab_size = model.config.vocab_size
    ids = encode_prompt(tokenizer, prompt.encode() if isinstance(prompt, str) else prompt, vocab_size)
    allowed = torch.from_numpy(ids_with_text(tokenizer, vocab_size))
    begin = tokenizer.decode(ids).decode("utf-8", errors="replace")
    streams = [TextStream(tokenizer, ids, stop) for _ in range(samples)]
    pieces = [[begin] for _ in streams]
    steps = generate(model, [ids], num_tokens, sampling, samples=samples, allowed=allowed)
    if show:  # the prompt, once nothing is wrong with the rest
        show(begin)
    for step in tqdm(steps, total=num_tokens, unit="token", disable=True if show else None, leave=False):
        for stream, text, new in zip(streams, pieces, step, strict=True):
            text.append(stream.push(new))
        if show:
            show(pieces[0][-1])
        if all(stream.stopped for stream in streams):
            break
    for stream, text in zip(streams, pieces, strict=True):
        text.append(stream.finish())
    if show:
        show(pieces[0][-1])
    return ["".join(text) for text in pieces]


def export_run(path: Path, output: Path, precision: Precision | None = None, for_transformers: bool = False) -> str:
    """Write the trained model into a folder of its own, for :func:`longnet_dist.model.pretrained.from_pretrained`.

    Args:
        path: folder of a run, or one of its checkpoints.
        output: new, or empty.
        precision: of the weights; None: fp32, or for a model of ``model.path`` the dtype of its config.json.
        for_transformers: whether ``AutoModelForCausalLM`` loads the folder too, after ``import longnet_dist.hf``; a
            model of ``model.path`` has no other export.

    Returns:
        What was done with the tokenizer, in a sentence; empty unless a LongNet is exported for transformers.

    Raises:
        LongNetError: no such run, or the output cannot be written; for transformers, a model that is not causal.
        MissingExtraError: it is for transformers, which is not installed.
    """
    if for_transformers:
        require_extra("hf", "an export for transformers")
    run = _Run.open(path)
    tokenizer = run.tokenizer()
    of_transformers = isinstance(run.config.model, HuggingFaceConfig)
    if of_transformers and run.exported:
        raise ConfigError(f"{path} is a model of transformers, not a run that trained one; use the folder as it is")
    if of_transformers and not for_transformers:
        raise ConfigError(f"{path} trained a model of transformers, which is exported for it alone; use --to hf")
    model = new_model(run.config.model)
    run.load_weights(model)
    dtype = None if precision is None else dtype_of(precision)
    if of_transformers:
        from longnet_dist.hf.decoder.exported import export_decoder

        export_decoder(model, output, tokenizer.to_json(), run.config.data.sequence_length, dtype)
        return ""
    model.to(dtype or torch.float32)
    if not for_transformers:
        save_pretrained(model, output, tokenizer.to_json())
        return ""
    from longnet_dist.hf.causal_lm.export_folder import save_for_transformers

    return save_for_transformers(model, output, tokenizer, run.trained_length)


@contextmanager
def meshed(config: Config, launch: LaunchEnvironment, store: Any = None) -> Iterator[tuple[Mesh, torch.device]]:
    """Let the ranks of a launch share every sequence; every rank must enter the context.

    Args:
        config: of the run, which says how long a collective waits for the other ranks.
        launch: this process.
        store: of the meeting, if the caller has it already.

    Returns:
        the ranks, and the device of this one.

    Raises:
        ConfigError: the ranks do not meet.
    """
    device = launch.device()
    launch.share_cores()
    timeout = timedelta(minutes=config.parallel.timeout_minutes)
    with process_group(launch, device, timeout, store):
        yield Mesh.build(MeshShape(data=1, sequence=launch.world_size), timeout), device


@dataclass(frozen=True)
class _Run:
    """A run's folder, its configuration, and one of its checkpoints; or the folder of a model in their place."""

    folder: RunFolder
    config: Config
    checkpoint: Path
    state: CheckpointState
    exported: ModelFolder | None = None

    @classmethod
    def open(cls, path: Path) -> _Run:
        if ModelFolder.is_at(path):
            return cls._exported(ModelFolder.open(path))
        checkpoint = newest_checkpoint(path)
        folder = RunFolder(checkpoint.parent.parent)
        config = folder.config()
        if config.data.features is not None:
            raise ConfigError(f"{path} is a run on features, which is no language model and has no text")
        return cls(folder, config, checkpoint, read_state(checkpoint, config.model))

    @classmethod
    def _exported(cls, folder: ModelFolder) -> _Run:
        model, path = folder.config.model_dump(mode="json"), folder.path
        config = parse_config({"model": model, "train": {"output_dir": str(path), "steps": 1}})
        state = CheckpointState(step=1, tokens=0, model=model, sha256=folder.sha256, versions={})
        return cls(RunFolder(path), config, path, state, folder)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the run, or of the exported model."""
        return self.exported.tokenizer() if self.exported else self.folder.tokenizer()

    @property
    def trained_length(self) -> int | None:
        """Return the tokens of a sample in training; None if it is not known, as of an exported model."""
        return None if self.exported else self.config.data.sequence_length

    def load_weights(self, model: LongNet) -> None:
        """Put the trained weights into a new model."""
        if self.exported and self.exported.weights:
            self.exported.weights.load(model)
        else:
            load_weights(self.checkpoint, model)

    def with_model(self, changes: Mapping[str, Any]) -> _Run:
        """Return the run with other fields of its model's configuration."""
        if not changes:
            return self
        values = self.config.model_dump()
        values["model"] |= changes
        return replace(self, config=parse_config(values))

    def windows(self, data: Path, split: SplitName, length: int) -> Windows:
        """Return a text of the run's tokenizer, cut into windows."""
        token_file = TokenFile.open(data)
        tokenizer = self.tokenizer()
        if digest_of_tokenizer(token_file.tokenizer.to_json()) != digest_of_tokenizer(tokenizer.to_json()):
            remedy = "the run's"
            if self.exported and self.exported.weights:
                remedy = f"--tokenizer {self.exported.path / TOKENIZER_FILE}"
            raise DataError(
                f"{data} was prepared with another tokenizer ({token_file.tokenizer.name}) than the run's "
                f"({tokenizer.name}); prepare it with {remedy}"
            )
        documents = self.config.data.documents
        return Windows(token_file, split, length, **objective(self.config.model), documents=documents)

    def model(self, group: dist.ProcessGroup | None, device: torch.device, execution: Execution = _PLAIN) -> LongNet:
        """Return the trained model, in evaluation mode and the precision of its training."""
        overlap = self.config.parallel.overlap
        model: LongNet = new_model(self.config.model, group=group, overlap=overlap, execution=execution)
        self.load_weights(model)
        return model.to(device, dtype_of(self.config.precision(device.type))).eval()

    def facts(self, *windows: Windows) -> dict[str, str]:
        """Return what must be equal on all ranks: model, weights, tokens and code."""
        facts = {f"the version of {name}": version for name, version in code_versions().items()}
        facts |= {f"data.path ({number})": part.token_file.header.sha256 for number, part in enumerate(windows)}
        model = json.dumps(self.config.model.model_dump(mode="json"), sort_keys=True)
        return facts | {"the model": model, "the checkpoint": digest_of(self.state.sha256)}

    @contextmanager
    def model_on(
        self, launch: LaunchEnvironment, execution: Execution = _PLAIN, store: Any = None
    ) -> Iterator[tuple[LongNet, Mesh, torch.device]]:
        """Return the model on all ranks of a launch, which share every sequence."""
        with meshed(self.config, launch, store) as (mesh, device):
            yield self.model(mesh.sequence_group, device, execution), mesh, device
