"""Every example runs at a tiny size and does what it says."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

from longnet_dist import dilated_attention, phantom_keys
from longnet_dist.cli import evaluate
from longnet_dist.cli.features import predict
from longnet_dist.errors import ConfigError
from longnet_dist.interop.gigapath import slide_config
from longnet_dist.model.encoder import LongNetEncoder
from longnet_dist.model.pretrained import from_pretrained, save_pretrained
from tests.interop.drawn import places

ROOT = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted encoder, and slides of two classes that differ in one channel."""
    folder = tmp_path_factory.mktemp("slides")
    torch.manual_seed(0)
    save_pretrained(LongNetEncoder(slide_config(2, 32, 4, 2, feature_dim=12)), folder / "model")
    (folder / "slides").mkdir()
    lines = []
    for number in range(8):
        tiles = 10 + 3 * number
        features = torch.randn(tiles, 12) / 4
        features[:, 0] += 2 * (number % 2) - 1
        torch.save({"features": features, "coords": places(tiles, 8)[0]}, folder / "slides" / f"{number}.pt")
        lines.append(f"{number},{'odd' if number % 2 else 'even'}\n")
    (folder / "labels.csv").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("lora", [0, 4])
def test_fine_tuning_learns_and_saves_the_encoder(folder, tmp_path, lora, capsys):
    words = [
        str(folder / "model"),
        str(folder / "slides"),
        str(folder / "labels.csv"),
        "--output",
        str(tmp_path / "out"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own
        losses = example("finetune_slides").main(
            [*words, "--epochs", "8", "--lr", "1e-2", "--dropout", "0", "--lora", str(lora)]
        )
    assert losses[-1] < losses[0] / 2
    before, after = from_pretrained(folder / "model"), from_pretrained(tmp_path / "out")
    changed = [
        name for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    ]  # fmt: skip
    names = [name for name, _ in before.named_parameters()]
    adapted = [name for name in names if name.endswith(("q_proj.weight", "v_proj.weight"))]
    # The scale of keys' bias never reaches a softmax: its gradient is 0 but for phantom keys.
    assert changed == adapted if lora else set(changed) >= {name for name in names if "k_proj.bias" not in name}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "classes.json", "config.json", "head.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert "training" in capsys.readouterr().out


def test_a_fine_tuned_classifier_predicts_and_is_evaluated(folder, tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("name,diagnosis\n" + (folder / "labels.csv").read_text())
    words = [str(word) for word in (folder / "model", folder / "slides", tmp_path / "labels.csv")]
    words += ["--output", str(tmp_path / "out")]
    example("finetune_slides").main([*words, "--epochs", "8", "--lr", "1e-2", "--dropout", "0"])
    assert f"line 1 of {tmp_path / 'labels.csv'} is taken as its header: name,diagnosis" in capsys.readouterr().out
    predict.main([str(tmp_path / "out"), str(folder / "slides"), "--output", str(tmp_path / "predictions.csv")])
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "name,label,probability_even,probability_odd"
    assert [",".join(line.split(",")[:2]) for line in lines[1:]] == (folder / "labels.csv").read_text().split()
    evaluate.main([str(tmp_path / "out"), "--data", words[1], "--labels", words[2]])
    shown = capsys.readouterr()
    assert "accuracy    1.0000" in shown.out
    assert "is taken as its header" in shown.err


@pytest.mark.parametrize("name", ["finetune_slides", "pretrain_features", "heat_map"])
def test_an_output_that_cannot_be_used_is_refused_before_anything_is_computed(folder, tmp_path, name, monkeypatch):
    monkeypatch.setattr(LongNetEncoder, "forward", None)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    slides = str(folder / "slides")
    words = {
        "finetune_slides": [str(folder / "model"), slides, str(folder / "labels.csv")],
        "pretrain_features": [slides],
        "heat_map": [str(folder / "model"), f"{slides}/3.pt"],
    }[name]
    with pytest.raises(ConfigError, match=r"is not empty, and nothing in it is overwritten|must be a file, but is a"):
        example(name).main([*words, "--output", str(tmp_path / "used")])
    with pytest.raises(ConfigError, match="mine is no folder"):
        example(name).main([*words, "--output", str(tmp_path / "used" / "mine" / "new")])
    if name == "heat_map":
        with pytest.raises(ConfigError, match=r"must end in \.png"):
            example(name).main([*words, "--output", str(tmp_path / "map.text")])
        with pytest.raises(ConfigError, match="--block=2 must be below the number of blocks, 2"):
            example(name).main([*words, "--output", str(tmp_path / "map.png"), "--block", "2"])


def test_pre_training_learns_and_its_encoder_embeds(folder, tmp_path):
    words = [str(folder / "slides"), "--output", str(tmp_path / "out"), "--dim", "32", "--layers", "2", "--heads", "2"]
    losses = example("pretrain_features").main([*words, "--epochs", "12", "--lr", "3e-3"])
    assert losses[-1] < losses[0] * 0.6
    encoder = from_pretrained(tmp_path / "out")
    assert encoder(features=torch.randn(1, 5, 12), coords=places(5, 8)).pooled.shape == (1, 32)


def test_the_heat_map_has_the_weights_of_the_cls_row(folder, tmp_path, capsys):
    module = example("heat_map")
    words = [str(folder / "model"), str(folder / "slides" / "3.pt"), "--output", str(tmp_path / "map.png")]
    weights = module.main(words)
    assert weights.shape == (19,)
    assert "the tiles have" in capsys.readouterr().out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    # The output is a sum of values, so its gradient with respect to them has the weights.
    encoder, seen = from_pretrained(folder / "model"), []
    attention = encoder.blocks[-1].self_attn
    attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    contents = torch.load(folder / "slides" / "3.pt", weights_only=True)
    encoder(features=contents["features"][None], coords=contents["coords"][None])
    q, k, v = attention.project(seen[0], None)
    v = v.detach().requires_grad_()
    sink = phantom_keys(attention.pattern, 20, 4)
    out = dilated_attention(q, k, v, attention.pattern, causal=False, sink=sink)
    (gradient,) = torch.autograd.grad(out[0, 0, :, 0].sum(), v)
    torch.testing.assert_close(weights, gradient[0, 1:, :, 0].mean(-1))
