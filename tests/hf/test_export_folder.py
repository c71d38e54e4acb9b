"""Exported models: transformers computes with them what we do, on the same ids."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    import longnet_dist.hf as hf

from longnet_dist import LongNet, LongNetConfig
from longnet_dist.data.tokenizers import ByteTokenizer, load_tokenizer
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.hf.causal_lm.export_folder import save_for_transformers
from longnet_dist.model.pretrained import from_pretrained, tokenizer_of
from tests.data.tiny_tokenizer import write_tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own

FIELDS = {"dim": 32, "layers": 2, "heads": 4, "segment_lengths": [8, 32], "dilation_rates": [1, 4]}
TEXTS = ["def f(x):\n    return  x\t# ü 漢 Ā \U0001f600\n", " leading", "", "\r\n\x01\x7f"]


class Named:
    """A tokenizer of tiktoken, of which only the name is known."""

    name, document_separator = "tiktoken:gpt2", 50256

    def to_json(self):
        return {"kind": "tiktoken", "encoding": "gpt2"}


def make(**fields):
    torch.manual_seed(0)
    return LongNet(LongNetConfig(**{**FIELDS, **fields})).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_both_ways_give_equal_logits(tied, dtype, tmp_path):
    model = make(tie_embeddings=tied).to(dtype)
    note = save_for_transformers(model, tmp_path / "out", ByteTokenizer(), 4096)
    assert note == "AutoTokenizer loads the tokenizer bytes"
    ids = torch.randint(0, 256, (2, 40))
    expected = model(ids).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.dtype == dtype
    torch.testing.assert_close(theirs(ids).logits, expected)
    assert (theirs.config.max_position_embeddings, theirs.config.eos_token_id) == (4096, 0)
    ours = from_pretrained(tmp_path / "out")
    torch.testing.assert_close(ours(ids).logits, expected)
    assert ours.config == theirs.config.core_config()
    assert tokenizer_of(tmp_path / "out").to_json() == {"kind": "bytes"}
    # What transformers saves is a folder of ours again.
    theirs.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(from_pretrained(tmp_path / "again")(ids).logits, expected)
    with pytest.raises(ConfigError, match="is not empty"):
        save_for_transformers(model, tmp_path / "out", ByteTokenizer(), 4096)


def test_tokenizers_give_the_same_ids(tmp_path):
    tiny = load_tokenizer(str(write_tiny_tokenizer(tmp_path / "tiny.json")))
    for name, tokenizer in (("bytes", ByteTokenizer()), ("tiny", tiny)):
        model = make(vocab_size=tokenizer.vocab_size)
        save_for_transformers(model, tmp_path / name, tokenizer, 512)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in TEXTS:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ids == tokenizer.encode(text.encode()).tolist(), (name, text)
            assert theirs.decode(ids) == tokenizer.decode(ids).decode()
        assert theirs.eos_token_id == tokenizer.document_separator
        assert len(theirs) == tokenizer.vocab_size
        assert tokenizer_of(tmp_path / name).to_json() == tokenizer.to_json()
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")("a\x00b", add_special_tokens=False)[
        "input_ids"
    ]
    assert ids == [97, 0, 98]


def test_a_tokenizer_of_tiktoken_is_named_alone(tmp_path):
    note = save_for_transformers(make(vocab_size=50257), tmp_path / "out", Named(), 512)
    assert note.startswith("AutoTokenizer cannot load tiktoken:gpt2: take the ids from tiktoken itself")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    files = {"config.json", "generation_config.json", "model.safetensors", "longnet_tokenizer.json", "README.md"}
    assert names == files
    assert "tokens = torch.tensor([[1, 2, 3]])" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "longnet_tokenizer.json").read_text()) == Named().to_json()


def test_what_cannot_be_exported_or_read_back(tmp_path):
    with pytest.raises(ConfigError, match="causal=false"):
        save_for_transformers(make(causal=False), tmp_path / "encoder", ByteTokenizer(), 512)
    save_for_transformers(make(), tmp_path / "out", ByteTokenizer(), 512)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights.pop("model.norm.bias")
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="other tensors"):
        from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "longnet_tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="is not the tokenizer"):  # that of transformers is left
        tokenizer_of(tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        tokenizer_of(tmp_path)


def test_a_wrapped_model_is_not_copied():
    model = make()
    wrapped = hf.LongNetForCausalLM.of(model, max_position_embeddings=64)
    assert wrapped.model is model
    assert not any(weight.is_meta for weight in wrapped.parameters())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    torch.testing.assert_close(wrapped(ids).logits, model(ids).logits)
