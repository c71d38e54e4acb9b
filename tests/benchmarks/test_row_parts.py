import json
import shutil

import pytest

from benchmarks.row_parts import main


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.?torch.jit.script_method:DeprecationWarning")  # of torch's compiler itself
def test_every_part_is_measured_with_both(tmp_path):
    main(["--sizes", "16:2:32", "--repeats", "1", "--output", str(tmp_path / "parts.json")])
    (size,) = json.loads((tmp_path / "parts.json").read_text())["sizes"]
    assert len(size["ms"]) == 6
    assert all(times[kind] > 0 for times in size["ms"].values() for kind in ("kernels", "torch"))
