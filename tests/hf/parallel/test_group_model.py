"""A model over ranks has the loss and the gradients of one process, in every way that a batch can be given."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from longnet_dist.errors import ConfigError, ShapeError
from tests.distributed import run_distributed
from tests.hf.models import SPARSE, hf, make, padding, tokens, transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and torch's own


def positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def batch(kind, rows):
    """Arguments of a call, whole."""
    ids = tokens(rows)
    labels = ids.clone()
    labels[:, : rows // 3] = -100
    if kind == "documents":
        places = positions(rows // 3, rows - rows // 3)
        return {"input_ids": ids[:1], "labels": labels[:1], "position_ids": places}
    if kind == "edges":
        cu = torch.tensor([0, rows // 3, rows], dtype=torch.int32)
        places = positions(rows // 3, rows - rows // 3)
        more = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": rows, "max_length_k": rows}
        return {"input_ids": ids[:1], "labels": labels[:1], "position_ids": places, **more}
    given = {"input_ids": ids, "labels": labels}
    if kind == "shifted":
        given["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=-100)
    if kind in ("right", "left"):
        given["attention_mask"] = padding(*((0, rows - 6) if kind == "right" else (6, rows)), rows)
        given["labels"] = labels.masked_fill(given["attention_mask"] == 0, -100)
    if kind == "counted":
        given["num_items_in_batch"] = torch.tensor(50)
    return given


def step(model, given):
    out = model(**given)
    assert out.logits is None or not hasattr(model, "_longnet_dist_parallel")
    out.loss.backward()
    return out.loss.item(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def over_ranks(name, kind, rows, options):
    model = hf.sequence_parallel(make(name), dist.group.WORLD, loss_chunk=5)
    if options.get("checkpointing"):
        model.train().gradient_checkpointing_enable(options["checkpointing"])
    if "tile" in options:
        hf.sequence_parallel(model, dist.group.WORLD, loss_chunk=3, mlp_tile=options["tile"])
    return step(model, batch(kind, rows))


def compare(name, kind, rows, ranks, **options):
    rounding = {"atol": 1e-6, "rtol": 1e-5} if name != "gpt_oss" else {"atol": 2e-5, "rtol": 1e-3}
    loss, gradients = step(make(name), batch(kind, rows))
    found = run_distributed(over_ranks, ranks, name, kind, rows, options)
    for other, theirs in found:
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(theirs, gradients, **rounding)
        assert other == found[0][0]


@pytest.mark.parametrize("kind", ["plain", "shifted", "right", "left", "documents", "edges", "counted"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_loss_and_gradients_are_those_of_one_process(name, kind):
    compare(name, kind, 40, 2)


@pytest.mark.parametrize(("rows", "ranks"), [(41, 2), (40, 3), (37, 4), (5, 4), (3, 4), (40, 1)])
def test_any_length_over_any_number_of_ranks(rows, ranks):
    compare("llama", "plain", rows, ranks)


def test_ragged_and_padded_over_three_ranks():
    compare("qwen3", "left", 41, 3)
    compare("qwen3", "documents", 41, 3)


@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt_oss"])
def test_encoders_and_sinks(name):
    compare(name, "right", 40, 2)
    compare(name, "plain", 41, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_tiles(reentrant):
    checkpointing = {"use_reentrant": reentrant}
    compare("llama", "left", 40, 2, checkpointing=checkpointing)
    compare("llama", "plain", 41, 2, checkpointing=checkpointing, tile=6)


def accumulated(average):
    model = make("llama")
    model = hf.sequence_parallel(model, dist.group.WORLD, average_gradients=average)
    for rows in (40, 33):
        model(**batch("plain", rows)).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    if not average:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return gradients


@pytest.mark.parametrize("average", [True, False])
def test_gradients_accumulate(average):
    model = make("llama")
    for rows in (40, 33):
        model(**batch("plain", rows)).loss.backward()
    for gradients in run_distributed(accumulated, 2, average):
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], atol=1e-6, rtol=1e-5)


def outputs_of_slices():
    model = hf.sequence_parallel(make("llama"), dist.group.WORLD).eval()
    embeds = model.get_input_embeddings()(tokens(21)).detach().requires_grad_()
    out = model(inputs_embeds=embeds, output_hidden_states=True)
    model(inputs_embeds=embeds, labels=tokens(21)).loss.backward()
    as_tuple = model(tokens(21), labels=tokens(21), return_dict=False)
    base = hf.sequence_parallel(make("bert").base_model, dist.group.WORLD)(tokens(21))
    text = model.generate(tokens(21), max_new_tokens=5, do_sample=False)
    again = model.generate(tokens(21), max_new_tokens=5, do_sample=False, cache=hf.CompactCache(model.config))
    copied = copy.deepcopy(model)(tokens(21)).logits
    return (
        out.logits, out.hidden_states[-1], embeds.grad, base.last_hidden_state, text, again, copied,
        isinstance(as_tuple, tuple) and as_tuple[0].item(), base.pooler_output, type(model).__name__,
    )  # fmt: skip


def test_outputs_are_slices_and_generation_is_whole():
    model = make("llama").eval()
    embeds = model.get_input_embeddings()(tokens(21)).detach().requires_grad_()
    expected = model(inputs_embeds=embeds, output_hidden_states=True)
    loss = model(inputs_embeds=embeds, labels=tokens(21)).loss
    loss.backward()
    text = model.generate(tokens(21), max_new_tokens=5, do_sample=False)
    base = make("bert").base_model(tokens(21)).last_hidden_state
    ranks = run_distributed(outputs_of_slices, 2)
    for number, whole in ((0, expected.logits), (1, expected.hidden_states[-1]), (3, base), (6, expected.logits)):
        torch.testing.assert_close(torch.cat([found[number] for found in ranks], 1)[:, :21], whole)
    for found in ranks:
        torch.testing.assert_close(found[2], embeds.grad, atol=1e-6, rtol=1e-5)
        assert torch.equal(found[4], text)
        assert torch.equal(found[5], text)
        assert found[7] == pytest.approx(loss.item(), abs=1e-5)
        assert found[8:] == (None, "LlamaForCausalLM")


def test_one_process_has_the_loss_in_chunks_too(tmp_path):
    given = batch("left", 40)
    loss, gradients = step(make("llama"), given)
    model = hf.sequence_parallel(make("llama"), None, loss_chunk=7, mlp_tile=4)
    other, theirs = step(model, given)
    assert other == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(theirs, gradients, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again(**given).loss.item() == pytest.approx(loss, abs=1e-5)


def adapted(first):
    peft = pytest.importorskip("peft")
    model = make("llama", dtype=torch.float64)
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj", "lm_head"], r=4, init_lora_weights=False)
    group = dist.group.WORLD if dist.is_initialized() else None
    if first:
        model = hf.sequence_parallel(model, group, mlp_tile=9)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    if not first:
        model = hf.sequence_parallel(model, group)
    loss, gradients = step(model, batch("right", 41))
    return loss, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("first", [True, False])
def test_adapters_before_and_after(first):
    loss, gradients = adapted(first)
    assert len(gradients) == 10
    for other, theirs in run_distributed(adapted, 2, first):
        assert other == pytest.approx(loss, abs=1e-9)
        torch.testing.assert_close(theirs, gradients)


def wrapped_in_ddp():
    model = hf.sequence_parallel(make("llama"), dist.group.WORLD)
    return step(torch.nn.parallel.DistributedDataParallel(model), batch("plain", 41))


def test_ddp_averages_equal_gradients():
    loss, gradients = step(make("llama"), batch("plain", 41))
    for other, theirs in run_distributed(wrapped_in_ddp, 2):
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(theirs, gradients, atol=1e-6, rtol=1e-5)


def message_of(call):
    try:
        call()
    except (ConfigError, ShapeError) as error:
        return str(error)
    return None


def faults():
    group = dist.group.WORLD
    model = hf.sequence_parallel(make("llama"), group)
    rank = dist.get_rank()
    gap = padding(0, 40)
    gap[1, 7] = 0
    return [
        message_of(lambda: model(tokens(40) + rank)),
        message_of(lambda: model(tokens(40 - rank))),
        message_of(lambda: model(tokens(40), labels=tokens(40) * (1 - rank))),
        message_of(lambda: model(tokens(40), attention_mask=gap)),
        message_of(lambda: model(tokens(40), labels=tokens(20))),
    ]


def test_faults_are_alike_on_all_ranks():
    ranks = run_distributed(faults, 2)
    assert ranks[0] == ranks[1]
    patterns = [
        "other input_ids than",
        "other input_ids than",
        "other labels than",
        "item 1 has 39",
        "labels must be whole",
    ]
    for message, pattern in zip(ranks[0], patterns, strict=True):
        assert pattern in message
    assert "parallelism_config=hf.parallelism_config(group)" in ranks[0][0]


def one(**fields):
    return hf.sequence_parallel(make("llama"), None, **fields)


def with_group(group):
    return hf.sequence_parallel(make("llama"), group)


def classifier():
    return hf.dilate(transformers.BertForSequenceClassification(make("bert").config), SPARSE)


def undilated():
    model = make("llama")
    model.set_attn_implementation("sdpa")
    return model


def soft_cap():
    model = make("llama")
    model.config.final_logit_softcapping = 30.0
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hf.sequence_parallel(torch.nn.Linear(2, 2), None), "a model of transformers, not Linear"),
        (lambda: hf.sequence_parallel(undilated(), None), "call longnet_dist.hf.dilate"),
        (lambda: hf.sequence_parallel(classifier(), None), "BertForSequenceClassification reads some"),
        (lambda: hf.sequence_parallel(soft_cap(), None), "final_logit_softcapping"),
        (lambda: with_group("world"), "group must be"),
        (lambda: one(loss_chunk=0), "loss_chunk=0"),
        (lambda: one(loss_chunk=2.5), r"a whole number of tokens, at least 1, but loss_chunk=2.5; use"),
        (lambda: one(mlp_tile="4"), "mlp_tile='4'"),
        (lambda: one()(tokens(8), logits_to_keep=1), "logits_to_keep is given"),
        (lambda: one()(tokens(8), cache=transformers.DynamicCache()), "cache is given"),
        (lambda: one()(tokens(8), pixels=torch.ones(2, 3)), "cannot cut pixels"),
        (lambda: one()(), "needs input_ids"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises((ConfigError, ShapeError), match=message):
        call()


def test_a_model_that_drops_arguments_is_refused():
    model = hf.sequence_parallel(make("llama"), None)
    layer = model.model.layers[1]
    layer.forward = lambda hidden, **others: type(layer).forward(
        layer, hidden, position_embeddings=others["position_embeddings"]
    )
    with pytest.raises(ConfigError, match="attention of 1 layers of 2"):
        model(tokens(8))
