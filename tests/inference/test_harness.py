"""The plug-in for lm-evaluation-harness: exact log-likelihoods of any length, and the scores of its own ``hf``."""

import json
import sys
import warnings
from importlib.metadata import EntryPoint

import pytest
import torch

from longnet_dist import LongNet, LongNetConfig
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import ConfigError, MissingExtraError
from longnet_dist.inference.harness.scoring import Continuation, score
from longnet_dist.model.pretrained import save_pretrained

FIELDS = {"dim": 32, "layers": 2, "heads": 4, "segment_lengths": [8, 32, 128], "dilation_rates": [1, 4, 8]}
LENGTHS = ((1, 3), (5, 1), (40, 7), (150, 20), (2, 90), (9, 0), (33, 33))


def make(**fields):
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(**{**FIELDS, **fields})).eval()
    model.head.weight.data *= 3  # so that scores differ by more than rounding
    return model


def draw():
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randint(0, 256, (c + n,), generator=generator).tolist() for c, n in LENGTHS]
    return [Continuation(part[:c], part[c:]) for part, (c, _) in zip(parts, LENGTHS, strict=True)]


@pytest.mark.parametrize("chunk_length", [7, 50, 4096])
def test_packed_and_streamed_scores_are_those_of_each_text_alone(chunk_length):
    model = make()
    continuations = draw()
    # One of them is what the model itself would say.
    ids = continuations[2].context[:]
    for _ in range(7):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    continuations[2] = Continuation(ids[:40], ids[40:])
    found = list(score(model, continuations, chunk_length))
    for (context, ids), one in zip(continuations, found, strict=True):
        logits = model(torch.tensor([context + ids])).logits[0].double()
        rows = logits[len(context) - 1 : len(context) - 1 + len(ids)]
        chances = rows.log_softmax(-1).gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])
        assert one.log_likelihood == pytest.approx(chances.sum().item(), abs=1e-3, rel=1e-6)
        assert one.greedy == (rows.argmax(-1).tolist() == ids)
    assert [one.greedy for one in found] == [not ids or number == 2 for number, (_, ids) in enumerate(continuations)]


def test_logits_exist_in_parts_and_other_attention_is_scored_whole(monkeypatch):
    whole = list(score(make(), draw()))
    monkeypatch.setattr("longnet_dist.inference.harness.scoring._LOGITS", 5 * 256)
    for one, other in zip(whole, score(make(), draw()), strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
    model = make(attention="window", window=16)
    for (context, ids), one in zip(draw(), score(model, draw(), chunk_length=50), strict=True):
        logits = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
        rows = logits[len(context) - 1 : len(context) - 1 + len(ids)]
        chances = rows.gather(1, torch.tensor(ids, dtype=torch.int64)[:, None])
        assert one.log_likelihood == pytest.approx(chances.sum().item(), abs=1e-3)


@pytest.mark.parametrize("wrong", [Continuation([], [1]), Continuation([1], [256]), Continuation([-1], [1])])
def test_continuations_that_cannot_be_scored(wrong):
    with pytest.raises(ConfigError, match="ids 0 to 255"):
        list(score(make(), [wrong]))


@pytest.mark.parametrize("chunk_length", [16, 4096])
def test_bidirectional_models_are_refused(chunk_length):
    with pytest.raises(ConfigError, match=r"model\.causal=false; score a causal model"):
        list(score(make(causal=False), draw(), chunk_length))


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "longnet_dist.inference.harness.language_model", raising=False)
    with pytest.raises(MissingExtraError, match=r"longnet-dist\[eval\]"):
        import longnet_dist.inference.harness.language_model  # noqa: F401


TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder):
    """Local tasks: rows of JSON and a YAML file each; nothing is downloaded."""
    words = ["long", "net", "segment", "dilated", "Ärger", "漢字", "attention", "of", "tokens", "rate"]
    generator = torch.Generator().manual_seed(2)

    def text(length):
        return " ".join(words[number] for number in torch.randint(0, len(words), (length,), generator=generator))

    rows = [
        {
            "question": text(3 + 6 * number),
            "choices": [f" {text(1 + other)}" for other in range(3)],
            "answer": number % 3,
        }
        for number in range(6)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    for name, fields in TASKS.items():
        source = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(source)}\n{fields}"
        )


@pytest.fixture(scope="module")
def harness():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval")
        pytest.importorskip("transformers")
        import lm_eval.api.registry
        import lm_eval.models.huggingface
        import lm_eval.tasks

        import longnet_dist.hf
        import longnet_dist.inference.harness.language_model  # noqa: F401
        from longnet_dist.hf.causal_lm import export_folder  # noqa: F401
    return lm_eval


@pytest.mark.filterwarnings("ignore")  # the harness' own, and those of its packages
def test_the_harness_finds_the_scores_of_hf(harness, tmp_path, monkeypatch):
    from longnet_dist.hf.causal_lm.export_folder import save_for_transformers
    from longnet_dist.inference.harness.language_model import LongNetLM

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks the machine for its hardware
    save_for_transformers(make(), tmp_path / "exported", ByteTokenizer(), 512)
    write_tasks(tmp_path)
    manager = harness.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = []
    for model in (
        harness.models.huggingface.HFLM(str(tmp_path / "exported"), max_length=4096, batch_size=2, device="cpu"),
        LongNetLM(str(tmp_path / "exported"), batch_size=4, device="cpu"),
        LongNetLM(str(tmp_path / "exported"), batch_size=3, chunk_length=100, device="cpu"),
    ):
        options = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0}
        found.append(harness.simple_evaluate(model=model, log_samples=True, **options))
    for other in found[1:]:
        for task in TASKS:
            for name, value in found[0]["results"][task].items():
                if isinstance(value, float):
                    assert other["results"][task][name] == pytest.approx(value, rel=1e-5), name
            for mine, theirs in zip(other["samples"][task], found[0]["samples"][task], strict=True):
                numbers, texts = flat(theirs["resps"])
                assert flat(mine["resps"]) == (pytest.approx(numbers, abs=1e-4, rel=1e-6), texts)


def flat(responses):
    """Numbers and texts in nested lists."""
    numbers, texts = [], []
    for response in responses if isinstance(responses, list | tuple) else [responses]:
        if isinstance(response, list | tuple):
            more_numbers, more_texts = flat(response)
            numbers, texts = numbers + more_numbers, texts + more_texts
        else:
            (texts if isinstance(response, str) else numbers).append(response)
    return numbers, texts


@pytest.mark.filterwarnings("ignore")
def test_the_entry_point_is_the_model(harness):
    from longnet_dist.inference.harness.language_model import NAME, LongNetLM

    value = "longnet_dist.inference.harness.language_model:LongNetLM"
    registry = harness.api.registry.Registry("model", base_cls=harness.api.model.LM)
    registry.register(NAME, target=EntryPoint(NAME, value, "lm_eval.models"))
    assert registry.get(NAME) is LongNetLM


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float8"}, "dtype must be one of auto"),
        ({"batch_size": "auto"}, "must be at least 1"),
        ({"chunk_length": 0}, "must be at least 1"),
    ],
)
def test_impossible_arguments(harness, given, message, tmp_path):
    from longnet_dist.inference.harness.language_model import LongNetLM

    save_pretrained(make(), tmp_path / "plain", ByteTokenizer().to_json())
    with pytest.raises(ConfigError, match=message):
        LongNetLM(str(tmp_path / "plain"), **given)
    model = LongNetLM(str(tmp_path / "plain"), dtype="bfloat16", device="cpu", prefix_token_id=7)
    assert (model.model.embedding.weight.dtype, model.prefix_token_id) == (torch.bfloat16, 7)
    request = harness.api.instance.Instance("generate_until", {}, ("ab", {"num_beams": 3}), 0)
    with pytest.raises(ConfigError, match="not num_beams"):
        model.generate_until([request])


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_is_left_to_hf(harness, monkeypatch):
    from longnet_dist.inference.harness.language_model import LongNetLM

    loaded = torch.nn.Linear(2, 2), ByteTokenizer()
    monkeypatch.setattr("longnet_dist.inference.harness.language_model.load_trained", lambda path: loaded)
    with pytest.raises(ConfigError, match="--model hf"):
        LongNetLM("llama")


@pytest.mark.filterwarnings("ignore")
def test_a_mistake_is_one_message(harness, tmp_path, monkeypatch, capsys):
    from longnet_dist.inference.harness import command

    write_tasks(tmp_path)
    words = ["run", "--model", "longnet", "--model_args", f"pretrained={tmp_path}/none", "--tasks", "choices"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words, "--include_path", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: there is no {tmp_path}/none; give the folder")
