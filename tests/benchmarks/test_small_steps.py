import json

from benchmarks.small_steps import main
from longnet_dist.cli.program.dispatch import main as longnet


def test_both_variants_are_measured_and_have_the_same_losses(tmp_path, capsys):
    (tmp_path / "text").write_text("a b c " * 400)
    longnet(["prepare", str(tmp_path / "text"), "--output", str(tmp_path / "text.tokens")])
    model = "dim=16", "heads=2", "layers=1", "segment_lengths=[32,64]", "dilation_rates=[1,2]", "vocab_size=256"
    words = [*(f"model.{word}" for word in model), "data.sequence_length=64", f"data.path={tmp_path / 'text.tokens'}"]
    words += ["--first", "1", "--steps", "2", "--device", "cpu", f"--output={tmp_path / 'steps.json'}"]
    main(words)
    found = json.loads((tmp_path / "steps.json").read_text())
    assert found["launches"]["losses"] == found["graphs"]["losses"]
    assert len(found["graphs"]["losses"]) == 2
    said = capsys.readouterr().out
    for name in ("launches", "graphs"):
        assert found[name]["steps"] == 3
        assert 0 < found[name]["tenth_ms"] <= found[name]["step_ms"] <= found[name]["ninth_tenth_ms"]
        assert f"{name}: " in said
