import math

import pytest
import torch

from longnet_dist.config.model import LongNetConfig, named_model
from longnet_dist.errors import ConfigError
from longnet_dist.inference.decoder import Decoder
from longnet_dist.inference.generation import Sampling, generate
from longnet_dist.model.longnet import LongNet

PROMPT = [10, 20, 30]
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LongNet(named_model("tiny")).eval()


def continued(model, prompt, num_tokens, sampling, **options):
    """The one text that continues one prompt."""
    return [ids[0] for ids in generate(model, [prompt], num_tokens, sampling, **options)]


def unaligned_model(**fields):
    """In float64, with segments that no prompt or chunk is aligned with; many end and begin in a few hundred rows."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "dim": 16, "layers": 2, "heads": 4}
    pattern = {"segment_lengths": (8, 30, 100, 300), "dilation_rates": (1, 3, 7, 20)}
    model = LongNet(LongNetConfig(**(sizes | pattern | fields))).double().eval()
    for block in model.blocks:
        if block.self_attn.sinks is not None:
            torch.nn.init.normal_(block.self_attn.sinks)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kv_heads": 2, "positions": "rope", "head_offsets": "blocked", "sinks": True},
        {"layer_offsets": True, "layer_shift": True},
    ],
)
@pytest.mark.parametrize(("length", "chunk"), [(1, 16), (2, 1), (67, 16), (101, 1000), (150, 40)])
def test_every_step_equals_the_forward_of_the_whole_text(fields, length, chunk):
    """Greedy, over hundreds of tokens: logits to 1e-9, hence the same tokens."""
    model, num_tokens = unaligned_model(**fields), 250
    prompts = torch.randint(97, (2, length), generator=torch.Generator().manual_seed(length)).tolist()
    seen = []
    handle = model.head.register_forward_hook(lambda _, __, logits: seen.append(logits[:, -1]))
    new = list(generate(model, prompts, num_tokens, GREEDY, chunk_length=chunk))
    handle.remove()
    assert len(seen) == len(new) == num_tokens
    texts = torch.tensor([[*prompt, *(ids[row] for ids in new)] for row, prompt in enumerate(prompts)])
    with torch.no_grad():
        logits = model(texts[:, :-1]).logits[:, length - 1 :]
    torch.testing.assert_close(torch.stack(seen, 1), logits, rtol=0, atol=1e-9)
    assert torch.equal(logits.argmax(-1), texts[:, length:])


def test_prompts_of_any_lengths_are_continued_together():
    """Each as it is alone, past the ends of segments, where the others are in the middle of theirs."""
    model, generator = unaligned_model(kv_heads=2), torch.Generator().manual_seed(1)
    prompts = [torch.randint(97, (length,), generator=generator).tolist() for length in (1, 7, 8, 31, 100, 260)]
    together = list(zip(*generate(model, prompts, 120, GREEDY, chunk_length=50), strict=True))
    alone = [tuple(continued(model, prompt, 120, GREEDY)) for prompt in prompts]
    assert together == alone
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_that_no_branch_keeps_attends_to_nothing(sinks):
    # 4 heads do not cover the rows
    model = unaligned_model(segment_lengths=(30, 60), dilation_rates=(7, 9), sinks=sinks)
    with torch.no_grad():
        tokens = torch.randint(97, (1, 90))
        whole = model(tokens).logits
        decoder = Decoder(model, 1, 91)
        decoder.load([int(tokens[0, 0])], [0])
        for row in range(90):
            decoder.follow(tokens[:, row])
            torch.testing.assert_close(decoder.step(), whole[:, row], rtol=0, atol=1e-9)


def test_samples_of_several_prompts_stand_next_to_each_other():
    model, prompts = unaligned_model(), [[1] * 40, [2] * 40]
    each = list(zip(*generate(model, prompts, 9, GREEDY, samples=3), strict=True))
    assert each[0] == each[1] == each[2] != each[3] == each[4] == each[5]
    assert list(zip(*generate(model, prompts, 9, GREEDY), strict=True)) == [each[0], each[3]]
    drawn = list(zip(*generate(model, [[1] * 40], 9, Sampling(1.0, 0), samples=3), strict=True))
    assert len(set(drawn)) == 3


def test_a_text_may_be_longer_than_xpos_spans_only_if_its_segments_are_not():
    model = LongNet(LongNetConfig(dim=4, layers=1, heads=1, segment_lengths=(64,), dilation_rates=(1,), xpos_base=1))
    assert len(continued(model, PROMPT, 100, GREEDY)) == 100
    model = LongNet(LongNetConfig(dim=4, layers=1, heads=1, segment_lengths=(512,), dilation_rates=(1,), xpos_base=1))
    with pytest.raises(ConfigError, match="xpos with base 1"):
        continued(model, PROMPT, 100, GREEDY)


def test_draws_follow_the_seed(model):
    draws = [continued(model, PROMPT, 20, Sampling(1.0, 0, seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_top_k_leaves_the_k_likeliest(model):
    likeliest = set(model(torch.tensor([PROMPT])).logits[0, -1].topk(3).indices.tolist())
    drawn = {continued(model, PROMPT, 1, Sampling(5.0, 3, seed))[0] for seed in range(60)}
    assert drawn == likeliest


def test_top_p_leaves_the_likeliest_that_reach_it(model):
    shares = (model(torch.tensor([PROMPT])).logits[0, -1].detach() / 5).softmax(-1).sort(descending=True)
    for top_p, number in ((shares.values[0] / 2, 1), (shares.values[:3].sum() - 1e-4, 3)):
        drawn = {continued(model, PROMPT, 1, Sampling(5.0, 0, seed, float(top_p)))[0] for seed in range(80)}
        assert drawn == set(shares.indices[:number].tolist())


def test_a_low_temperature_is_nearly_greedy(model):
    assert continued(model, PROMPT, 5, Sampling(1e-4, 0)) == continued(model, PROMPT, 5, GREEDY)


def test_a_top_k_beyond_the_vocabulary_is_all_of_it(model):
    assert continued(model, PROMPT, 5, Sampling(1.0, 9999)) == continued(model, PROMPT, 5, Sampling(1.0, 0))


@pytest.mark.parametrize("prompts", [[], [[]], [[], []]])
def test_a_prompt_must_hold_something(model, prompts):
    with pytest.raises(ConfigError, match="prompt is empty"):
        next(generate(model, prompts, 1, GREEDY))


def test_a_number_of_samples_that_cannot_be(model):
    with pytest.raises(ConfigError, match="at least 1 sample, not 0"):
        next(generate(model, [PROMPT], 1, GREEDY, samples=0))


def test_an_encoder_cannot_continue():
    encoder = LongNet(named_model("tiny", causal=False))
    with pytest.raises(ConfigError, match=r"model\.causal=false"):
        next(generate(encoder, [PROMPT], 1, GREEDY))


@pytest.mark.parametrize(
    "fields",
    [
        *({"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}),
        *({"seed": -1}, {"seed": 2**64}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan}),
    ],
)
def test_settings_outside_of_their_range_are_refused(fields):
    with pytest.raises(ConfigError, match=r"not be negative|must be above 0|must be 0 or|less than 2\^64"):
        Sampling(**fields)


def test_a_model_that_computes_whole_sequences_alone_cannot_continue():
    model = LongNet(named_model("tiny", attention="sparse")).eval()
    with pytest.raises(ConfigError, match="attention=sparse computes whole sequences, so this model cannot continue"):
        continued(model, [1], 2, GREEDY)
    with pytest.raises(ConfigError, match="cannot continue a text"):
        Decoder(model, 1, 10)  # before a server listens


def test_mistakes_are_named_before_the_first_token(model):
    with pytest.raises(ConfigError, match="ids 0 to 255, but those of the prompt are 1 to 256"):
        generate(model, [[1, 256]], 1, GREEDY)
    with pytest.raises(ConfigError, match=r"from 1 to 2\^48 tokens at most, not 281474976710657"):
        generate(model, [[1]], 2**48, GREEDY)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=9.0, top_k=0), Sampling(top_k=300)])
def test_only_allowed_ids_are_drawn(sampling):
    torch.manual_seed(0)
    model = LongNet(named_model("tiny", vocab_size=300)).eval()
    allowed = torch.zeros(300, dtype=torch.bool)
    allowed[[3, 77, 299]] = True
    drawn = {token for step in generate(model, [[1, 2]], 20, sampling, samples=2, allowed=allowed) for token in step}
    assert drawn <= {3, 77, 299}
    assert not {token for step in generate(model, [[1, 2]], 20, sampling, samples=2) for token in step} <= {3, 77, 299}
