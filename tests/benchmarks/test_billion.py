import json
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.billion import Benchmark, _parser, main
from benchmarks.jobs import Job, model_flops
from longnet_dist import LongNet, LongNetConfig
from longnet_dist.data.batches import Windows
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.model_cost import matrix_weights
from tests.distributed import run_distributed
from tests.train.runs import write_corpus

CPU = torch.device("cpu")
SIZES = ["--layers", "1", "--dim", "8", "--heads", "2", "--base", "16", "--ratio", "2", "--longest", "9"]


@pytest.fixture
def arguments(tmp_path):
    write_corpus(tmp_path / "text.tokens")
    output = tmp_path / "results" / "billion.json"
    return [*SIZES, "--data", str(tmp_path / "text.tokens"), "--output", str(output)], output


def test_every_length_and_mode_is_measured_and_drawn(arguments, capsys):
    words, output = arguments
    main([*words, "--powers", "6", "8", "--chunk", "100", "--train-chunk", "60"])
    result = json.loads(output.read_text())
    modes = ["forward", "train", "dense", "dense-train"]
    assert [(p["mode"], p["tokens"]) for p in result["points"]] == [(m, 2**power) for power in (6, 8) for m in modes]
    assert [p["chunk"] for p in result["points"][4:]] == [100, 60, 256, 256]
    for point in result["points"]:
        assert point["tokens_per_second"] == pytest.approx(point["tokens"] / statistics.median(point["seconds"]))
        assert 4 < point["loss"] < 8
    losses = {(p["mode"], p["tokens"]): p["loss"] for p in result["points"]}
    assert losses["train", 256] == pytest.approx(losses["forward", 256], rel=1e-6)
    assert losses["dense-train", 256] == pytest.approx(losses["dense", 256], rel=1e-6)
    assert result["text_distinct_bytes"] is None  # it was there before
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("tokens/s") == 8
    main(["--draw", str(output), str(output), "--output", str(output.with_name("both.json"))])
    assert output.with_name("both.png").read_bytes().startswith(b"\x89PNG")


def test_a_cut_run_goes_on_and_another_is_refused(arguments):
    words, output = arguments
    main([*words, "--powers", "6", "--modes", "forward"])
    before = json.loads(output.read_text())["points"]
    main([*words, "--powers", "6", "7", "--modes", "forward"])
    after = json.loads(output.read_text())["points"]
    assert after[:1] == before
    assert [point["tokens"] for point in after] == [64, 128]
    with pytest.raises(ConfigError, match="is of another model"):
        main([*words, "--powers", "6", "--dim", "16"])
    with pytest.raises(ConfigError, match="1048577 are needed"):
        main([*words, "--powers", "20"])


def test_a_budget_keeps_what_would_take_too_long_from_beginning(arguments):
    words, output = arguments
    main([*words, "--powers", "6", "7", "8", "--modes", "forward", "dense", "--seconds", "0"])
    assert [(p["mode"], p["tokens"]) for p in json.loads(output.read_text())["points"]] == [
        ("forward", 64),
        ("dense", 64),
    ]


def measure(words):
    benchmark = Benchmark(_parser().parse_args(words), CPU)
    benchmark.run()
    return benchmark.result["points"]


def test_ranks_share_the_chunks(arguments):
    words, output = arguments
    words = [*words, "--powers", "8", "--chunk", "96", "--train-chunk", "64"]
    points = run_distributed(measure, 2, words)
    assert [p["mode"] for p in points[0]] == [p["mode"] for p in points[1]] == ["forward", "train"]
    output.unlink()
    alone = run_distributed(measure, 1, words)[0]
    for point, expected in zip(points[0], alone, strict=False):
        assert point["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def stepped(path, chunk):
    config = LongNetConfig(dim=8, layers=2, heads=2, segment_lengths=(16, 64), dilation_rates=(1, 4), positions="rope")
    job = Job(config, Windows(TokenFile.open(path), "all", 200), chunk, CPU, trains=True, dense=False)
    return [job.run() for _ in range(3)], [parameter.detach() for parameter in job.model.parameters()]


def test_a_streamed_step_is_the_step_of_the_whole(tmp_path):
    path = write_corpus(tmp_path / "text.tokens")
    losses, weights = run_distributed(stepped, 1, path, 200)[0]
    assert losses[2] < losses[1] < losses[0]
    for found, parameters in (run_distributed(stepped, 1, path, 56)[0], run_distributed(stepped, 2, path, 56)[1]):
        assert found == pytest.approx(losses, rel=1e-6)
        for actual, expected in zip(parameters, weights, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_the_matrix_products_and_of_the_pairs():
    config = LongNetConfig(dim=16, layers=2, heads=4, kv_heads=2, segment_lengths=(8,), dilation_rates=(1,))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LongNet(config)(torch.zeros(1, 32, dtype=torch.int64), torch.zeros(1, 32, dtype=torch.int64))
    counts = {operator.__name__.split(".")[0]: flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["mm"] + counts["addmm"] == 2 * 32 * matrix_weights(config)
    pairs = 2 * 4 * 4 * (4 * 8 * 9 // 2) * 4  # layers · heads · D · pairs of 4 segments · 4
    assert model_flops(config, 32, trains=False, dense=False) == 2 * 32 * matrix_weights(config) + pairs
    dense = model_flops(config, 32, trains=True, dense=True)
    assert dense == 3 * (2 * 32 * matrix_weights(config) + 2 * 4 * 4 * 4 * 32 * 33 // 2)
