"""The figures of README and docs are those of the result files, and every one has its file and its command."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, table_rows

RESULTS = ROOT / "benchmarks" / "results"
BENCHMARKS, MEMORY, README = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "memory.md", ROOT / "README.md"
GIB = 2**30
CASES = ("lognormal", "long", "padded")


@cache
def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def billion(file: str, mode: str, power: int) -> tuple[float, dict[str, Any]]:
    """Seconds, and the whole point."""
    point = next(p for p in result(file)["points"] if p["mode"] == mode and p["tokens"] == 2**power)
    return statistics.median(point["seconds"]), point


def step(file: str, part: str, name: str, rows: int, tile: int | None = None) -> dict[str, Any]:
    """The newest measurement of a training step."""
    found = [p for p in result(file)["points"] if (p["part"], p["name"], p["rows"]) == (part, name, rows)]
    found = [p for p in found if tile is None or f"train.feed_forward_tile={tile}" in p["settings"]]
    newest: dict[str, Any] = found[-1]
    return newest


def attention(name: str) -> dict[str, Any]:
    return next(case for case in result("attention_speed")["results"] if case["case"]["name"] == name)


def throughput(point: dict[str, Any], digits: int = 3) -> str:
    tokens = f"{float(format(point['tokens_per_second'], f'.{digits}g')):,.0f}"
    return f"{point['median_seconds']:.2f} s, {tokens} tokens/s, {100 * point['mfu']:.1f} % MFU"


def billion_figures() -> dict[str, str]:
    forward, training = billion("billion_h200", "forward", 30), billion("billion_2xh200", "train", 30)
    times = [1e9 * billion("billion_h200", "forward", power)[0] / 2**power for power in (20, 24, 30)]
    bytes_24 = billion("billion_h200", "forward", 24)[1]["peak_memory_bytes"]
    h100 = billion("billion_h100", "train", 27), billion("billion_h100", "forward", 27)
    full, dilated = billion("billion_h100", "dense", 19)[0], billion("billion_h100", "forward", 19)[0]
    return {
        "forward with loss over 2^30 tokens": f"{forward[0]:.0f} s, {2**30 / forward[0] / 1e6:.1f} million tokens/s, "
        f"{forward[1]['peak_memory_bytes'] / GIB:.1f} GiB",
        "time a token at 2^20": f"{times[0]:.0f}, {times[1]:.0f} and {times[2]:.0f} ns; memory grows by "
        f"{100 * (forward[1]['peak_memory_bytes'] / bytes_24 - 1):.1f} % from 2^24",
        "training step over 2^30 tokens": f"{training[0]:.0f} s, {2**30 / training[0] / 1e6:.1f} million tokens/s, "
        f"{training[1]['peak_memory_bytes'] / GIB:.1f} GiB a GPU, {100 * training[1]['mfu']:.1f} % MFU",
        "training step over 2^27 tokens": f"{h100[0][0]:.0f} s, {h100[0][1]['peak_memory_bytes'] / GIB:.0f} GiB; the "
        f"forward alone {h100[1][0]:.0f} s",
        "forward over 524,288 tokens": f"full attention {full:.2f} s, dilated attention {dilated:.2f} s",
    }


def attention_figures() -> dict[str, str]:
    causal = attention("causal")
    shares = [f"{attention(name)['share_of_dense']:.2f}" for name in ("bidirectional", "D 128 causal")]
    shares += [f"{attention(name)['share_of_dense']:.2f}" for name in ("D 128 bidirectional", "grouped 12/4")]
    lengths = ("131,072", "1,048,576", "4,194,304")
    times = [f"{attention(f'up to N, {length} rows')['ns_per_row']:.0f}" for length in lengths]
    peer = result("attention")["torchscale"][0]
    errors = result("attention_accuracy")["accuracy"]
    merged = max(case["ratio"] for case in errors if case["computed_share"] < 1)
    others = max(case["ratio"] for case in errors if case["computed_share"] == 1)
    assert len(errors) == 50
    return {
        "1,048,576 tokens, 12 heads of 64, causal": f"{causal['forward_ms']:.1f} + {causal['backward_ms']:.1f} ms, "
        f"{causal['both_tflops']:.0f} TFLOP/s, {causal['share_of_dense']:.2f} × full attention's rate",
        "bidirectional; head dim 128": f"{shares[0]}; {shares[1]} causal and {shares[2]} bidirectional; "
        f"{shares[3]} × full attention's rate",
        "time a token at 128K": f"{times[0]}, {times[1]} and {times[2]} ns",
        "the paper's pattern at 1,048,576": f"{peer['times_as_fast']:.1f} × as fast, "
        f"{peer['ours']['extra_gib']:.1f} GiB instead of {peer['torchscale']['extra_gib']:.1f}",
        "largest error of 50": f"{merged:.2f} × where pairs are merged, {others:.2f} × elsewhere",
    }


def scaling_figures() -> dict[str, str]:
    two, four, halves = (result(name)["summary"] for name in ("scaling", "scaling_4xh200", "scaling_2xh200"))
    weak, strong, exposed, peers = (two[part] for part in ("weak", "strong", "exchange", "peers"))
    training = result("training_scaling_2xh200")["points"]
    long = {case["gpus"]: case["overlapped"]["ms"] / 1000 for case in result("scaling_2e27_rows_a_gpu")["cases"]}
    million = "1048576 rows on 2"
    return {
        "524,288 tokens a GPU, two H200": f"{weak[million]['ratio']:.3f} × the time of one, "
        f"{100 * exposed[million]['exposed_share']:.1f} % exposed",
        "1,048,576 and 65,536 tokens shared": f"{strong[million]['speedup']:.2f} × and "
        f"{strong['65536 rows on 2']['speedup']:.2f} × the speed of one",
        "524,288 tokens, two H200, against": f"{peers['Ulysses, 524288 rows on 2']['times_faster']:.0f} × faster than "
        f"Ulysses, {peers['context_parallel, 524288 rows on 2']['times_faster']:.0f} × than torch's context_parallel",
        "1,048,576 tokens a GPU, two and four": f"{four['weak']['2097152 rows on 2']['ratio']:.3f} × and "
        f"{four['weak']['4194304 rows on 4']['ratio']:.3f} × the time of one",
        "4,194,304 tokens shared": f"{four['strong']['4194304 rows on 2']['speedup']:.2f} × and "
        f"{four['strong']['4194304 rows on 4']['speedup']:.2f} × the speed of one",
        "1,048,576 tokens a GPU, two H200, merged": f"{halves['weak']['2097152 rows on 2']['ratio']:.3f} × the time of "
        f"one, {100 * halves['exchange']['2097152 rows on 2']['exposed_share']:.1f} % exposed",
        "training step of the paper's model": f"{training[0]['median_seconds']:.2f} s and "
        f"{training[1]['median_seconds']:.2f} s, {training[1]['tokens_per_second'] // 1000:.0f},000 tokens/s on two",
        "attention over 2^29 tokens": f"{long[4]:.3f} s; 2^27 tokens on one take {long[1]:.3f} s",
    }


def training_figures() -> dict[str, str]:
    h100, h200 = "training_h100", "training_h200"
    long, longer = step(h100, "longest", "paper", 2**22), step(h200, "longest", "paper", 6 << 20)
    words = step(h100, "longest", "vocabulary", 2**21)
    full, dilated = step(h100, "baseline", "dense", 2**17), step(h100, "baseline", "dilated", 2**17)
    full2, dilated2 = step(h100, "longest", "dense", 2**18), step(h100, "baseline", "dilated", 2**18)
    return {
        "1,048,576 tokens, one H100, `selective`": throughput(step(h100, "throughput", "tile 126720", 2**20)),
        "the same with queries": throughput(step(h100, "throughput", "12 projections, 8 blocks on the host", 2**20)),
        "1.3B parameters": throughput(step(h100, "throughput", "1.3b, 12 projections", 2**18)),
        "1,048,576 tokens, one H200": throughput(step(h200, "throughput", "12 projections", 2**20)),
        "longest sequence on an H100": f"4,194,304 tokens in {long['median_seconds']:.1f} s, {gib(long):.0f} GiB; "
        f"6,291,456 in {longer['median_seconds']:.1f} s, {gib(longer):.0f} GiB",
        "longest sequence with a vocabulary": f"2,097,152 tokens in {words['median_seconds']:.1f} s, "
        f"{gib(words):.0f} GiB",
        "131,072 tokens, one H100": f"full {full['median_seconds']:.2f} s, dilated {dilated['median_seconds']:.2f} s",
        "262,144 tokens, one H100": f"full {full2['median_seconds']:.1f} s and {gib(full2):.1f} GiB, dilated "
        f"{dilated2['median_seconds']:.2f} s and {gib(dilated2):.1f} GiB",
    }


def gib(point: dict[str, Any]) -> float:
    return float(point["peak_allocated_bytes"]) / GIB


def short(number: float) -> str:
    """A small number with two digits: 1.7e-7."""
    return f"{number:.1e}".replace("e-0", "e-")


def other_figures() -> dict[str, str]:
    cpu, gpu = result("parity")["largest_relative_difference"], result("parity_gpu")["largest_relative_difference"]
    fp32 = max(v["loss"] for name, v in gpu.items() if name.startswith("fp32"))
    bf16 = max(v["loss"] for v in gpu.values() if v["base"].startswith("bf16"))
    rounding = gpu["bf16 data=1 sequence=1 zero=1"]["loss"]
    curves = {p["name"]: p["difference"] for p in result("training_h100")["points"] if "difference" in p}
    decode = [statistics.median(ms) for ms in result("decode")["milliseconds_per_token"].values()]
    slide = result("slide_encoder")
    lost = result("checkpoints")["seconds_lost_per_checkpoint"]
    plans = result("exchange_plans")["points"]
    alone, of_four = (p for p in result("document_plans")["points"] if p["documents"] == 1000)
    prepared = result("preparation")
    rates, speedup = prepared["median_megabytes_per_second"], prepared["speedup_by_cpu_seconds"]["2"]
    megabytes = result("checkpoints")["checkpoint_bytes"] / 2**20
    return {
        "1, 2 and 4 sequence ranks": f"relative difference {short(max(v['loss'] for v in cpu.values()))} in loss, "
        f"{short(max(v['grad_norm'] for v in cpu.values()))} in gradient norm",
        "one and two H200, ZeRO": f"relative difference in loss {short(fp32)}",
        "the same in bf16": f"relative difference in loss {short(bf16)}; bf16 against float32 {short(rounding)}",
        "every memory setting": f"losses within {short(max(curves.values()))}; the same run twice within "
        f"{short(curves['plain again'])}",
        "forward and backward of 32,768": f"{result('cpu')['speedup_over_dense']:.1f} × faster than full attention",
        "time a token from 8,192": f"within {100 * result('cpu')['spread_per_token']:.1f} %",
        "GigaPath's slide encoder over 5,000": f"{slide['forward_seconds_median']:.0f} s, {slide['peak_gib']:.2f} GiB",
        "decoding at token 2^14, 2^17 and 2^20, one": f"{listed(decode)} ms a token",
        f"a checkpoint of {megabytes:.0f} MiB": f"costs {lost['asynchronous']:.1f} s of training; "
        f"{lost['synchronous']:.1f} s if waited for",
        "`longnet prepare` with a BPE": f"{rates['1']:.1f} and {rates['2']:.1f} MB/s; {speedup:.1f} × by CPU time",
        "planning 1,000 packed": f"{alone['first_layer_ms'] + alone['tiles_ms']:.1f} ms of CPU time, tiles included, "
        f"{alone['later_layer_ms']:.1f} ms in later layers; {of_four['first_layer_ms'] + of_four['tiles_ms']:.1f} ms "
        "on one of four ranks",
        "setting up a rank's exchange": f"{max(p['seconds'] for p in plans):.2f} s at most, once; "
        f"{max(p['received_bytes'] for p in plans) / 1e6:.0f} MB received a layer at most",
        "six runs on an H100": planner_errors("planner_h100"),
        "19 training steps": planner_errors("planner_training_h100"),
    }


def document_figures() -> dict[str, str]:
    ratios = [[p["ratio"] for p in result("documents_h200")["points"] if p["case"] == case] for case in CASES]
    (short64, short128), (long64, long128), (padded64, padded128) = ratios
    return {
        "documents of 1,260 tokens": f"{short64:.2f} × the time of one sequence; head dim 128 {short128:.2f} ×",
        "documents of 20,000 tokens": f"{long64:.2f} × the time of one sequence; head dim 128 {long128:.2f} ×",
        "16 sequences of": f"{padded64:.2f} × the time of one call each; head dim 128 {padded128:.2f} ×",
    }


def model_figures() -> dict[str, str]:
    slide, steps = result("slide_encoder_h200"), result("slide_encoder_h200")["finetune"]
    model = result("hf_training_h200")
    dilated, full = model["dilated"], model["sdpa"][-1]
    first = result("first_step_h200")
    seconds = [statistics.median(run["first_step_seconds"] for run in first[name]) for name in ("new", "again")]
    decode = result("decode_h200")
    plain, best = (
        [p["milliseconds_per_step"] for p in decode["one"] if p["split_keys"] is p["graphs"] is fast]
        for fast in (False, True)
    )
    streams, grouped = (
        next(p["tokens_per_second"] for p in decode[name] if p["split_keys"] and p["graphs"])
        for name in ("streams", "grouped")
    )
    prompt = decode["prefill"]
    return {
        "GigaPath's slide encoder over 45,680": f"{slide['forward_seconds_median']:.3f} s, {slide['peak_gib']:.1f} GiB",
        "fine-tuning it on 16 slides": f"{statistics.median(steps['step_seconds']):.1f} s a step, "
        f"{steps['peak_gib']:.0f} GiB",
        "Qwen3-0.6B's shape": f"{speed(dilated)}, {dilated['peak_bytes'] / GIB:.0f} GiB",
        f"the same with full attention (sdpa), {full['rows']:,}": speed(full),
        "first step of a run": f"after {seconds[0]:.0f} s; {seconds[1]:.0f} s where compiled code was kept",
        "decoding at token 2^14, 2^17 and 2^20, the paper's": f"{best[0]:.2f}, {best[1]:.2f} and {best[2]:.2f} ms a "
        f"token; {statistics.median(plain):.0f} with torch's kernels and no graph",
        "decoding 64 texts": f"{streams:,.0f} tokens/s; {grouped:,.0f} with `kv_heads=4`",
        "a prompt of 1,048,576 tokens": f"{prompt['prefill_seconds']:.2f} s; "
        f"{prompt['training_forward_seconds']:.2f} s for the forward of a training step",
    }


def speed(point: dict[str, Any]) -> str:
    return f"{float(format(point['tokens_per_second'], '.3g')):,.0f} tokens/s, {100 * point['mfu']:.1f} % MFU"


def listed(numbers: list[float]) -> str:
    """Numbers with one digit behind the point: 1.2, 1.3 and 1.4."""
    *some, last = (f"{number:.1f}" for number in numbers)
    return f"{', '.join(some)} and {last}"


def planner_errors(name: str) -> str:
    """The largest errors of a table of the planner, without the runs that its constants were fitted to."""
    errors: list[tuple[float, float]] = []
    for cells in table_rows(RESULTS / f"{name}.md"):
        if "yes" not in cells:
            memory, time = (abs(float(cell.rstrip("%"))) for cell in cells if cell.endswith("%"))
            errors.append((memory, time))
    return "memory within {} %, time within {} %".format(*map(max, zip(*errors, strict=True)))


FIGURES = billion_figures() | attention_figures() | scaling_figures() | training_figures() | other_figures()
FIGURES |= document_figures() | model_figures()


def rows_of(page: Path) -> list[list[str]]:
    return [cells for cells in table_rows(page) if len(cells) > 1]


@pytest.mark.parametrize("start", FIGURES)
def test_figure_is_that_of_the_result_file(start: str) -> None:
    found = [cells[1] for cells in rows_of(BENCHMARKS) if cells[0].startswith(start)]
    assert len(found) == 1, f"docs/benchmarks.md has {len(found)} rows that begin with {start!r}"
    assert found[0].startswith(FIGURES[start])


def test_every_row_of_benchmarks_is_checked_short_and_has_command_and_result() -> None:
    for what, figure, command, link in rows_of(BENCHMARKS):
        assert any(what.startswith(start) for start in FIGURES), what
        assert len(f"{what} {figure}".split()) <= 25, what
        assert command == "the same" or command.startswith("`"), what
        for file in re.findall(r"\]\(\.\./([^)]+)\)", link):
            assert (ROOT / file).is_file(), file
        if command != "the same":
            words = shlex.split(command.strip("`"))
            script = next(ROOT / word for word in words if word.endswith(".py"))
            text = script.read_text(encoding="utf-8")
            options = [word for word in words[words.index(str(script.relative_to(ROOT))) :] if word.startswith("--")]
            assert all(f'"{option}"' in text for option in options), command


def test_the_cost_of_memory_settings_is_that_of_the_result_file() -> None:
    names = {
        "`train.activation_checkpointing=selective train.feed_forward_tile=65536`": "selective",
        "`train.activation_checkpointing=none`": "none",
        "`train.activation_checkpointing=full`": "full",
        "`train.cache_qkv=12`": "12 projections",
        "`train.offload_activations=true`": "host",
        "`train.offload_activations=true train.cache_qkv=12 train.offload_qkv=6`": "host, 12 projections, 6 there",
        "`train.feed_forward_tile=null`": "no tiles",
        "`train.compile=false`": "not compiled",
        "`deepspeed.offload_optimizer=true`": "optimizer on the host",
        "`model.vocab_size=100277`": "100,277 ids",
        "`model.vocab_size=100277`, all logits at once": "100,277 ids, logits whole",
    }
    rows = [
        cells for cells in table_rows(MEMORY) if cells[0] in names and (cells[1] == "out of memory" or len(cells) > 2)
    ]
    assert [cells[0] for cells in rows] == list(names)
    first = step("training_h100", "gains", "selective", 2**18)["median_seconds"]
    for setting, *cells in rows:
        point = step("training_h100", "gains", names[setting], 2**18)
        if "error" in point:
            assert cells == ["out of memory"]
        else:
            seconds = point["median_seconds"]
            assert cells == [f"{seconds:.3f}", f"{seconds / first:.2f}", f"{gib(point):.1f}"]


def test_the_four_figures_of_readme() -> None:
    forward, training = billion("billion_h200", "forward", 30), billion("billion_2xh200", "train", 30)
    fast = step("training_h100", "throughput", "12 projections, 8 blocks on the host", 2**20)
    weak = result("scaling_2xh200")["summary"]["weak"]["2097152 rows on 2"]["ratio"]
    assert [cells[1] for cells in rows_of(README)] == [
        f"{forward[0]:.0f} s, {forward[1]['peak_memory_bytes'] / GIB:.1f} GiB",
        f"{training[0]:.0f} s, {training[1]['peak_memory_bytes'] / GIB:.1f} GiB a GPU",
        throughput(fast, 2),
        f"{weak:.3f} × the time",
    ]


def test_figures_of_the_slide_encoder_are_those_of_its_results() -> None:
    text = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    gpu, cpu = result("slide_encoder_h200"), result("slide_encoder")
    tuning = gpu["finetune"]
    for file in (gpu, cpu):
        assert f"{file['tiles']:,} tiles" in text
    assert f"{gpu['forward_seconds_median']:.3f} s and {gpu['peak_gib']:.1f} GiB" in text
    assert f"{cpu['forward_seconds_median']:.0f} s and {cpu['peak_gib']:.2f} GiB" in text
    assert f"{statistics.median(tuning['step_seconds']):.1f} s a step and {tuning['peak_gib']:.0f} GiB" in text
    lengths = tuning["lengths"]
    assert f"{len(lengths)} slides of {min(lengths):,} to {max(lengths):,} tiles" in text
