"""A Llama checkpoint is fine-tuned on two ranks as on one, and its output loads."""

import warnings

import pytest
import torch
import torch.distributed as dist
import tqdm
from tokenizers import Tokenizer, models, pre_tokenizers

from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.train.deepspeed_engine import prepare_deepspeed
from tests.distributed import run_distributed
from tests.examples.test_examples import example

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments  # noqa: F401, here, and not in each forked rank

    import longnet_dist.hf as hf

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


@pytest.fixture(autouse=True)
def _no_monitor(monkeypatch):
    """The monitor of progress bars is a thread, which may hold a lock while ranks are forked."""
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny checkpoint, its tokenizer of single characters, and texts."""
    folder = tmp_path_factory.mktemp("llama")
    ids = {character: number for number, character in enumerate(["</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "texts").mkdir()
    (folder / "texts" / "one.txt").write_text("The grid of a branch keeps every fourth token. " * 12, encoding="utf-8")
    (folder / "texts" / "two.txt").write_text("A segment ends, and the next one begins. " * 8, encoding="utf-8")
    return folder


def tune(folder, output, more):
    if dist.is_initialized():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        prepare_deepspeed(LaunchEnvironment(rank, ranks, rank, ranks), torch.device("cpu"))
    words = [str(folder), str(folder / "texts"), "--output", str(output)]
    small = ["--length", "101", "--segment", "16", "--mlp-tile", "20", "--steps", "3", "--lr", "1e-2"]
    return example("finetune_llama").main([*words, *small, "--accumulate", "2", *more])


REFUSED = {
    "--lora 4 --zero 2": "--lora 4 and --zero 2 cannot be combined",
    "--length 16": "--segment 16 is not shorter than --length 16, so the only branch would be full attention; use "
    "--segment 2 or",
    "--ranks 3": "--ranks 3 must divide the 1 processes of the launcher; use a divisor",
    "--lora -1": "argument --lora: must be at least 0, not -1",
    "--steps 0": "argument --steps: must be at least 1, not 0",
    "--length 5000": "fewer than --length 5000; give more text",
}


@pytest.mark.parametrize("more", REFUSED)
def test_mistakes_are_one_message(checkpoint, tmp_path, capsys, more):
    with pytest.raises(SystemExit) as end:
        tune(checkpoint, tmp_path / "never", more.split())
    assert end.value.code == 2
    assert REFUSED[more] in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_nothing_is_overwritten(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("work of a month")
    with pytest.raises(SystemExit) as end:
        tune(checkpoint, tmp_path, [])
    assert end.value.code == 2
    assert f"{tmp_path} is not empty, and nothing in it is overwritten; use another folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_or_text_that_cannot_be_read_is_one_message(checkpoint, tmp_path, capsys):
    words = [str(checkpoint / "texts"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        example("finetune_llama").main([str(tmp_path / "nothing"), *words])
    assert "nothing" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("Ärger".encode("latin-1"))
    with pytest.raises(SystemExit):
        example("finetune_llama").main([str(checkpoint), str(tmp_path), "--output", str(tmp_path / "out")])
    assert "the texts must be UTF-8, but" in capsys.readouterr().err


def test_only_rank_0_tells_a_mistake(checkpoint, tmp_path, capsys, monkeypatch):
    script = example("finetune_llama")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(script, "RANK_0_SECONDS", 0.0)
    with pytest.raises(SystemExit) as end:
        script.main([str(checkpoint), str(tmp_path), "--output", str(tmp_path / "out")])
    assert (end.value.code, capsys.readouterr().err) == (2, "")


def test_help_has_every_default(capsys):
    with pytest.raises(SystemExit):
        example("finetune_llama").main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("262144", "2048", "8192", "100", "2e-05"):
        assert f"(default: {default})" in text


@pytest.mark.parametrize("more", [[], ["--lora", "4"], ["--zero", "2"]], ids=" ".join)
def test_two_ranks_have_the_losses_of_one(checkpoint, tmp_path, more):
    alone = tune(checkpoint, tmp_path / "alone", more[:2] if "--lora" in more else [])
    assert alone[-1] < alone[0]
    for losses in run_distributed(tune, 2, checkpoint, tmp_path / "two", more):
        assert losses == pytest.approx(alone, abs=1e-5)
    tuned = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("alone", "two")]
    assert hf.pattern_of(tuned[0].config).segment_lengths == (16, 32, 64, 128)
    assert [model.config.use_cache for model in tuned] == [True, True]
    card = (tmp_path / "two" / "README.md").read_text(encoding="utf-8")
    assert "sequences of 101 tokens" in card
    assert "| 64 | 4 |" in card
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    tokens = tokenizer("The grid of a branch", return_tensors="pt").input_ids
    torch.testing.assert_close(tuned[0](tokens).logits, tuned[1](tokens).logits, atol=1e-3, rtol=1e-3)


def test_groups_of_ranks_have_samples_of_their_own(checkpoint, tmp_path):
    losses = run_distributed(tune, 2, checkpoint, tmp_path / "two", ["--ranks", "1"])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
