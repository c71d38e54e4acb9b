import json

from benchmarks.decode import main


def test_every_position_is_measured_in_turn(tmp_path, capsys):
    words = ["--powers", "7", "9", "--tokens", "3", "--rounds", "2", "--dim", "8", "--heads", "2", "--base", "32"]
    main([*words, "--output", str(tmp_path / "decode.json")])
    times = json.loads((tmp_path / "decode.json").read_text())["milliseconds_per_token"]
    assert {power: len(values) for power, values in times.items()} == {"7": 2, "9": 2}
    assert all(value > 0 for values in times.values() for value in values)
    assert capsys.readouterr().out.count("ms a token") == 2


def test_the_bars_are_measured_with_and_without_graphs(tmp_path):
    words = ["--bars", "--powers", "7", "9", "--tokens", "2", "--rounds", "2", "--dim", "16", "--heads", "4"]
    main([*words, "--layers", "2", "--streams", "3", "--output", str(tmp_path / "bars.json")])
    found = json.loads((tmp_path / "bars.json").read_text())
    assert [(point["rows"], point["graphs"]) for point in found["one"]] == [
        ([126], False), ([126], True), ([510], False), ([510], True),
    ]  # fmt: skip
    for name in ("streams", "grouped"):
        assert [point["graphs"] for point in found[name]] == [False, True]
        assert all(len(point["rows"]) == 3 and point["tokens_per_second"] > 0 for point in found[name])
    weights = 4 * (256 * 16 * 2 + 2 * 16)
    assert all(point["bytes"] > weights for point in found["one"])
    assert found["one"][2]["bytes"] > found["one"][0]["bytes"]
    assert found["prefill"]["rows"] == 512
