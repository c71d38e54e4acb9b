import json

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.decode_kernels import main
from longnet_dist.attention.kernels.triton import decode


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_each_constant_takes_its_values_in_turn(tmp_path):
    words = ["--shapes", "1:2:1", "2:1:3", "--head-dim", "16", "--power", "6", "--layers", "2", "--replays", "1"]
    words += ["--repeats", "1", "--block", "16", "64", "--warps", "4", "--stages", "2", "--programs", "2", "4"]
    words += ["--most-blocks", "--output", str(tmp_path / "kernels.json")]
    block = decode.BLOCK
    main(words)
    points = json.loads((tmp_path / "kernels.json").read_text())["points"]
    assert block == decode.BLOCK
    assert [(point["shape"], point["visibility"]) for point in points] == [
        ("1:2:1", "full"), ("1:2:1", "random"), ("2:1:3", "full"), ("2:1:3", "random"),
    ]  # fmt: skip
    assert [len(point["attempts"]) for point in points] == [4, 4, 4, 4]
    assert all(0 < point["attend_microseconds"] < float("inf") for point in points)
    assert points[0]["bytes"] >= points[1]["bytes"] > 0
