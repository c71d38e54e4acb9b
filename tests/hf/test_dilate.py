"""Hugging Face models with dilated attention: dense where the pattern is dense, and what they compute alone."""

import json
from itertools import pairwise

import pytest
import torch

from longnet_dist import DilatedPattern
from longnet_dist.errors import ConfigError, ShapeError
from tests.hf.models import MODELS, SIZES, SPARSE, hf, padded, padding, plain, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


DENSE = DilatedPattern([64], [1])
LONGNET = hf.LongNetConfig(dim=32, layers=1, heads=4, vocab_size=100, segment_lengths=[8], dilation_rates=[1])
BLOOM = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100)
IDS_40 = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_pattern_is_full_attention_and_padding_takes_no_part(name, tmp_path):
    model = plain(name)
    model.set_attn_implementation("eager" if name == "gpt_oss" else "sdpa")
    masks = [None, padding(0, 25), padding(13, 40)]
    expected = [model(IDS_40, attention_mask=mask).logits for mask in masks]
    assert hf.dilate(model, DENSE) is model
    for mask, logits in zip(masks, expected, strict=True):
        kept = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(model(IDS_40, attention_mask=mask).logits[kept], logits[kept], atol=1e-5, rtol=0)
    hf.dilate(model, SPARSE)
    alone = model(IDS_40[1:, :25]).logits
    torch.testing.assert_close(model(IDS_40, attention_mask=masks[1]).logits[1, :25], alone[0], atol=1e-5, rtol=0)
    assert (alone - expected[0][1:, :25]).abs().max() > 1e-3
    # Twice through config.json.
    logits = model(IDS_40).logits
    for folder in ("once", "twice"):
        model.save_pretrained(tmp_path / folder)
        model = type(model).from_pretrained(tmp_path / folder).eval()
        assert hf.pattern_of(model.config) == SPARSE
        assert torch.equal(model(IDS_40).logits, logits)


def test_loading_without_the_package_is_an_error(tmp_path):
    model = hf.dilate(plain("llama"), SPARSE)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["attn_implementation"] == "dilated"
    registered = transformers.AttentionInterface._global_mapping.pop("dilated")
    try:
        with pytest.raises(ValueError, match="dilated"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    finally:
        transformers.AttentionInterface.register("dilated", registered)
    fields.pop("dilated_pattern")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"call longnet_dist.hf.dilate\(model, pattern\)"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)(IDS_40)


def test_a_configuration_is_dilated_too():
    config = hf.dilate(transformers.LlamaConfig(**SIZES), SPARSE)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.manual_seed(0)
    other = hf.dilate(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval(), SPARSE)
    assert torch.equal(model(IDS_40).logits, other(IDS_40).logits)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_documents_are_those_alone_and_train(name):
    model = hf.dilate(plain(name), SPARSE)
    documents = [IDS_40[:1, :17], IDS_40[1:, :40], IDS_40[:1, 20:25]]
    packed, edges = torch.cat(documents, 1), [0, 17, 57, 62]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    cu = torch.tensor(edges, dtype=torch.int32)
    alone = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(model(packed, position_ids=positions).logits, alone, atol=1e-5, rtol=0)
    with_edges = model(packed, position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu).logits
    torch.testing.assert_close(with_edges, alone, atol=1e-5, rtol=0)
    grads = []
    model.gradient_checkpointing_enable()
    for logits in (lambda: model.train()(packed, position_ids=positions).logits, lambda: alone):
        model.zero_grad()
        logits().square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", [SPARSE, DilatedPattern([8, 32], [1, 4], "blocked", shift=[3, 10])])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_generation_with_a_cache_is_that_without(name, pattern):
    model = hf.dilate(plain(name, eos_token_id=None), pattern)
    mask = padding(13, 40)
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        found = []
        for cache in (hf.CompactCache(model.config), transformers.DynamicCache(config=model.config), None):
            torch.manual_seed(5)
            cached = {"use_cache": False} if cache is None else {"cache": cache}
            found.append(
                model.generate(IDS_40, attention_mask=mask, max_new_tokens=24, pad_token_id=0, **cached, **options)
            )
            if isinstance(cache, hf.CompactCache):
                assert {layer.keys.shape[2] for layer in cache.layers} == {8 + 8}
        assert torch.equal(found[0], found[2]), options
        assert torch.equal(found[1], found[2]), options


def test_logits_with_a_compact_cache_are_those_of_the_whole_text():
    model = hf.dilate(plain("llama"), SPARSE)
    mask, cache = padding(13, 40), hf.CompactCache(model.config)
    parts = []
    edges = [0, 20, 21, 22, 29, 40]  # a prompt, tokens, and several at once
    for start, stop in pairwise(edges):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        part = model(IDS_40[:, start:stop], attention_mask=mask[:, :stop], position_ids=places, cache=cache)
        parts.append(part.logits)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(IDS_40, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="cannot take tokens back"):
        cache.crop(-1)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_compiled_model_has_one_graph(name):
    model = hf.dilate(plain(name), SPARSE)
    module = model.model.layers[0].self_attn
    x = torch.randn(2, 40, 32, requires_grad=True)
    places = model.model.rotary_emb(x, torch.arange(40)[None])

    def run(x, mask):
        return module(x, position_embeddings=places, attention_mask=mask)[0]

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        for mask in (None, padding(13, 40).bool()):
            x.grad = None
            module.zero_grad()
            out = function(x, mask)
            out.square().sum().backward()
            found.append((out.detach(), x.grad.clone(), [p.grad.clone() for p in module.parameters()]))
    torch.testing.assert_close(found[:2], found[2:], atol=1e-5, rtol=1e-4)


def test_autocast_and_adapters():
    peft = pytest.importorskip("peft")
    model = hf.dilate(plain("llama"), SPARSE)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(IDS_40).logits
    torch.testing.assert_close(rounded.float(), model(IDS_40).logits, atol=0.05, rtol=0.05)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    tuned(IDS_40, labels=IDS_40).loss.backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plain("mistral", sliding_window=16), "sliding_window=16"),
        (lambda: plain("modernbert", global_attn_every_n_layers=2), "sliding_attention"),
        (lambda: plain("bert", add_cross_attention=True, is_decoder=True), "no cross-attention"),
        (lambda: transformers.Gemma2Config(**SIZES), "soft cap|windows"),
        (lambda: torch.nn.Linear(2, 2), "takes a model or configuration"),
        (lambda: transformers.BloomForCausalLM(BLOOM), "BloomForCausalLM computes its attention by itself; use"),
        (lambda: LONGNET, "has its pattern in its own configuration; set segment_lengths"),
        (lambda: BLOOM, "BloomModel computes its attention by itself"),
    ],
)
def test_models_that_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        hf.dilate(build(), SPARSE)


def test_calls_that_are_refused():
    with pytest.raises(ConfigError, match="must be a DilatedPattern"):
        hf.dilate(plain("llama"), [8])
    model = hf.dilate(plain("llama", attention_dropout=0.1), SPARSE)
    with pytest.raises(ConfigError, match="attention_dropout"):
        model.train()(IDS_40)
    model.eval()
    with pytest.raises(ShapeError, match="not 4 dimensions"):
        model(IDS_40, attention_mask=torch.zeros(2, 1, 40, 40))
    for shape in ((2, 35), (2, 45), (3, 40)):
        with pytest.raises(
            ShapeError, match=r"attention_mask must be .* here \(2, 40\), but is .*; give a mask of all"
        ):
            model(IDS_40, attention_mask=torch.ones(shape, dtype=torch.int64))
    with pytest.raises(ShapeError, match="padding behind a token; use padding_side='left'"):
        model.generate(
            IDS_40, attention_mask=padding(0, 25), cache=hf.CompactCache(model.config), max_new_tokens=2, pad_token_id=0
        )
    gap = torch.ones(2, 40, dtype=torch.int64)
    gap[1, 7] = 0
    with pytest.raises(ShapeError, match="item 1 has 39 tokens between 0 and 39"):
        model(IDS_40, attention_mask=gap)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="use a DynamicCache"):
        model(IDS_40, cache=cache)
    model.config.num_key_value_heads = 4
    with pytest.raises(ConfigError, match="do not split heads over ranks"):
        model(IDS_40)
    for fields, message in (({"segment_lengths": [8]}, "lacks dilation_rates"), ({"w": 8}, "has w too")):
        model.config.num_key_value_heads = 2
        model.config.dilated_pattern = {"segment_lengths": [8], "dilation_rates": [1]} | fields
        if "lacks" in message:
            del model.config.dilated_pattern["dilation_rates"]
        with pytest.raises(ConfigError, match=rf"dilated_pattern of config.json .* {message}; call"):
            model(IDS_40)


def test_the_trainer_takes_packed_and_padded_batches_alike(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = (17, 40, 5, 33, 21, 9, 30, 12)
    texts = [{"input_ids": torch.randint(3, 100, (length,), generator=generator).tolist()} for length in lengths]
    packed = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    losses = []
    for collator in (packed, padded):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
            remove_unused_columns=False,
        )
        model = hf.dilate(plain("llama"), SPARSE)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collator)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
