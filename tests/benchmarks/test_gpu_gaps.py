import gzip
import json

import pytest

from benchmarks.gpu_gaps import Gap, busy_share, gaps, main, read


def event(cat, name, start, length):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length}


EVENTS = [
    event("kernel", "a", 100, 50), event("kernel", "b", 140, 30), event("gpu_memcpy", "c", 270, 10),
    event("kernel", "d", 281, 19), event("kernel", "e", 500, 100), event("cpu_op", "step", 180, 400),
    event("cpu_op", "aten::mm", 260, 15), event("cuda_runtime", "launch", 265, 30), event("cpu_op", "norm", 490, 20),
    {"ph": "i", "name": "mark", "ts": 0},
]  # fmt: skip


def test_gaps_are_between_merged_work_and_name_what_launches_next(tmp_path, capsys):
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    events = read(path)
    assert len(events) == len(EVENTS) - 1
    assert busy_share(events) == (pytest.approx((70 + 10 + 19 + 100) / 500), 500)
    assert gaps(events, 20) == [Gap(170, 100, "aten::mm"), Gap(300, 200, "norm")]
    assert len(gaps(events, 1)) == 3
    main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0.50 ms, of which the GPU works 39.8%; 2 gaps")
    assert [line.split()[-1] for line in lines[1:]] == ["norm", "aten::mm"]


def test_a_trace_of_a_cpu_is_refused(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [event("cpu_op", "step", 0, 1)]}))
    with pytest.raises(SystemExit, match="no work of a GPU"):
        main([str(path)])
