import json

from benchmarks.decode import main


def test_every_position_is_measured_in_turn(tmp_path, capsys):
    words = ["--powers", "7", "9", "--tokens", "3", "--rounds", "2", "--dim", "8", "--heads", "2", "--base", "32"]
    main([*words, "--output", str(tmp_path / "decode.json")])
    times = json.loads((tmp_path / "decode.json").read_text())["milliseconds_per_token"]
    assert {power: len(values) for power, values in times.items()} == {"7": 2, "9": 2}
    assert all(value > 0 for values in times.values() for value in values)
    assert capsys.readouterr().out.count("ms a token") == 2
