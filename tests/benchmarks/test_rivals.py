import json
from itertools import pairwise

import pytest
import torch

from benchmarks.rivals import RIVALS, Rival, document_edges, flex_attend, inputs, main, measure, paper
from longnet_dist import dilated_attention


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning")
def test_all_rivals_are_tried_and_those_of_a_cpu_run(tmp_path, capsys):
    main(["--device", "cpu", "--smoke", "--repeats", "1", "--output", str(tmp_path / "rivals.json")])
    found = {rival["name"]: rival for rival in json.loads((tmp_path / "rivals.json").read_text())["rivals"]}
    assert list(found) == [rival.name for rival in RIVALS]
    for rival in RIVALS:
        result = found[rival.name]
        if rival.gpu:
            assert result["error"] == "it runs on a GPU alone"
        elif "FlexAttention" in rival.name:
            assert "does not support backward on CPU" in result["error"]
        else:
            assert result["forward_ms"] > 0
            assert result["ns_per_token"] == pytest.approx(1e6 * result["both_ms"] / 256)
    assert capsys.readouterr().out.count("ns a token") == sum("error" not in result for result in found.values()) == 7


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*:UserWarning")
def test_flex_attention_computes_what_ours_does():
    q, k, v = (x.detach() for x in inputs(256, torch.device("cpu"))[:3])
    pattern = paper(256)
    assert len(set(pattern.dilation_rates)) > 1
    outs = [flex_attend(pattern, 256, 12, torch.device("cpu"))(q, k, v), dilated_attention(q, k, v, pattern)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_a_rival_that_fails_or_is_not_there_is_a_result():
    def absent(rows, device):
        raise ImportError("No module named 'rival'")

    def broken(rows, device):
        raise ValueError("no such kernel")

    assert (
        measure(Rival("a", absent), torch.device("cpu"), True, 1)["error"] == "not installed: No module named 'rival'"
    )
    assert measure(Rival("b", broken), torch.device("cpu"), True, 1)["error"] == "ValueError: no such kernel"


def test_documents_fill_all_tokens():
    edges = document_edges(1 << 20)
    lengths = [stop - start for start, stop in pairwise(edges)]
    assert edges[-1] == sum(lengths) == 1 << 20
    assert min(lengths[:-1]) >= 256
    assert max(lengths) <= 65536
