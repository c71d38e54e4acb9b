"""LongNet as a model of transformers: equal to the wrapped model, saved and loaded, continued, tuned."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import longnet_dist
from longnet_dist.errors import CheckpointError, ConfigError, ShapeError
from tests.hf.models import hf, padded, padding, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


FIELDS = {
    "vocab_size": 100, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "segment_lengths": [8, 32],
    "dilation_rates": [1, 4],
}  # fmt: skip
VARIANTS = {
    "xpos": {},
    "rope, tied": {"positions": "rope", "tie_embeddings": True, "qk_norm": True},
    "blocked, shifted": {"head_offsets": "blocked", "layer_shift": True, "layer_offsets": True, "kv_heads": None},
    "none, one full layer": {"positions": "none", "full_layers": [1]},
}
IDS = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))


def make(**fields):
    torch.manual_seed(0)
    return hf.LongNetForCausalLM(hf.LongNetConfig(**{**FIELDS, **fields})).eval()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_it_computes_what_the_wrapped_model_does(fields):
    model = make(**fields)
    torch.manual_seed(0)
    ours = longnet_dist.LongNet(longnet_dist.LongNetConfig(**{**FIELDS, **fields})).eval()
    assert {f"model.{name}" for name in ours.state_dict()} == set(model.state_dict())
    expected = ours(IDS, hidden_states=True)
    out = model(IDS, output_hidden_states=True)
    assert isinstance(out, transformers.modeling_outputs.CausalLMOutputWithPast)
    torch.testing.assert_close(out.logits, expected.logits)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(out.hidden_states[:2], expected.hidden_states[:2], rtol=0, atol=0)
    torch.testing.assert_close(out.hidden_states[2], expected.last_hidden_state)
    embedded = model(inputs_embeds=model.get_input_embeddings()(IDS), return_dict=False)
    torch.testing.assert_close(embedded[0], expected.logits)
    torch.testing.assert_close(model(IDS, logits_to_keep=3).logits, model(IDS).logits[:, -3:])
    places = torch.tensor([5, 7])
    torch.testing.assert_close(model(IDS, logits_to_keep=places).logits, model(IDS).logits[:, places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_saving_and_loading_keeps_every_bit(fields, dtype, tmp_path):
    model = make(**fields).to(dtype)
    for folder in ("once", "twice"):
        model.save_pretrained(tmp_path / folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert type(again) is hf.LongNetForCausalLM
        assert again.dtype == dtype
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
        assert again.config.core_config() == model.config.core_config()
        assert (again.model.head.weight is again.model.embedding.weight) == model.config.tie_word_embeddings
        model = again
    stored = load_file(tmp_path / "once" / "model.safetensors")
    assert ("model.head.weight" in stored) != model.config.tie_word_embeddings
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "once")) is hf.LongNetConfig
    torch.manual_seed(0)
    new = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    assert torch.equal(new.model.embedding.weight, make(**fields).model.embedding.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("model.norm.bias"), "missing: model.norm.bias"),
        (lambda stored: stored.update(extra=torch.ones(1)), "unknown: extra"),
        (lambda stored: stored.update({"model.norm.bias": torch.ones(3)}), "misshapen: .*model.norm.bias"),
    ],
)
def test_a_file_that_does_not_match_is_refused(change, message, tmp_path):
    make().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_configuration_reads_both_names_and_refuses_what_cannot_work(tmp_path):
    config = hf.LongNetConfig(**FIELDS)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 2, 128)
    names = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = hf.LongNetConfig(**names, num_key_value_heads=2, segment_lengths=[8, 32], dilation_rates=[1, 4])
    assert other.core_config() == config.core_config()
    assert hf.LongNetConfig(name="tiny").core_config().dim == longnet_dist.LongNetConfig(name="tiny").dim
    with pytest.raises(ConfigError, match="a model needs 'segment_lengths'"):
        hf.LongNetConfig(**names)
    with pytest.raises(ConfigError, match="one field"):
        hf.LongNetConfig(**FIELDS, hidden_size=64)
    with pytest.raises(ConfigError, match=r"use longnet_dist\.LongNet"):
        hf.LongNetConfig(**FIELDS, causal=False)
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"heads": 5}))
    with pytest.raises(ConfigError, match="heads"):
        transformers.AutoConfig.from_pretrained(tmp_path)


def test_padding_and_packed_documents_compute_what_they_compute_alone():
    model = make()
    for start, stop in ((0, 25), (13, 40)):
        alone = model(IDS[1:, start:stop]).logits
        padded = model(IDS, attention_mask=padding(start, stop)).logits
        torch.testing.assert_close(padded[1, start:stop], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(padded[0], model(IDS).logits[0], atol=1e-5, rtol=0)
    lengths = (17, 20, 3)
    documents = torch.split(IDS[:1], lengths, dim=1)
    alone = torch.cat([model(document).logits for document in documents], 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    edges = torch.tensor([0, 17, 37, 40], dtype=torch.int32)
    for given in (
        {"position_ids": positions},
        {"position_ids": positions, "attention_mask": torch.ones(1, 40)},
        {"cu_seq_lens_k": edges, "cu_seq_lens_q": edges, "max_length_q": 20, "max_length_k": 20},
    ):
        torch.testing.assert_close(model(IDS[:1], **given).logits, alone, atol=1e-5, rtol=0)
    # Packed, and padded too.
    mask = torch.ones(1, 40)
    mask[:, 38:] = 0
    both = model(IDS[:1], position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(both[:, :38], alone[:, :38], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [None, (0, 25)])
def test_the_loss_is_that_of_shifted_labels(pad):
    model = make()
    mask = None if pad is None else padding(*pad)
    labels = IDS.clone() if mask is None else IDS.masked_fill(mask == 0, -100)
    out = model(IDS, attention_mask=mask, labels=labels)
    kept = labels[:, 1:] != -100
    expected = F.cross_entropy(out.logits[:, :-1][kept], labels[:, 1:][kept])
    torch.testing.assert_close(out.loss, expected)
    by_items = model(IDS, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(by_items, expected * kept.sum() / 7)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(IDS, attention_mask=mask, shift_labels=shifted).loss, out.loss)
    assert model.train()(IDS, attention_mask=mask, labels=labels).logits is None
    assert model(IDS, labels=labels, skip_logits=False).logits is not None


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        *((fields, {}) for fields in VARIANTS.values()),
        ({}, {"num_beams": 3}),
        (VARIANTS["blocked, shifted"], {"num_beams": 2, "num_return_sequences": 2}),
        ({}, {"do_sample": True}),
        ({}, {"num_return_sequences": 2, "do_sample": True}),
    ],
)
def test_generation_with_the_cache_is_that_without(fields, options):
    model = make(**fields)
    found = []
    for cached in ({"use_cache": False}, {}, {"cache": hf.LongNetCache(4096)}):
        torch.manual_seed(5)
        given = {"attention_mask": padding(13, 40), "max_new_tokens": 16, "pad_token_id": 0}
        found.append(model.generate(IDS, **given, **cached, **options))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_the_cache_has_constant_size():
    model, sizes = make(full_layers=[]), []
    for length in (64, 256):
        cache = hf.LongNetCache(4096)
        model.generate(IDS, max_new_tokens=length - 40, min_new_tokens=length - 40, pad_token_id=0, cache=cache)
        assert cache.get_seq_length() == length - 1
        sizes.append([layer.records.numel() for layer in cache.decoding.layers])
    slots = 8 + 8 + 1  # of both branches, and one for what no branch keeps
    assert sizes == [[2 * 2 * 2 * slots * 8] * 2] * 2


def test_logits_with_the_cache_are_those_of_the_whole_text():
    model = make()
    mask = padding(13, 40)
    whole = model(IDS, attention_mask=mask, output_hidden_states=True)
    cache, parts, states = hf.LongNetCache(40), [], []
    for start, stop in pairwise([0, 20, 21, 22, 29, 40]):  # a prompt, tokens, and several at once
        part = model(IDS[:, start:stop], attention_mask=mask[:, :stop], cache=cache, output_hidden_states=True)
        assert part.cache is cache
        parts.append(part.logits)
        states.append(torch.stack(part.hidden_states))
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[kept], whole.logits[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.cat(states, 2)[:, kept], torch.stack(whole.hidden_states)[:, kept], atol=1e-5, rtol=0
    )
    with pytest.raises(ConfigError, match="use LongNetCache"):
        model(IDS[:, :1], cache=cache)
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        cache.crop(-1)
    cache.reset()
    again = model(IDS[:1, :20], cache=cache)
    torch.testing.assert_close(again.logits, model(IDS[:1, :20]).logits, atol=1e-5, rtol=0)
    with pytest.raises(ShapeError, match="the cache has 1 texts"):
        model(IDS[:, :1], cache=cache)
    made = model(IDS[:, :20], use_cache=True).cache
    assert made.get_max_length() == model.config.max_position_embeddings


def test_embeddings_are_generated_from():
    model = make()
    embedded = model.get_input_embeddings()(IDS)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=5, pad_token_id=0, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=5, pad_token_id=0, do_sample=False)[:, 40:])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 40, 40)}, ShapeError, "a mask of padding is"),
        (
            {"attention_mask": torch.ones(2, 35)},
            ShapeError,
            r"here \(2, 40\), not \(2, 35\); give a mask of all tokens",
        ),
        ({"attention_mask": torch.ones(3, 40)}, ShapeError, r"not \(3, 40\)"),
        ({"position_ids": torch.arange(10)[None]}, ShapeError, r"those of the 40 tokens, .* but are \(1, 10\)"),
        ({"input_ids": IDS[0]}, ShapeError, r"input_ids must be \(batch, tokens\), but are \(40,\)"),
        ({"input_ids": IDS.float()}, ShapeError, "convert them with input_ids.long"),
        ({"attention_mask": padding(0, 25), "use_cache": True}, ShapeError, "padding_side='left'"),
        ({"output_attentions": True}, ConfigError, "attention_weights"),
        ({"token_type_ids": IDS}, ConfigError, "no use for token_type_ids"),
        ({"cache": transformers.DynamicCache()}, ConfigError, "not a DynamicCache"),
        ({"labels": IDS, "cache": hf.LongNetCache(64)}, ConfigError, "leave cache or labels out"),
        ({"labels": IDS[:, :5]}, ShapeError, "labels must be"),
        ({"inputs_embeds": torch.ones(2, 40, 32)}, ShapeError, "give one of them"),
        ({"input_ids": None}, ShapeError, "give one of them"),
    ],
)
def test_calls_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        make(max_position_embeddings=64)(**{"input_ids": IDS, **given})


def test_generation_refuses_other_caches():
    with pytest.raises(ConfigError, match="a cache of its own"):
        make().generate(IDS, cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_the_vocabulary_grows_and_shrinks(tied, mean, tmp_path):
    model = make(tie_embeddings=tied)
    before = model(IDS).logits
    assert model.resize_token_embeddings(110, pad_to_multiple_of=16, mean_resizing=mean) is model.get_input_embeddings()
    assert model.config.vocab_size == model.model.config.vocab_size == 112
    logits = model(IDS).logits
    assert logits.shape == (2, 40, 112)
    torch.testing.assert_close(logits[..., :100], before)
    model(torch.full((1, 4), 111), labels=torch.full((1, 4), 111)).loss.backward()
    assert model.generate(IDS, max_new_tokens=3, pad_token_id=0).shape == (2, 43)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, logits)
    assert (again.model.head.weight is again.model.embedding.weight) == tied
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(100)
    torch.testing.assert_close(model(IDS).logits, before)
    with pytest.raises(ConfigError, match="cannot have 0"):
        model.resize_token_embeddings(0)


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tied):
    model = make(tie_embeddings=tied).train()
    grads, calls = [], []
    handle = model.model.blocks[0].ffn.register_forward_pre_hook(lambda *_: calls.append(0))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        calls.clear()
        model(IDS, attention_mask=padding(0, 25), labels=IDS).loss.backward()
        assert len(calls) == 1 + enabled
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
    handle.remove()
    model.gradient_checkpointing_disable()
    calls.clear()
    assert not model.model.blocks[0].gradient_checkpointing


def test_adapters_train_and_merge(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM"))
    adapted = [name for name, weight in tuned.named_parameters() if weight.requires_grad]
    assert len(adapted) == 2 * 2 * len(targets)
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = tuned.train()(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    tuned.eval().save_pretrained(tmp_path / "adapter")
    logits = tuned(input_ids=IDS).logits
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, logits)
    assert torch.equal(again.generate(input_ids=IDS, max_new_tokens=4, pad_token_id=0, do_sample=False)[:, :40], IDS)
    base = {
        name.replace("base_layer.", "").removeprefix("base_model.model."): x for name, x in tuned.state_dict().items()
    }
    assert all(torch.equal(base[name], weight) for name, weight in before.items())
    merged = again.merge_and_unload()
    assert type(merged) is hf.LongNetForCausalLM
    torch.testing.assert_close(merged(IDS).logits, logits, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits)


def trainer(folder, steps, **fields):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 20, (length,), generator=generator) for length in (17, 40, 5, 33, 21, 9, 30, 12)]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, logging_steps=1,
        learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], save_steps=4, use_cpu=True, disable_tqdm=True,
        **fields,
    )  # fmt: skip
    dataset = [{"input_ids": text} for text in texts]
    return transformers.Trainer(
        model=make(), args=arguments, train_dataset=dataset, eval_dataset=dataset[:2], data_collator=padded
    )


def losses_of(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_the_trainer_trains_and_resumes(tmp_path):
    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    losses = losses_of(whole)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
    assert whole.evaluate()["eval_loss"] < losses[0]
    first = trainer(tmp_path / "parts", 4)
    first.train()
    second = trainer(tmp_path / "parts", 8, gradient_checkpointing=True)
    second.train(resume_from_checkpoint=True)
    assert losses_of(second) == pytest.approx(losses, abs=1e-5)
    for name, weight in second.model.state_dict().items():
        torch.testing.assert_close(weight, whole.model.state_dict()[name], atol=1e-5, rtol=1e-4)
