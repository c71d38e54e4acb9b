"""Exporting a run, and that nothing which reads a run unpickles anything."""

import hashlib
import json
import pickle
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from longnet_dist.checkpoint.format import newest_checkpoint
from longnet_dist.checkpoint.identity import digest_of_tokenizer
from longnet_dist.cli import evaluate, export, generate
from longnet_dist.config.loading import load_config
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.tokenizers import load_tokenizer, tokenizer_from_json
from longnet_dist.errors import CheckpointError, LongNetError
from longnet_dist.inference.runs import load_trained
from longnet_dist.model.pretrained import from_pretrained
from longnet_dist.train.setup import RunSetup
from tests.data.tiny_tokenizer import write_tiny_tokenizer
from tests.train.runs import run, tiny_config, write_corpus

TIED, SUBWORDS = "model.tie_embeddings=true", "model.vocab_size=300"
SHORT = ("data.sequence_length=64", "train.steps=1", "train.batch_size=4", "train.validate_every=0")


@pytest.fixture(scope="module")
def subwords(tmp_path_factory):
    """A token file of a tokenizer.json, where ``corpus`` has bytes."""
    folder = tmp_path_factory.mktemp("subwords")
    tokenizer = load_tokenizer(str(write_tiny_tokenizer(folder / "tiny.json")))
    return write_corpus(folder / "source.tokens", tokenizer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, subwords):
    folder = tmp_path_factory.mktemp("trained")
    for name, data, settings in (("run", corpus, ()), ("tied", corpus, (TIED,)), ("subwords", subwords, (SUBWORDS,))):
        run(1, tiny_config(folder / name, data, "train.steps=1", *settings))
    return folder


@pytest.mark.parametrize("name", ["run", "tied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_exported_is_the_model(trained, tmp_path, name, precision):
    export.main([str(trained / name), str(tmp_path / "out"), "--precision", precision])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    model = from_pretrained(tmp_path / "out")
    weights = load_file(newest_checkpoint(trained / name) / "model.safetensors")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert dict(model.named_parameters()).keys() == weights.keys()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[key].to(dtype))
    assert (model.head.weight is model.embedding.weight) == (name == "tied")
    assert not model.training
    assert model(torch.zeros(1, 8, dtype=torch.int64)).logits.shape == (1, 8, 256)
    tokenizer = tokenizer_from_json(json.loads((tmp_path / "out" / "tokenizer.json").read_text()))
    assert tokenizer.encode(b"ab").tolist() == [97, 98]


@pytest.mark.filterwarnings("ignore")  # transformers' and torch's own
@pytest.mark.parametrize("name", ["run", "tied"])
def test_an_export_for_transformers_has_the_logits_of_the_checkpoint(trained, tmp_path, name, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        export.main([str(trained / name), str(tmp_path / "out"), "--to", "hf"])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}\nAutoTokenizer loads the tokenizer bytes\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, _ = load_trained(trained / name)
    ids = torch.randint(0, 256, (2, 50))
    torch.testing.assert_close(theirs(ids).logits, ours.float()(ids).logits, atol=1e-6, rtol=0)
    texts = []
    for folder in (trained / name, tmp_path / "out"):  # in float32 on a CPU, both
        generate.main([str(folder), "--prompt", "ab", "--tokens", "5", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.fixture
def for_transformers(trained, tmp_path, request):
    """A run, its export for transformers, and a token file of its tokenizer."""
    name = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers")
        export.main([str(trained / name), str(tmp_path / "out"), "--to", "hf"])
    return trained / name, tmp_path / "out", request.getfixturevalue("subwords" if name == "subwords" else "corpus")


of_each_run = pytest.mark.parametrize("for_transformers", ["run", "tied", "subwords"], indirect=True)


@of_each_run
def test_an_export_for_transformers_is_evaluated_as_its_run_is(for_transformers, capsys):
    *folders, data = for_transformers
    results = []
    for folder in folders:
        capsys.readouterr()
        evaluate.main([str(folder), "--data", str(data), "--context", "64", "--tokens", "128", "--json"])
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]


@of_each_run
def test_an_export_for_transformers_is_exported_again(for_transformers, tmp_path):
    folder, exported, _ = for_transformers
    for source, place in ((folder, "plain"), (exported, "again")):
        export.main([str(source), str(tmp_path / place)])
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    first, again = (from_pretrained(tmp_path / place) for place in ("plain", "again"))
    ids = torch.randint(0, 256, (2, 50))
    assert torch.equal(again(ids).logits, first(ids).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export.main([str(exported), str(tmp_path / "both"), "--to", "hf"])
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


@of_each_run
def test_a_run_begins_with_an_export_for_transformers(for_transformers, tmp_path):
    """Its sizes are those of the export, and its first loss that of a run that begins with the run itself."""
    folder, exported, data = for_transformers
    losses = []
    for name, source in (("a", folder), ("b", exported)):
        words = f"train.init={source}", f"train.output_dir={tmp_path / name}", f"data.path={data}", *SHORT
        config = load_config(None, words)
        plan = RunSetup.make(config, 1, "cpu")
        assert plan.init.tokenizer == digest_of_tokenizer(TokenFile.open(data).tokenizer.to_json())
        losses.append(run(1, config)[0]["loss"])
    assert losses[0] == losses[1]


def test_a_plain_export_is_continued_too(trained, tmp_path, capsys):
    export.main([str(trained / "run"), str(tmp_path / "out")])
    generate.main([str(tmp_path / "out"), "--prompt", "ab", "--tokens", "5"])
    assert "ab" in capsys.readouterr().out


def test_a_folder_with_something_in_it_is_left_alone(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LongNetError, match="is not empty"):  # before the run is read
        export.main([str(tmp_path / "none"), str(tmp_path)])
    with pytest.raises(LongNetError, match="is not empty"):
        export.main([str(trained / "run"), str(tmp_path)])
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "other model", "no file", "no object"])
def test_a_damaged_export_is_refused(trained, tmp_path, damage):
    folder = tmp_path / "out"
    export.main([str(trained / "run"), str(folder)])
    if damage == "no file":
        (folder / "model.safetensors").unlink()
    elif damage == "no object":
        (folder / "config.json").write_text("[]")
    elif damage == "other model":
        save_file({"embedding.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    else:
        content = (folder / damage).read_bytes()
        (folder / damage).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        from_pretrained(folder)


class Malicious:
    """Its pickle, when read, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


NAMES = (
    "pytorch_model.bin",
    "model.pt",
    "state.pkl",
    "model.safetensors",
    "exp_avg.safetensors",
    "state.json",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "mp_rank_00_model_states.pt",
    "latest",
    "config.yaml",
    "tokenizer.json",
)


@pytest.mark.parametrize(
    ("name", "consistent"),
    [*((name, False) for name in NAMES), ("model.safetensors", True), ("exp_avg.safetensors", True)],
)
def test_a_pickle_in_a_run_is_never_executed(trained, corpus, tmp_path, name, consistent):
    """Beside the files of a run or in their place, with the checksum in state.json made to fit."""
    folder, executed = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(trained / "run", folder)
    checkpoint = newest_checkpoint(folder)
    content = pickle.dumps(Malicious(executed))
    for place in (checkpoint, folder):
        if place == checkpoint or name in ("config.yaml", "tokenizer.json"):
            (place / name).write_bytes(content)
    if consistent:
        state = json.loads((checkpoint / "state.json").read_text())
        state["sha256"][name] = hashlib.sha256(content).hexdigest()
        (checkpoint / "state.json").write_text(json.dumps(state))
    programs = (
        lambda: evaluate.main([str(folder), "--data", str(corpus), "--context", "16", "--tokens", "16"]),
        lambda: generate.main([str(folder), "--prompt", "a", "--tokens", "1"]),
        lambda: export.main([str(folder), str(tmp_path / "out")]),
    )
    for program in programs:
        try:
            program()
        except LongNetError:
            continue
    assert not executed.exists()
    pickle.loads(content).close()
    assert executed.exists(), "the pickle would have made it"
