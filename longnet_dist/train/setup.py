"""All that can be decided, and refused, before the ranks of a run meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longnet_dist.attention.kernels.registry import check_backend
from longnet_dist.checkpoint.format import check_optimizer
from longnet_dist.checkpoint.identity import RunIdentity, code_versions, digest_of_tokenizer, shown_checksum
from longnet_dist.checkpoint.initial_weights import InitialWeights
from longnet_dist.checkpoint.run_folder import ResumePoint, RunFolder, resume_point
from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.config.schema import FEATURE_KEYS, Config, TrainConfig
from longnet_dist.data.batches import Batches, Windows, objective
from longnet_dist.data.features.feature_batches import FeatureBatches
from longnet_dist.data.features.feature_set import FeatureSet, config_of, encoder_of
from longnet_dist.data.prepare import default_token_file
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.tokenizers import ByteTokenizer, encode_prompt
from longnet_dist.engine.recognition import STYLES
from longnet_dist.errors import CheckpointError, ConfigError, LongNetError
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.model.feature_tasks import FEATURE_TASKS
from longnet_dist.model.longnet import positions_of
from longnet_dist.model.pretrained import TOKENIZER_FILE
from longnet_dist.numerics import dtype_of
from longnet_dist.optim.schedules import SCHEDULES, ScheduleStart, start_after
from longnet_dist.telemetry.loggers import usable_loggers


@dataclass(frozen=True)
class RunSetup(RunLayout):
    """Hold a checked configuration and what follows from it, the same on every rank.

    Attributes:
        folder: of the run.
        resume: the checkpoint to go on from, if any.
        init: the weights that a new run begins with, if any.
        source: the weights in the folder ``model.path``, if any.
        token_file: of ``data.path``, opened once, or the features of ``data.features``; None if the default corpus has
            still to be made.
        schedule_start: where the learning-rate schedule starts again, if it does.
    """

    folder: RunFolder
    resume: ResumePoint
    init: InitialWeights | None
    source: InitialWeights | None = None
    token_file: TokenFile | FeatureSet | None = None
    schedule_start: ScheduleStart | None = None

    @classmethod
    def make(cls, config: Config, world_size: int, device_type: str) -> RunSetup:
        """Check everything that does not need the other ranks; nothing is written.

        Args:
            config: the run.
            world_size: number of ranks.
            device_type: ``"cuda"`` or ``"cpu"``.

        Raises:
            ConfigError, ShapeError, DataError, CheckpointError: whatever would make the run fail later.
        """
        features = _features(config)
        config = config if features is None else config_of(config, features)
        layout = RunLayout.of(config, world_size, device_type)
        _check_shortest(features, layout.mesh.sequence)
        dtype = dtype_of(layout.precision)
        _check_positions(config, dtype)
        check_backend(config.train.attention_backend, torch.device(device_type), dtype, config.train.deterministic)
        usable_loggers(config.train.loggers)
        folder = RunFolder(config.train.output_dir)
        folder.check_writable()
        resume = resume_point(folder, config.train.resume, config.model)
        if resume.checkpoint and resume.state:
            check_optimizer(resume.checkpoint, resume.state, config.train.optimizer)
        _check_end(config.train, folder, resume)
        begins = resume.checkpoint is None
        source = InitialWeights.of_model(config.model, begins)
        init = source if begins else None
        if config.train.init and begins:
            init = InitialWeights.find(config.train.init, config.model)
        token_file = features or (None if config.data.path is None else TokenFile.open(config.data.path))
        if init and features is None and not config.train.ignore_tokenizer:
            _check_tokenizer(config, init, token_file)
        plan = cls(
            **vars(layout),
            folder=folder,
            resume=resume,
            init=init,
            source=source,
            token_file=token_file,
            schedule_start=_schedule_start(resume, config.train),
        )
        if token_file is not None:
            plan.training_data(token_file)
            if config.train.validate_every:
                plan.validation_data(token_file)
            plan.changes(token_file)
            if plan.writes_sample and isinstance(token_file, TokenFile):
                encode_prompt(token_file.tokenizer, config.train.sample_prompt.encode(), config.model.vocab_size)
        return plan

    @property
    def writes_sample(self) -> bool:
        """Say whether the trained model writes a sample at the end."""
        train, is_text = self.config.train, self.config.data.features is None
        return bool(is_text and train.sample_tokens and train.checkpoint_every and self.config.model.causal)

    @property
    def is_complete(self) -> bool:
        """Say whether the run has done its last step already."""
        return self.steps_done >= self.config.train.steps or self.ended_early

    @property
    def ended_early(self) -> bool:
        """Say whether the run has ended before its last step, because validation did not improve any more."""
        state, patience = self.resume.state, self.config.train.patience
        return state is not None and 0 < patience <= state.validations_since_best

    @property
    def steps_done(self) -> int:
        """Return the step of the checkpoint to go on from, 0 for a new run."""
        return self.resume.state.step if self.resume.state else 0

    def identity(self, token_file: TokenFile | FeatureSet) -> RunIdentity:
        """Return the identity of the run with its data."""
        return RunIdentity.of(self.resolved(token_file), token_file)

    def changes(self, token_file: TokenFile | FeatureSet) -> list[str]:
        """Return what differs from the run as its checkpoint knows it, and is allowed to, one line each.

        Raises:
            CheckpointError: what must not differ does: model, tokenizer, data, seed or sequence length.
        """
        state, ours = self.resume.state, self.identity(token_file)
        if state is None:
            return self._new_tokenizer(token_file, ours.tokenizer)
        if state.identity is None:
            return [f"{self.resume.checkpoint} does not know its data, tokenizer and seed, so these are not compared"]
        if refused := state.identity.refused(ours):
            raise CheckpointError(
                f"{self.resume.checkpoint} is of a run with {refused}; use the same to go on with that run, or begin a "
                f"new one from its weights: train.init={self.resume.checkpoint} and another train.output_dir"
            )
        code = code_versions()
        old = {name: version for name, version in state.versions.items() if code.get(name, version) != version}
        return state.identity.changes(ours) + [f"{name}: {old[name]} -> {code[name]}" for name in old]

    def _new_tokenizer(self, token_file: TokenFile | FeatureSet, ours: str) -> list[str]:
        """Return a line if a new run begins with weights of another tokenizer, or of one that is not known."""
        if self.init is None or isinstance(token_file, FeatureSet) or self.init.tokenizer == ours:
            return []
        if self.init.tokenizer is not None:
            return [f"another tokenizer than that of {self.init.folder}"]
        return [f"the weights of {self.init.folder}, whose tokenizer is not known and is not compared"]

    @property
    def samples_done(self) -> int:
        """Return the number of samples that the run has seen."""
        state = self.resume.state
        if state is None:
            return 0
        return state.tokens // self.config.data.sequence_length if state.samples is None else state.samples

    def open_token_file(self) -> TokenFile | FeatureSet:
        """Return the data; the token file of the default corpus is made by rank 0 if need be. Every rank must call.

        Raises:
            LongNetError: the default corpus cannot be made; on all ranks.
        """
        if self.token_file is not None:
            return self.token_file
        made: list[Path | LongNetError | None] = [None]
        if dist.get_rank() == 0:
            try:
                made = [default_token_file(self.config.data.cache_dir)]
            except LongNetError as error:
                made = [error]
        dist.broadcast_object_list(made)
        if isinstance(made[0], LongNetError):
            raise made[0]
        assert made[0] is not None
        return TokenFile.open(made[0])

    def training_data(self, token_file: TokenFile | FeatureSet) -> Batches | FeatureBatches:
        """Return the training split in shuffled batches of the whole world."""
        config = self.config
        length, batch_size, seed = config.data.sequence_length, config.train.batch_size, config.train.seed
        if isinstance(token_file, FeatureSet):
            cls_token, names = encoder_of(config).cls_token, token_file.names("train")
            offset = self.samples_done - self.steps_done * batch_size
            return FeatureBatches(token_file, names, batch_size, seed, cls_token, offset)
        options = objective(config.model) | {"documents": config.data.documents, "packing": config.data.packing}
        offset = self.samples_done - self.steps_done * batch_size
        return Batches(token_file, "train", length, batch_size, seed, **options, sample_offset=offset)

    def validation_data(self, token_file: TokenFile | FeatureSet) -> Windows | FeatureBatches:
        """Return the validation split in windows of the training length, or its sequences of features."""
        config = self.config
        if isinstance(token_file, FeatureSet):
            cls_token, names = encoder_of(config).cls_token, token_file.names("validation")
            return FeatureBatches(token_file, names, self.micro_batch_size, config.train.seed, cls_token)
        length, documents = config.data.sequence_length, config.data.documents
        return Windows(token_file, "validation", length, **objective(config.model), documents=documents)

    def resolved(self, token_file: TokenFile | FeatureSet) -> dict[str, Any]:
        """Return the configuration as nested values, with what was ``auto`` or left out filled in."""
        values = self.config.model_dump(mode="json")
        for key in ("features", "labels", "validation_names"):
            if (place := getattr(self.config.data, key)) is not None:
                values["data"][key] = str(place.resolve())
        if isinstance(token_file, TokenFile):
            values["data"]["path"] = str(token_file.path.resolve())
            values["data"] = {key: values["data"][key] for key in values["data"] if key not in FEATURE_KEYS}
        if isinstance(self.config.model, HuggingFaceConfig):
            path = self.config.model.path
            values["model"]["path"] = None if path is None else str(path.expanduser().resolve())
            values["model"]["weights"] = None if self.source is None else self.source.sha256
        values["train"] |= {"precision": self.precision, "micro_batch_size": self.micro_batch_size}
        values["parallel"] |= {"data": self.mesh.data, "sequence": self.mesh.sequence}
        return values


def _features(config: Config) -> FeatureSet | None:
    """Open the features of a run on such, and refuse a model or options that it cannot have."""
    if config.data.features is None:
        return None
    model, train = encoder_of(config), config.train
    FEATURE_TASKS[config.data.feature_task].check(model)
    if not {model.style(0), model.style(model.layers - 1)} <= set(STYLES) or model.phantom_keys:
        asked = {
            "offload_activations": train.offload_activations,
            "cache_qkv": train.cache_qkv,
            "feed_forward_tile": train.feed_forward_tile,
            "compile": train.compile is True,
        }
        for key in (key for key, value in asked.items() if value):
            raise ConfigError(
                f"train.{key}={getattr(train, key)} needs blocks of LongNet's own style, but the model has dropout, "
                f"phantom keys or other norms or activations, so its blocks run as plain modules; leave {key} out "
                "(train.activation_checkpointing works)"
            )
    return FeatureSet.open(config.data, model)


def _check_tokenizer(config: Config, init: InitialWeights, token_file: TokenFile | FeatureSet | None) -> None:
    """Refuse tokens that mean other texts than those that the initial weights were trained with."""
    given = token_file.header.tokenizer if isinstance(token_file, TokenFile) else ByteTokenizer().to_json()
    ours = digest_of_tokenizer(given)
    if init.tokenizer in (None, ours):
        return
    name = token_file.tokenizer.name if isinstance(token_file, TokenFile) else ByteTokenizer.name
    what, file = "the default text", init.folder / TOKENIZER_FILE
    if config.data.path is not None:
        what = f"data.path={config.data.path}"
    command = f"longnet prepare TEXTS --output FILE --tokenizer {file}"
    raise ConfigError(
        f"the tokens must be those of the model whose weights the run begins with, but {what} "
        f"has the tokenizer {name} ({shown_checksum(ours)}) and {init.folder} another one "
        f"({shown_checksum(init.tokenizer)}); prepare the text with that of the model"
        f"{f' ({command})' if isinstance(config.model, HuggingFaceConfig) and file.is_file() else ''}, or set "
        f"train.ignore_tokenizer=true for a new vocabulary"
    )


def _check_shortest(features: FeatureSet | None, ranks: int) -> None:
    """Refuse sequences that cannot be cut into even slices, of which the last rank has a row."""
    shortest = min(features.files.values(), key=lambda file: file.rows) if features else None
    if shortest and shortest.rows < ranks * (ranks - 1):
        raise ConfigError(
            f"a sequence on {ranks} sequence ranks needs at least {ranks * (ranks - 1)} rows, but {shortest.path} has "
            f"{shortest.rows}; use fewer parallel.sequence ranks, or take the file away"
        )


def _check_end(train: TrainConfig, folder: RunFolder, resume: ResumePoint) -> None:
    """Refuse a checkpoint behind the last step, and one of another run at it, since there is no step to take."""
    if resume.checkpoint is None or resume.state is None or resume.state.step < train.steps:
        return
    step = resume.state.step
    if step > train.steps:
        raise ConfigError(
            f"{resume.checkpoint} has step {step}, beyond the last of this run, train.steps={train.steps}; use "
            f"train.steps={step} or more, or another train.output_dir for a new run"
        )
    if resume.checkpoint.resolve().parent.parent != folder.path.resolve():
        raise ConfigError(
            f"{resume.checkpoint} has step {step}, the last of this run, train.steps={train.steps}, so there is no "
            f"step to take; use more train.steps, or train.init={resume.checkpoint} for a new run from its weights"
        )


def _schedule_start(resume: ResumePoint, train: TrainConfig) -> ScheduleStart | None:
    """Return where the schedule starts again, by the settings that the checkpoint stores; without these nowhere."""
    state = resume.state
    if state is None or state.identity is None or state.step >= train.steps:
        return None
    settings, names = state.identity.settings, type(train).model_fields.keys() - {"learning_rate"}
    before = train.model_copy(update={name: settings[f"train.{name}"] for name in names if f"train.{name}" in settings})
    if before.schedule not in SCHEDULES.names():
        raise ConfigError(
            f"{resume.checkpoint} is of a run with train.schedule={before.schedule}, which is not known here, so the "
            f"learning rate of its step is not known; import the file that registers it, or begin a new run from its "
            f"weights: train.init={resume.checkpoint} and another train.output_dir"
        )
    return start_after(state.step, before, train, state.schedule_start)


def _check_positions(config: Config, dtype: torch.dtype) -> None:
    """Refuse positions that cannot span a sequence, which the model would notice in its first forward."""
    if positions := positions_of(config.model):
        for pattern in config.model.pattern_counts:
            positions.check(pattern, config.data.sequence_length, config.model.head_dim, dtype)
