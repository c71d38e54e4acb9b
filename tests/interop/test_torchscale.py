"""torchscale's models give torchscale's outputs, and go back name for name."""

from pathlib import Path

import pytest
import torch
from torch import nn

from longnet_dist.errors import CheckpointError, ConfigError, ShapeError
from longnet_dist.interop import from_torchscale, to_torchscale
from longnet_dist.interop.torchscale import branches

MODELS = torch.load(Path(__file__).parent / "torchscale_models.pt", weights_only=True)
NAMES = sorted(MODELS)


def load(name, state=None, **config):
    case = MODELS[name]
    decoder = case["kind"] == "decoder"
    return from_torchscale(case["state_dict"] if state is None else state, {**case["config"], **config}, decoder)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_hidden_states_are_torchscales(name):
    case, model = MODELS[name], load(name).double()
    options = {} if case["padding_mask"] is None else {"padding_mask": case["padding_mask"]}
    inputs = {"tokens": case["tokens"]} if "tokens" in case else {"features": case["embeddings"].double()}
    out = model(**inputs, **options, hidden_states=True)
    found = out.last_hidden_state if out.logits is None else out.logits
    assert (found - case["output"]).abs().max() < 2e-5
    for state, expected in zip(out.hidden_states, case["hidden"], strict=True):
        assert (state - expected).abs().max() < 2e-5
    assert not model.training


@pytest.mark.parametrize("name", NAMES)
def test_a_model_goes_back_to_torchscale(name):
    case, model = MODELS[name], load(name)
    state, config = to_torchscale(model)
    assert state.keys() == case["state_dict"].keys()
    for key, tensor in state.items():
        torch.testing.assert_close(tensor, case["state_dict"][key])
    assert from_torchscale(state, config, case["kind"] == "decoder").config == model.config


def test_variants_that_no_case_has():
    name = "encoder_subln_features"
    case, x = MODELS[name], MODELS[name]["embeddings"].double()
    # A scale multiplies features too; learned positions count from 2; a norm is behind them.
    generator = torch.Generator().manual_seed(0)
    extra = {
        "embed_positions.weight": torch.randn(80, 32, generator=generator),
        "layernorm_embedding.weight": torch.randn(32, generator=generator),
        "layernorm_embedding.bias": torch.randn(32, generator=generator),
    }
    model = load(name, case["state_dict"] | extra, no_scale_embedding=False, layernorm_embedding=True).double()
    norm = nn.functional.layer_norm(
        x * 32**0.5 + extra["embed_positions.weight"][2:66], (32,), *(v.double() for v in list(extra.values())[1:])
    )
    torch.testing.assert_close(model(features=x, hidden_states=True).hidden_states[0], norm)
    # Bidirectional xPos, whose buffer is checked and dropped.
    scales = {f"layers.{i}.self_attn.xpos.scale": (torch.arange(0, 8, 2) + 3.2) / 11.2 for i in range(2)}
    model = load(name, case["state_dict"] | scales, xpos_rel_pos=True, xpos_scale_base=64)
    assert model.config.positions == "xpos"
    assert to_torchscale(model)[0].keys() == (case["state_dict"] | scales).keys()
    with pytest.raises(CheckpointError, match="such positions are not supported"):
        load(name, case["state_dict"] | {key: x + 1 for key, x in scales.items()}, xpos_rel_pos=True)


def test_norms_follow_torchscales_configurations():
    def norms(name, **config):
        model = load(name, **config)
        ours = model.config
        return ours.pre_norm, ours.sub_norm, ours.final_norm, ours.deepnorm

    assert norms("encoder_deepnorm") == (False, False, False, True)
    assert norms("encoder_deepnorm", subln=True) == (False, False, False, True)
    assert norms("encoder_deepnorm", deepnorm=False, encoder_normalize_before=False) == (False, False, False, False)
    assert norms("encoder_subln_features", encoder_normalize_before=False) == (True, True, True, False)
    assert norms("decoder_deepnorm_postnorm") == (False, False, False, True)
    # DecoderConfig(deepnorm=True) alone leaves decoders with the norm before, and the one at the end.
    last = {"layer_norm.weight": torch.ones(32), "layer_norm.bias": torch.zeros(32)}
    case = MODELS["decoder_deepnorm_postnorm"]
    config = {key: value for key, value in case["config"].items() if key != "decoder_normalize_before"}
    model = from_torchscale(case["state_dict"] | last, config, decoder=True)
    assert (model.config.pre_norm, model.config.deepnorm, model.config.final_norm) == (True, True, True)


def test_all_faulty_keys_are_listed_at_once():
    state = dict(MODELS["encoder_subln_tokens"]["state_dict"])
    del state["layers.0.ffn.fc1.bias"], state["layer_norm.weight"]
    state["layers.1.ffn.fc2.weight"] = torch.zeros(64, 97)
    state["layers.0.encoder_attn.k_proj.weight"] = state["layers.0.moe_layer.wg"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        load("encoder_subln_tokens", state)
    for line in (
        "layers.0.ffn.fc1.bias is missing",
        "layer_norm.weight is missing",
        "layers.1.ffn.fc2.weight has shape [64, 97], not [64, 96]",
        "layers.0.encoder_attn.k_proj.weight is unknown: cross-attention is not supported",
        "layers.0.moe_layer.wg is unknown: experts are not supported",
    ):
        assert line in str(caught.value)


def test_sizes_follow_from_the_weights_or_are_compared():
    case = MODELS["encoder_subln_tokens"]
    sizes = {"encoder_embed_dim", "encoder_layers", "encoder_ffn_embed_dim"}
    config = {key: value for key, value in case["config"].items() if key not in sizes}
    model = from_torchscale(case["state_dict"], config)
    assert (model.config.dim, model.config.layers, model.config.inner_dim) == (64, 3, 96)
    with pytest.raises(CheckpointError) as caught:
        from_torchscale(case["state_dict"], config | {"encoder_embed_dim": 128, "encoder_layers": 9})
    lines = str(caught.value).splitlines()
    assert len(lines) <= 10
    assert "encoder_layers is 3 in the weights, but 9 is asked for" in lines
    assert "encoder_embed_dim is 64 in the weights, but 128 is asked for" in lines


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"multiway": True}, "multiway are not supported"),
        ({"rel_pos_buckets": 8, "max_rel_pos": 4}, "rel_pos_buckets are not supported"),
        ({"activation_fn": "tanh"}, "one of gelu, relu, swish"),
        ({"attention_dropout": 0.1}, "use attention_dropout=0"),
        ({"segment_length": "print(1)"}, "must be a list of integers"),
        ({"segment_length": None}, "segment_length must be a list of integers"),
        ({"segment_length": "[" * 9999}, r"such as \"\[1024, 5792\]\", also as a string, but is '\[{79} …$"),
        ({"subln": "False"}, "subln must be true or false, but is 'False'"),
        ({"rel_pos_buckets": None, "max_rel_pos": 1, "subln": 2}, "subln must be true or false, but is 2"),
    ],
)
def test_configurations_that_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        load("encoder_subln_features", **config)


def test_what_is_no_configuration_and_no_state_dict():
    case = MODELS["encoder_subln_features"]
    for config in (None, [1], "config.json"):
        with pytest.raises(ConfigError, match=r"keyword arguments of torchscale's EncoderConfig .*; give a dictionary"):
            from_torchscale(case["state_dict"], config)
    for state in (None, {}, {1: torch.zeros(1)}, {"x": 1}):
        with pytest.raises(CheckpointError, match="expected a state dict"):
            from_torchscale(state, case["config"])
    inside = from_torchscale({"model": {"module": case["state_dict"]}}, case["config"])
    torch.testing.assert_close(inside(features=case["embeddings"]).last_hidden_state, case["output"], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.long(), "int64 on cpu"),
        (lambda x: x.to(torch.complex64), "complex64 on cpu"),
        (lambda x: x.to("meta"), "float32 on meta"),
        (lambda x: x.to_sparse(), "float32 on cpu"),
    ],
)
def test_weights_that_are_no_floating_point_numbers_are_refused(change, message):
    key = "layers.0.ffn.fc1.weight"
    state = dict(MODELS["encoder_subln_features"]["state_dict"])
    state[key] = change(state[key])
    with pytest.raises(CheckpointError, match=rf"{key} is {message}, but must hold dense floating-point numbers"):
        load("encoder_subln_features", state)


def test_lists_of_branches_are_read_and_not_evaluated():
    assert branches("[np.int64(1024), numpy.int32(5792), 7]", "x") == (1024, 5792, 7)
    assert branches(torch.tensor([1, 2]), "x") == (1, 2)


def test_a_prefix_and_settings_without_effect_are_passed_over(caplog):
    case = MODELS["encoder_subln_features"]
    state = {f"LongNet_encoder.{key}": x for key, x in case["state_dict"].items()}
    model = from_torchscale(state, {**case["config"], "block_shift": True, "checkpoint_activations": True})
    assert "block_shift" in caplog.text
    assert "checkpoint_activations" not in caplog.text
    torch.testing.assert_close(model(features=case["embeddings"]).last_hidden_state, case["output"], atol=2e-5, rtol=0)


def test_rows_that_torchscale_misplaces_are_told():
    model = load("encoder_subln_features", segment_length="[8, 18, 32]", dilated_ratio="[1, 4, 4]")
    with pytest.warns(UserWarning, match="w=18, r=4 and 64 rows"):
        model(features=torch.randn(1, 64, 32))
    model(features=torch.randn(1, 18, 32))  # one segment
    decoder = load("decoder_subln_xpos_tied")
    with pytest.raises(ShapeError, match="give lengths"):
        decoder(torch.zeros(1, 4, dtype=torch.int64), padding_mask=torch.zeros(1, 4, dtype=torch.bool))
