"""The command converts there and back, and what it writes is loaded as ours is."""

import json

import pytest
import torch

from longnet_dist.cli import convert
from longnet_dist.errors import CheckpointError, ConfigError
from longnet_dist.interop import from_torchscale, gigapath_slide_encoder
from longnet_dist.model.pretrained import from_pretrained
from tests.interop.drawn import places, slide_weights
from tests.interop.test_longvit import weights as image_weights
from tests.interop.test_torchscale import MODELS


def run(*words):
    convert.main([str(word) for word in words])


@pytest.mark.parametrize("name", ["encoder_subln_tokens", "decoder_subln_xpos_tied"])
def test_torchscale_there_and_back(name, tmp_path, capsys):
    case = MODELS[name]
    decoder = ["--decoder"] if case["kind"] == "decoder" else []
    torch.save(case["state_dict"], tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    run(
        "torchscale",
        tmp_path / "model.pt",
        "--config",
        tmp_path / "config.json",
        *decoder,
        "--output",
        tmp_path / "out",
    )
    assert capsys.readouterr().out == f"converted to {tmp_path / 'out'}\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    model = from_pretrained(tmp_path / "out").double()
    assert (model(case["tokens"]).logits - case["output"]).abs().max() < 2e-5
    run("torchscale", tmp_path / "out", "--to", "torchscale", "--output", tmp_path / "back")
    state = torch.load(tmp_path / "back" / "state_dict.pt", weights_only=True)["model"]
    assert state.keys() == case["state_dict"].keys()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    again = from_torchscale(state, config, case["kind"] == "decoder")
    assert torch.equal(again(case["tokens"]).logits, model.float()(case["tokens"]).logits)


def test_gigapath_and_longvit_there_and_back(tmp_path):
    slide, image = slide_weights("8l256d", 2), image_weights()
    torch.save({"model": slide}, tmp_path / "slide.pth")
    torch.save({"teacher": image}, tmp_path / "image.pth")
    sizes = ("--depth", 2, "--dim", 256, "--mlp-ratio", 2, "--global-pool")
    run("gigapath", tmp_path / "slide.pth", *sizes, "--output", tmp_path / "slide")
    x, coords = torch.randn(1, 30, 1536), places(30, 20)
    expected = gigapath_slide_encoder(slide, depth=2, dim=256, mlp_ratio=2, global_pool=True)(x, coords)[0]
    assert torch.equal(gigapath_slide_encoder(tmp_path / "slide")(x, coords)[0], expected)
    assert torch.equal(from_pretrained(tmp_path / "slide")(features=x, coords=coords).pooled, expected)
    run("longvit", tmp_path / "image.pth", "--heads", 4, "--output", tmp_path / "image")
    for program, name, state in (("gigapath", "slide", slide), ("longvit", "image", image)):
        run(program, tmp_path / name, "--to", "torchscale", "--output", tmp_path / f"{name}_back")
        back = torch.load(tmp_path / f"{name}_back" / "state_dict.pt", weights_only=True)["model"]
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_faults(tmp_path):
    torch.save(MODELS["encoder_longvit"]["state_dict"], tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="give --config"):
        run("torchscale", tmp_path / "model.pt", "--output", tmp_path / "out")
    with pytest.raises(CheckpointError, match="cls_token is missing"):
        run("gigapath", tmp_path / "model.pt", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        run("torchscale", tmp_path / "model.pt", "--config", tmp_path / "list.json", "--output", tmp_path / "out")
    torch.save({**MODELS["encoder_longvit"]}, tmp_path / "both.pt")
    with pytest.raises(ConfigError, match="is not empty"):  # before the weights are read
        run("gigapath", tmp_path / "none.pth", "--output", tmp_path)
    with pytest.raises(ConfigError, match="is not empty"):
        run("torchscale", tmp_path / "both.pt", "--output", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("torchscale x.pt --depth 3 --output out", r"torchscale takes no --depth; leave it out \(--config, --decoder"),
        ("gigapath x.pt --config c.json --decoder --output out", "gigapath takes no --config, --decoder; leave it out"),
        (
            "longvit x.pt --dim 64 --heads 4 --output out",
            r"longvit takes no --dim; leave it out \(--heads can be given\)",
        ),
        ("gigapath in --to torchscale --heads 4 --output out", "its own sizes, so --to torchscale takes no --heads"),
    ],
)
def test_an_option_without_effect_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        run(*words.split())


def test_a_configuration_that_is_no_json(tmp_path):
    torch.save(MODELS["encoder_subln_features"]["state_dict"], tmp_path / "model.pt")
    for text in (b"\x80", b"[" * 100_000, b"{"):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"cannot read the configuration .*; --config is a JSON file with"):
            run("torchscale", tmp_path / "model.pt", "--config", tmp_path / "config.json", "--output", tmp_path / "out")
