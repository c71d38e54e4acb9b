"""Random bad input to every program: each ends in success or one clear error with exit status 2."""

import hashlib
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longnet_dist.cli import evaluate, export, generate, plan, prepare, train
from longnet_dist.config.loading import known_keys
from longnet_dist.config.schema import Config
from longnet_dist.data.token_file import PREAMBLE, TokenFile
from longnet_dist.train import loop
from tests.fuzz.cases import LENGTHS, PROFILE, VALUES
from tests.fuzz.outcome import check
from tests.train.runs import TINY, import_deepspeed, run, tiny_config, write_corpus

KEYS = sorted(known_keys(Config))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step and its token file."""
    import_deepspeed()
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "source.tokens")
    size = TokenFile.open(corpus).header.max_id + 1
    run(1, tiny_config(folder / "run", corpus, "train.steps=1", f"model.vocab_size={size}"))
    return folder


@pytest.fixture(autouse=True)
def plan_only(monkeypatch):
    """Training ends when it would begin: DeepSpeed can be set up once a process."""

    class Planned:
        def __init__(self, plan, device, waits=None):
            plan.open_token_file()

        def run(self):
            return True

    monkeypatch.setattr(loop, "Trainer", Planned)


@pytest.fixture
def inputs(trained):
    """Makes copies of the run and its token file for a case to spoil."""

    def make():
        folder = Path(tempfile.mkdtemp(dir=trained.parent))
        shutil.copytree(trained / "run", folder / "run")
        shutil.copy(trained / "source.tokens", folder)
        return folder

    return make


def config_text(folder):
    return TINY.replace("RUN", str(folder / "new")).replace("DATA", str(folder / "source.tokens"))


@PROFILE
@given(data=st.data())
def test_configurations_and_overrides(capsys, inputs, outcomes, data):
    folder = inputs()
    values = yaml.safe_load(config_text(folder))
    words = []
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=3, unique=True), "keys"):
        lists = key in ("model.segment_lengths", "model.dilation_rates")
        value = data.draw(st.one_of(LENGTHS if lists else st.integers(1, 70), VALUES), key)
        if data.draw(st.booleans(), "as an override"):
            words.append(f"{key}={json.dumps(value)}")
        else:
            section, _, name = key.partition(".")
            values[section] = {**values.get(section, {}), name: value}
    text = data.draw(
        st.one_of(st.just(yaml.safe_dump(values)), st.just(yaml.safe_dump(values)), st.text(max_size=40)), "file"
    )
    (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    words += data.draw(
        st.lists(st.text(max_size=12).filter(lambda word: not word.startswith("-")), max_size=1), "words"
    )
    outcomes[check(capsys, train, [folder / "config.yaml", *words], folder)] += 1
    device = data.draw(st.sampled_from(["h100", "cpu", "l4", "none"]), "device")
    gpus = data.draw(st.integers(-1, 5000), "gpus")
    outcomes[check(capsys, plan, [folder / "config.yaml", *words, "--gpus", gpus, "--device", device], folder)] += 1


def spoil(data, content):
    """Bytes with some flipped, cut off, added or in place of all."""
    how = data.draw(st.sampled_from(["flip", "flip", "cut", "add", "replace"] if content else ["add"]), "damage")
    if how == "cut":
        return content[: data.draw(st.integers(0, len(content)), "length")]
    if how == "add":
        return content + data.draw(st.binary(min_size=1, max_size=20), "bytes")
    if how == "replace":
        return data.draw(st.binary(max_size=100), "bytes")
    spoiled, rng = bytearray(content), data.draw(st.randoms(use_true_random=False), "places")
    for _ in range(data.draw(st.integers(1, 5), "flips")):
        place = rng.choice([rng.randrange(len(content)), rng.randrange(600) % len(content)])
        spoiled[place] ^= data.draw(st.integers(1, 255), "bits")
    return bytes(spoiled)


def with_other_field(data, fields):
    """A JSON object with one field, at some depth, changed, and the rest as it was."""
    key = data.draw(st.sampled_from(sorted(fields)), "field")
    if isinstance(fields[key], dict) and fields[key] and data.draw(st.booleans(), "deeper"):
        return {**fields, key: with_other_field(data, fields[key])}
    if data.draw(st.booleans(), "without"):
        return {name: value for name, value in fields.items() if name != key}
    return {**fields, key: data.draw(VALUES, "value")}


@PROFILE
@given(data=st.data())
def test_token_files(capsys, inputs, outcomes, data):
    folder = inputs()
    file = folder / "source.tokens"
    content = file.read_bytes()
    if data.draw(st.booleans(), "header"):
        magic, version, size, _ = PREAMBLE.unpack(content[: PREAMBLE.size])
        header = with_other_field(data, json.loads(content[PREAMBLE.size :][:size]))
        text = json.dumps(header).encode().ljust(size)
        start = struct.pack("<8sII32s", magic, version, len(text), hashlib.sha256(text).digest())
        file.write_bytes(start + text + content[PREAMBLE.size + size :])
    else:
        file.write_bytes(spoil(data, content))
    (folder / "config.yaml").write_text(config_text(folder))
    spans = ["--context", data.draw(st.integers(1, 300), "context")]
    spans = data.draw(st.sampled_from([spans, ["--stream", "--chunk", "256"]]), "how")
    state = folder.parent / f"{folder.name}.state"
    arguments = [folder / "run", "--data", file, *spans, "--tokens", "512", "--state", state]
    arguments += ["--split", data.draw(st.sampled_from(["train", "validation", "all"]), "split")]
    outcomes[check(capsys, evaluate, arguments, folder)] += 1
    outcomes[check(capsys, train, [folder / "config.yaml"], folder)] += 1


@PROFILE
@given(data=st.data())
def test_checkpoints_and_run_folders(capsys, inputs, outcomes, data):
    folder = inputs()
    files = sorted(path for path in (folder / "run").rglob("*") if path.is_file() and "tfevents" not in path.name)
    file = data.draw(st.sampled_from(files), "file")
    if file.suffix == ".json" and data.draw(st.booleans(), "field"):
        file.write_text(json.dumps(with_other_field(data, json.loads(file.read_text()))))
    elif data.draw(st.booleans(), "bytes"):
        file.write_bytes(spoil(data, file.read_bytes()))
        if file.suffix == ".safetensors" and data.draw(st.booleans(), "with its checksum"):
            state = json.loads((file.parent / "state.json").read_text())
            state["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            (file.parent / "state.json").write_text(json.dumps(state))
    else:
        file.unlink()
        if data.draw(st.booleans(), "folder"):
            file.mkdir()
    resume = data.draw(st.sampled_from(["auto", "never", folder / "run", file]), "resume")
    config = folder / "config.yaml"
    config.write_text(config_text(folder).replace(str(folder / "new"), str(folder / "run")))
    programs = [
        (evaluate, [folder / "run", "--data", folder / "source.tokens", "--context", "16", "--tokens", "32"]),
        (generate, [folder / "run", "--prompt", "a", "--tokens", "2"]),
        (export, [folder / "run", folder.parent / f"{folder.name}.exported"]),
        (train, [config, f"train.resume={resume}"]),
    ]
    program, arguments = data.draw(st.sampled_from(programs), "program")
    outcomes[check(capsys, program, arguments, folder)] += 1


FLAGS = [
    "--data",
    "--context",
    "--stream",
    "--chunk",
    "--tokens",
    "--split",
    "--json",
    "--resume",
    "--prompt",
    "--state",
]
FLAGS += ["--prompt-file", "--samples", "--temperature", "--top-k", "--seed", "--precision", "--output", "--tokenizer"]
FLAGS += ["--validation", "--overwrite", "-x", "--"]
WORDS = [
    "",
    "run",
    "source.tokens",
    "nowhere",
    "new",
    "0",
    "-1",
    "1",
    "16",
    "1e9",
    "nan",
    "inf",
    "all",
    "train",
    "bf16",
    "a",
]
WORDS += ["/dev/null", "run/checkpoints", "run/config.yaml", "bytes", "tiktoken:none", "train.steps=x", "=", "model=3"]


@PROFILE
@given(data=st.data())
def test_command_lines(capsys, inputs, outcomes, monkeypatch, data):
    folder = inputs()
    monkeypatch.chdir(folder)
    program = data.draw(st.sampled_from([evaluate, generate, export, train, prepare]), "program")
    starts = {
        evaluate: ["run", "--data", "source.tokens", "--tokens", "64"],
        generate: ["run", "--tokens", "2"],
        export: ["run"],
        train: ["run/config.yaml"],
        prepare: ["run/config.yaml"],
    }
    start = data.draw(st.sampled_from([starts[program], []]), "start")
    words = st.lists(st.one_of(st.sampled_from(FLAGS), st.sampled_from(WORDS), st.text(max_size=6)), max_size=5)
    arguments = start + [word.replace("\0", "") for word in data.draw(words, "words")]
    inside = Path(tempfile.mkdtemp(dir=folder.parent))  # what was there must not change; new files may be made
    for name in ("run", "source.tokens"):
        (inside / name).symlink_to(folder / name)
    monkeypatch.chdir(inside)
    outcomes[check(capsys, program, arguments, folder)] += 1


@PROFILE
@given(data=st.data())
def test_texts_to_prepare(capsys, tmp_path_factory, outcomes, data):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "in").mkdir()
    names = st.sampled_from(
        ["a.txt", "b.txt", "c.txt", "b.gz", "c.zip", "d.xz", "e.bz2", "f.tar", "g.tar.gz", "h.tar.xz", "tokenizer.json"]
    )
    for name in data.draw(st.lists(names, min_size=1, max_size=3, unique=True), "names"):
        (folder / "in" / name).write_bytes(
            data.draw(st.one_of(st.text(max_size=50).map(str.encode), st.binary(max_size=200)), name)
        )
    tokenizer = data.draw(
        st.sampled_from(["bytes", "bytes", str(folder / "in" / "tokenizer.json"), "tiktoken:x", ""]), "tokenizer"
    )
    share = data.draw(st.one_of(st.just(0.1), st.sampled_from([0, 0.5, 1]), st.floats()), "share")
    arguments = [folder / "in", "--output", folder / "out.tokens", "--tokenizer", tokenizer, f"--validation={share}"]
    status = check(capsys, prepare, arguments, folder / "in")
    outcomes[status] += 1
    assert (folder / "out.tokens").exists() == (status == 0)
    assert {path.name for path in folder.iterdir()} <= {"in", "out.tokens"}
    if status == 0:
        TokenFile.open(folder / "out.tokens", verify=True)
