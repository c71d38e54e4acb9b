import pytest

from benchmarks.parity import LAYOUTS, Layout, differences
from benchmarks.training_scaling import line


def test_each_run_is_compared_with_the_first_of_its_precision():
    layouts = [
        Layout(1, 1, 0),
        Layout(1, 2, 3),
        Layout(1, 1, 1, "bf16"),
        Layout(1, 2, 2, "bf16"),
        Layout(2, 1, 2, "bf16"),
    ]
    losses = ([4.0, 2.0], [4.0, 2.5], [4.0, 1.0], [8.0, 1.0])
    runs = {layout.name: {"loss": loss, "grad_norm": [1.0, 1.0]} for layout, loss in zip(layouts, losses, strict=False)}
    found = differences(layouts, runs)
    assert list(found) == [layout.name for layout in layouts[:4]]  # the last has failed
    assert [values["loss"] for values in found.values()] == pytest.approx([0, 0.25, 0.5, 1])
    assert [values["base"] for values in found.values()] == [layouts[i].name for i in (0, 0, 0, 2)]


def test_the_runs_on_gpus_cover_what_is_claimed():
    cuda = {(x.precision, x.sequence, x.zero) for x in LAYOUTS["cuda"]}
    assert {("fp32", 1, 0), ("bf16", 1, 1), ("bf16", 2, 2), ("bf16", 2, 3), ("fp32", 2, 2), ("fp32", 2, 3)} <= cuda
    assert len({x.name for x in LAYOUTS["cuda"]}) == len(LAYOUTS["cuda"])


def test_efficiency_is_by_gpu():
    first = {"gpus": 1, "rows": 10, "median_seconds": 1.0, "tokens_per_second": 10.0}
    second = {"gpus": 2, "rows": 20, "median_seconds": 1.25, "tokens_per_second": 16.0}
    assert line(second, first).endswith("efficiency 0.800")
    assert "failed: no memory" in line({"gpus": 2, "rows": 20, "error": "no memory"}, first)
