"""The figures that follow from the times of ``benchmarks/scaling.py``, as numbers and a table."""

from __future__ import annotations

from typing import Any


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Ratios of times: what the exchange costs, how time scales with GPUs, how far exact attention is."""
    times = {(case["rows"], case["gpus"]): case for case in result.get("cases", []) if "ms" in case["overlapped"]}
    found: dict[str, Any] = {"weak": {}, "strong": {}, "exchange": {}, "peers": {}}
    for (rows, gpus), case in sorted(times.items()):
        name, ms = f"{rows} rows on {gpus}", case["overlapped"]["ms"]
        if gpus > 1 and rows % gpus == 0 and (one := times.get((rows // gpus, 1))):
            found["weak"][name] = {"time_on_one": one["overlapped"]["ms"], "ratio": ms / one["overlapped"]["ms"]}
        if gpus > 1 and (one := times.get((rows, 1))):
            found["strong"][name] = {"speedup": one["overlapped"]["ms"] / ms}
        if "ms" in case.get("stubbed", {}) and "ms" in case["waited"]:
            stub, waited = case["stubbed"]["ms"], case["waited"]["ms"]
            found["exchange"][name] = {
                "exposed_ms": ms - stub,
                "exposed_share": (ms - stub) / ms,
                "exposed_share_without_overlap": (waited - stub) / waited,
            }
    for peer in result.get("peers", []):
        ours = times.get((peer["rows"], peer["gpus"]))
        if ours and "ms" in peer["exact"]:
            name = f"{peer['name']}, {peer['rows']} rows on {peer['gpus']}"
            found["peers"][name] = {"times_faster": peer["exact"]["ms"] / ours["overlapped"]["ms"]}
    return found


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    facts, shape, ratios = result["environment"], result["shape"], summary(result)
    gpu = f"{facts.get('gpus', 0)} × {facts.get('gpu', facts['cpu'])}"
    lines = [
        f"`{facts['command']}`",
        "",
        f"{gpu}, torch {facts['torch']}, NCCL {facts.get('nccl', '–')}, commit {facts['commit']}, {facts['date']}. "
        f"Forward + backward, causal, {shape['heads']} heads of {shape['dim']}, {result['dtype']}, "
        f"w = {shape['base']} … N.",
        "",
        "| rows | GPUs | ms | wait first | no transfer | exposed | speed-up over 1 | weak: × time of 1 | MB received |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in result.get("cases", []):
        name = f"{case['rows']} rows on {case['gpus']}"
        exposed, strong, weak = (ratios[kind].get(name, {}) for kind in ("exchange", "strong", "weak"))
        traffic = [max(case.get(f"{way}_received_bytes", [0])) / 1e6 for way in ("forward", "backward")]
        cells = [
            f"{case['rows']:,}",
            str(case["gpus"]),
            *(_ms(case.get(variant)) for variant in ("overlapped", "waited", "stubbed")),
            f"{exposed['exposed_share']:.1%}" if exposed else "–",
            f"{strong['speedup']:.2f}" if strong else "–",
            f"{weak['ratio']:.3f}" if weak else "–",
            f"{traffic[0]:.2f} / {traffic[1]:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if result.get("peers"):
        lines += [
            "",
            "| exact attention | rows | GPUs | ms | dilated attention is faster by |",
            "|---|---|---|---|---|",
        ]
    for peer in result.get("peers", []):
        faster = ratios["peers"].get(f"{peer['name']}, {peer['rows']} rows on {peer['gpus']}")
        cells = [peer["name"], f"{peer['rows']:,}", str(peer["gpus"]), _ms(peer["exact"])]
        lines.append("| " + " | ".join([*cells, f"{faster['times_faster']:.1f}×" if faster else "–"]) + " |")
    for part in ("check", "trace"):
        if part in result:
            lines += ["", f"{part}: {result[part]}"]
    return "\n".join(lines) + "\n"


def _ms(times: dict[str, Any] | None) -> str:
    if times is None:
        return "–"
    return f"{times['ms']:.2f}" if "ms" in times else "failed"
