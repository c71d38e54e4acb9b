"""What a run may change between its starts, and what it may not."""

import json
import math
import shutil

import pytest

from longnet_dist.checkpoint.format import Progress, checkpoint_folder, checkpoints, read_state, tensor_files
from longnet_dist.checkpoint.identity import digest_of
from longnet_dist.checkpoint.writer import write_checkpoint
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.optim.schedules import ScheduleStart
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train.setup import RunSetup
from tests.train.runs import run, tiny_config

TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}}}


def setup(folder, data, *settings):
    return RunSetup.make(tiny_config(folder, data, *settings), 1, "cpu")


def trained(folder, data, *settings, step=2):
    """The checkpoint of a run as far as its state tells, without tensors."""
    plan = setup(folder, data, *settings)
    progress = Progress(step=step, tokens=256 * step, samples=4 * step)
    checkpoint, model = checkpoint_folder(folder, step), plan.config.model
    identity = plan.identity(TokenFile.open(data))
    write_checkpoint(checkpoint, {name: {} for name in tensor_files()}, model, progress, identity)
    return checkpoint


def changes(folder, data, *settings):
    return setup(folder, data, *settings).changes(TokenFile.open(data))


def write_tokens(path, text, tokenizer=None, validation=0.2):
    with TokenFileWriter(path, tokenizer or ByteTokenizer(), validation=validation) as writer:
        writer.add_document([text])
    return path


class Renamed(ByteTokenizer):
    """Bytes, as a token file of another tokenizer of the same size would say."""

    def to_json(self):
        return {"kind": "huggingface", "name": "other", "content": TOKENIZER}


TEXT = b"the same text " * 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("train.seed=1",), r"another train\.seed: 0 there and 1 here"),
        (("data.sequence_length=32",), r"another data\.sequence_length: 64 there and 32 here"),
        (("model.layers=3",), r"another model: model\.layers is 2 there and 3 here"),
    ],
)
def test_what_makes_another_run_is_refused(tmp_path, corpus, settings, message):
    trained(tmp_path / "run", corpus)
    with pytest.raises(CheckpointError, match=message):
        setup(tmp_path / "run", corpus, *settings)


def test_other_data_is_refused(tmp_path):
    data = write_tokens(tmp_path / "a.tokens", TEXT)
    trained(tmp_path / "run", data)
    shutil.copy(data, tmp_path / "copy.tokens")
    assert changes(tmp_path / "run", tmp_path / "copy.tokens") == [f"data.path: {data} -> {tmp_path / 'copy.tokens'}"]
    others = {
        r"data \(tokens\): SHA-256": write_tokens(tmp_path / "b.tokens", TEXT.replace(b"same", b"even")),
        r"data \(train\): tokens \[0, 3\d+\) there": write_tokens(tmp_path / "c.tokens", TEXT, validation=0.3),
        "tokenizer: SHA-256": write_tokens(tmp_path / "d.tokens", TEXT, Renamed()),
    }
    for message, other in others.items():
        with pytest.raises(CheckpointError, match=rf"is of a run with another {message}.*train\.init="):
            setup(tmp_path / "run", other)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("train.steps=9", "train.schedule=cosine"), ["train.steps: 4 -> 9", "train.schedule: polynomial -> cosine"]),
        (("deepspeed.zero_stage=2", "train.precision=bf16"), ["deepspeed.zero_stage: 1 -> 2", "train.precision: fp32"]),
        (("train.checkpoint_every=7",), ["train.checkpoint_every: 100 -> 7"]),
        (("train.batch_size=2",), ["train.batch_size: 4 -> 2"]),
        (("model.loss_chunk=9",), ["model.loss_chunk: "]),
        ((), []),
    ],
)
def test_what_may_change_is_named(tmp_path, corpus, settings, named):
    trained(tmp_path / "run", corpus)
    lines = changes(tmp_path / "run", corpus, *settings)
    assert all(any(line.startswith(name) for line in lines) for name in named), lines
    assert bool(lines) == bool(named)


def test_another_folder_and_another_code_are_named(tmp_path, corpus):
    checkpoint = trained(tmp_path / "run", corpus)
    shutil.copytree(checkpoint, checkpoint_folder(tmp_path / "copy", 2))  # and nothing else of the run
    assert changes(tmp_path / "copy", corpus) == [f"train.output_dir: {tmp_path / 'run'} -> {tmp_path / 'copy'}"]
    state = json.loads((checkpoint / "state.json").read_text())
    state = state | {"versions": state["versions"] | {"torch": "1.0"}, "digest": None}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (line,) = changes(tmp_path / "run", corpus)
    assert line.startswith("torch: 1.0 -> ")


def test_a_checkpoint_without_an_identity_resumes_with_a_line(tmp_path, corpus):
    state_file = trained(tmp_path / "run", corpus) / "state.json"
    state = json.loads(state_file.read_text())
    state_file.write_text(json.dumps({k: v for k, v in state.items() if k not in ("identity", "digest", "samples")}))
    plan = setup(tmp_path / "run", corpus)
    (line,) = plan.changes(TokenFile.open(corpus))
    assert "does not know its data" in line
    assert plan.samples_done == 8


def test_a_state_that_was_edited_is_damaged(tmp_path, corpus):
    state_file = trained(tmp_path / "run", corpus) / "state.json"
    state_file.write_text(state_file.read_text().replace('"tokens": 512', '"tokens": 513'))
    with pytest.raises(CheckpointError, match="its digest is not that of its content"):
        setup(tmp_path / "run", corpus)


def test_a_state_without_the_fields_of_a_later_version_is_intact(tmp_path, corpus):
    state_file = trained(tmp_path / "run", corpus) / "state.json"
    state = json.loads(state_file.read_text())
    older = {key: value for key, value in state.items() if key not in ("spikes", "recent", "digest")}
    state_file.write_text(json.dumps(older | {"digest": digest_of(older)}))
    assert setup(tmp_path / "run", corpus).resume.state.spikes == 0


def test_neither_before_nor_at_the_end(tmp_path, corpus):
    checkpoint = trained(tmp_path / "run", corpus, step=4)
    with pytest.raises(ConfigError, match=r"step 4, beyond the last of this run, train\.steps=3; use train\.steps=4"):
        setup(tmp_path / "run", corpus, "train.steps=3")
    for path in (checkpoint, tmp_path / "run"):
        assert setup(tmp_path / "run", corpus, f"train.resume={path}").is_complete
        with pytest.raises(ConfigError, match=r"so there is no step to take; use more train\.steps, or train\.init="):
            setup(tmp_path / "new", corpus, f"train.resume={path}")
    assert setup(tmp_path / "run", corpus).is_complete
    assert not setup(tmp_path / "run", corpus, "train.steps=5").is_complete


def begun_from(folder, corpus, path):
    """The files of a run that a path began, as after its first step."""
    plan, token_file = setup(folder, corpus, f"train.resume={path}"), TokenFile.open(corpus)
    plan.folder.describe(plan.resolved(token_file), token_file.tokenizer)
    plan.folder.metrics_file.write_text("")
    return plan


@pytest.mark.parametrize("given", ["checkpoint", "run", "relative"])
def test_the_command_that_began_from_a_path_goes_on_after_an_interrupt(tmp_path, corpus, given, monkeypatch):
    checkpoint = trained(tmp_path / "old", corpus)
    monkeypatch.chdir(tmp_path)
    path = {"checkpoint": checkpoint, "run": tmp_path / "old", "relative": "old"}[given]
    begun_from(tmp_path / "new", corpus, path)
    assert setup(tmp_path / "new", corpus, f"train.resume={path}").resume.checkpoint.resolve() == checkpoint
    newer = trained(tmp_path / "new", corpus, f"train.resume={path}", step=3)
    for again in (path, "auto", tmp_path / "old" / "." if given != "checkpoint" else path):
        assert setup(tmp_path / "new", corpus, f"train.resume={again}").resume.checkpoint == newer
    (newer / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="all checkpoints of the run are damaged"):
        setup(tmp_path / "new", corpus, f"train.resume={path}")


@pytest.mark.parametrize("other", ["another path", "never", "no path"])
def test_another_command_does_not_overwrite_a_run(tmp_path, corpus, other):
    path = trained(tmp_path / "old", corpus)
    begun_from(tmp_path / "new", corpus, "auto" if other == "no path" else path)
    trained(tmp_path / "new", corpus, step=3)
    word = {"another path": trained(tmp_path / "third", corpus), "never": "never", "no path": path}[other]
    with pytest.raises(ConfigError, match="already holds a run, which"):
        setup(tmp_path / "new", corpus, f"train.resume={word}")


def test_a_path_and_initial_weights_exclude_each_other(tmp_path, corpus):
    with pytest.raises(ConfigError, match="leave one of them out"):
        tiny_config(tmp_path / "run", corpus, "train.init=a", "train.resume=b")


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (4, 3)])
def test_another_batch_size_goes_on_at_the_samples_seen(tmp_path, corpus, before, after):
    plan = setup(tmp_path / "run", corpus, f"train.batch_size={before}", "train.steps=3")
    token_file = TokenFile.open(corpus)
    batches = plan.training_data(token_file)
    seen = [window for step in range(3) for window in batches.windows_of(batches._samples(step, 0, 1, 0, 1))]
    progress = Progress(step=3, tokens=64 * len(seen), samples=len(seen))
    identity = plan.identity(token_file)
    snapshot = {name: {} for name in tensor_files()}
    write_checkpoint(checkpoint_folder(tmp_path / "run", 3), snapshot, plan.config.model, progress, identity)
    resumed = setup(tmp_path / "run", corpus, f"train.batch_size={after}", "train.steps=99").training_data(token_file)
    step = 3
    while len(seen) < 2 * resumed.num_samples:
        seen += resumed.windows_of(resumed._samples(step, 0, 1, 0, 1))
        step += 1
    epochs = [seen[first : first + resumed.num_samples] for first in (0, resumed.num_samples)]
    assert all(sorted(epoch) == list(range(resumed.num_samples)) for epoch in epochs)


def test_a_new_run_begins_with_weights(tmp_path, corpus, capfd):
    """One step from the weights of another run, on longer sequences; then the same command goes on."""
    run(1, tiny_config(tmp_path / "first", corpus, "train.steps=3", "train.checkpoint_every=1", "train.keep_last=0"))
    first = checkpoints(tmp_path / "first")
    settings = (f"train.init={tmp_path / 'first'}", "data.sequence_length=128", "train.checkpoint_every=1")
    lines = run(1, tiny_config(tmp_path / "tuned", corpus, *settings, "train.steps=1", "train.seed=9"))
    assert [line["step"] for line in lines] == [1]
    untrained = run(1, tiny_config(tmp_path / "anew", corpus, *settings[1:], "train.steps=1", "train.seed=9"))
    assert lines[0]["loss"] < untrained[0]["loss"] - 0.5
    lines = run(1, tiny_config(tmp_path / "tuned", corpus, *settings, "train.steps=2", "train.seed=9"))
    assert [line["step"] for line in lines] == [1, 2]
    assert "train.steps: 1 -> 2" in capfd.readouterr().out
    with pytest.raises(CheckpointError, match=r"train\.init=.* does not fit the model: the shape of blocks\.2"):
        setup(tmp_path / "other", corpus, settings[0], "model.layers=3")
    (first[-1] / "model.safetensors").write_bytes((first[0] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is damaged: its checksum"):
        setup(tmp_path / "other", corpus, settings[0])
    with pytest.raises(CheckpointError, match="neither a checkpoint nor"):
        setup(tmp_path / "other", corpus, "train.init=nowhere")


def test_more_steps_go_on_from_the_learning_rate_of_the_checkpoint(tmp_path, corpus):
    trained(tmp_path / "run", corpus, step=4)
    assert setup(tmp_path / "run", corpus).schedule_start is None
    for settings in (("train.steps=9",), ("train.steps=9", "train.schedule=cosine", "train.learning_rate=0.5")):
        assert setup(tmp_path / "run", corpus, *settings).schedule_start == ScheduleStart(step=4, share=0.5)
    state_file = checkpoint_folder(tmp_path / "run", 4) / "state.json"
    state = json.loads(state_file.read_text()) | {"digest": None}
    state_file.write_text(json.dumps(state | {"identity": None}))
    assert setup(tmp_path / "run", corpus, "train.steps=9").schedule_start is None
    state["identity"]["settings"]["train.schedule"] = "of somebody else"
    state_file.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match=r"train\.schedule=of somebody else, which is not known here.*train\.init="):
        setup(tmp_path / "run", corpus, "train.steps=9")


def test_a_run_that_was_extended_resumes_in_every_bit(tmp_path, corpus, capfd):
    settings = ("train.schedule=cosine", "train.checkpoint_every=2", "train.keep_last=0")
    run(2, tiny_config(tmp_path / "run", corpus, *settings, "train.steps=4"))
    assert "learning rate: " not in capfd.readouterr().out
    lines = run(2, tiny_config(tmp_path / "run", corpus, *settings, "train.steps=8"))
    told = "learning rate: 0.005 after step 4, then by train.schedule=cosine to 0 at step 8 "
    assert told in capfd.readouterr().out
    expected = [0.01, 0.005, *(0.0025 * (1 + math.cos(math.pi * done / 4)) for done in range(4))]
    assert [line["lr"] for line in lines[2:]] == pytest.approx(expected)
    shutil.copytree(checkpoint_folder(tmp_path / "run", 6), checkpoint_folder(tmp_path / "again", 6))
    resumed = run(2, tiny_config(tmp_path / "again", corpus, *settings, "train.steps=8"))
    out = capfd.readouterr().out
    assert "learning rate: " not in out
    assert f"going on from {checkpoint_folder(tmp_path / 'again', 6)} after step 6 of 8 with\n  train.output_dir" in out
    assert [line["lr"] for line in resumed] == [line["lr"] for line in lines[6:]]
    states = [read_state(checkpoint_folder(tmp_path / name, 8)) for name in ("run", "again")]
    assert states[0].schedule_start == states[1].schedule_start == ScheduleStart(step=4, share=0.5)
    assert states[0].sha256 == states[1].sha256


def test_the_configuration_changes_with_the_first_step(tmp_path, corpus):
    run(1, tiny_config(tmp_path / "run", corpus, "train.steps=1"))
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    setup(tmp_path / "run", corpus, "train.learning_rate=0.5")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written
    run(1, tiny_config(tmp_path / "run", corpus, "train.steps=2", "train.learning_rate=0.5"))
    assert b"learning_rate: 0.5" in (tmp_path / "run" / "config.yaml").read_bytes()
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2
