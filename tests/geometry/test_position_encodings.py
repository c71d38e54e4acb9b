import pytest
import torch

from longnet_dist.attention.positions import Positions
from longnet_dist.config.model import LongNetConfig, named_model
from longnet_dist.errors import ConfigError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.position_encodings import (
    POSITION_ENCODINGS,
    Decay,
    PositionEncoding,
    PositionSettings,
    checked_decay,
    checked_turns,
    turns_of_wavelengths,
)
from longnet_dist.model.longnet import LongNet, positions_of
from tests.registries import temporary_entries

SETTINGS = PositionSettings(10000.0, 512)
TINY = {"dim": 32, "layers": 1, "heads": 2, "segment_lengths": (8, 16), "dilation_rates": (1, 2)}


@pytest.fixture
def register():
    """Registers encodings for one test."""
    with temporary_entries(POSITION_ENCODINGS):
        yield POSITION_ENCODINGS.register


def test_the_files_are_known_with_their_properties():
    assert POSITION_ENCODINGS.names() == ("none", "rope", "xpos")
    properties = {
        name: (encoding.rotates, encoding.scales, encoding.num_tables())
        for name in POSITION_ENCODINGS.names()
        for encoding in (POSITION_ENCODINGS[name],)
    }
    assert properties == {"none": (False, False, 0), "rope": (True, False, 1), "xpos": (True, True, 2)}


@pytest.mark.parametrize("name", ["rope", "xpos"])
def test_the_first_pair_turns_by_one_radian_a_row(name):
    turns = checked_turns(name, 8, SETTINGS)
    assert turns[0] == pytest.approx(2**64 / 6.283185307179586, rel=1e-15)
    assert [turn / turns[0] for turn in turns] == pytest.approx([1, 0.1, 0.01, 0.001])


def test_xpos_scales_as_the_paper_does():
    decay = checked_decay("xpos", 4, SETTINGS)
    assert decay == Decay((0.4 / 1.4, 0.9 / 1.4), 512)
    assert checked_decay("rope", 4, SETTINGS) is None
    with pytest.raises(ConfigError, match="use xpos_base=512"):
        Positions(encoding="xpos").check(DilatedPattern([8], [1]), 8, 4, torch.float32)


def test_a_registered_encoding_reaches_tables_and_models(register):
    """Half of the channels do not turn; a turn that is not in the signed range is the same angle."""

    @register("half")
    class Half(PositionEncoding):
        @staticmethod
        def turns(head_dim, settings):
            return tuple(2**64 * (i % 2) + turn * (i % 2) for i, turn in enumerate(_turns(head_dim, settings)))

    config = LongNetConfig(vocab_size=16, positions="half", **TINY)
    positions = positions_of(config)
    table = positions.table(config.pattern, 5, 1, 16, 16, torch.float64, torch.device("cpu"))
    rope = Positions().table(config.pattern, 5, 1, 16, 16, torch.float64, torch.device("cpu"))
    assert torch.equal(table.query[..., 1::2, :], rope.query[..., 1::2, :])
    assert table.query[..., ::2, 0].eq(1).all()
    model = LongNet(config).double()
    tokens = torch.randint(0, 16, (1, 16))
    others = {
        name: LongNet(LongNetConfig(vocab_size=16, positions=name, **TINY)).double()
        for name in POSITION_ENCODINGS.names()
        if name != "half"
    }
    for name, other in others.items():
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(other(tokens).logits, model(tokens).logits), name


def _turns(head_dim, settings):
    return turns_of_wavelengths(settings.theta, head_dim)


@pytest.mark.parametrize("given", [(1,), (1, 2, 3), (1, 2.5)])
def test_turns_that_are_not_one_integer_a_pair_are_refused(register, given):
    @register("wrong")
    class Wrong(PositionEncoding):
        turns = staticmethod(lambda head_dim, settings: given)

    with pytest.raises(ConfigError, match=r"'wrong' give the turns .* for head_dim 4, .* correct the encoding"):
        Positions(encoding="wrong").table(DilatedPattern([8], [1]), 0, 8, 8, 4, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("given", [Decay((0.5,), 4), Decay((0.5, 1.5), 4), Decay((0.0, 0.5), 4), Decay((0.5, 0.5), 0)])
def test_scales_that_grow_or_miss_a_pair_are_refused(register, given):
    @register("wrong")
    class Wrong(PositionEncoding):
        scales = True
        decay = staticmethod(lambda head_dim, settings: given)

    with pytest.raises(ConfigError, match=r"'wrong' give the scales .* correct the encoding: one factor in \(0, 1\]"):
        checked_decay("wrong", 4, SETTINGS)


def test_the_configuration_refuses_what_an_encoding_cannot_do(register):
    @register("fading")
    class Fading(PositionEncoding):
        scales = True

    with pytest.raises(ConfigError, match=r"positions=fading would weigh later rows up .* use positions=rope"):
        named_model("tiny", causal=False, positions="fading")
    with pytest.raises(
        ConfigError, match=r"positions must be one of fading, none, rope, xpos, not 'rop'; did you mean"
    ):
        named_model("tiny", positions="rop")
    odd = TINY | {"dim": 10}
    with pytest.raises(ConfigError, match="dim=10 and heads=2 give 5"):
        LongNetConfig(positions="rope", **odd)
    assert positions_of(LongNetConfig(positions="none", **odd)) is None
    with pytest.raises(ConfigError, match="use positions=None"):
        Positions(encoding="none")
