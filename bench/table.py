"""The README's tables, from result files.   Run: python -m bench.table bench/results/FILE.json"""

import argparse
import json
import sys
from pathlib import Path

from .cases import FAMILY, KLNORM_NOISES, LAYER_NORM, operation_of
from .contestants import OF_OPERATION
from .report import describe, markdown
from .targets import evaluate, is_target_case, lines, of_operation, speed_ratios


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="result file of bench.norms, bench.memory or bench.train_step")
    parser.add_argument("--short", action="store_true", help="of bench.norms: LayerNorm alone, without the targets")
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text(encoding="utf-8"))
    if "saved_rest" in result["records"][0]:
        print(render_memory(result))
    elif "model" in result["records"][0]:
        print(render_training(result))
    else:
        print(render(result, short=options.short))
    return 0


def render_memory(result):
    """Markdown: what contestants keep for backward beside what is normalized and the parameters; then the family."""
    counted = [r for r in result["records"] if r["dtype"] == "bf16" and r["saved_rest"] is not None]
    parts = [[r for r in counted if operation_of(r) in operations] for operations in (("layer_norm",), FAMILY)]
    return "\n\n".join(map(_kept, filter(None, parts)))


def _kept(records):
    """At the largest shape."""
    largest = [r for r in records if r["x_bytes"] == max(r["x_bytes"] for r in records)]
    noises = list(dict.fromkeys(r["noise"] for r in largest if r["noise"] != LAYER_NORM))
    rows = []
    for operation, name in dict.fromkeys((operation_of(r), r["contestant"]) for r in largest):
        kept = {r["noise"]: r["saved_rest"] for r in of_operation(largest, operation) if r["contestant"] == name}
        cells = (f"{kept.get(noise, kept.get(LAYER_NORM)):,}" for noise in noises)
        label = OF_OPERATION[operation][name].label
        rows.append([label if operation == "layer_norm" else f"{operation}: {label}", *cells])
    header = f"bytes beside x ({largest[0]['x_bytes']:,}) and parameters, {largest[0]['shape']} bf16"
    return markdown([header, *(f"{noise} noise" for noise in noises)], rows)


def render_training(result):
    """Markdown: where and when, a training step of every model in eager mode with every norm."""
    records = [r for r in result["records"] if r.get("mode", "compiled" if r["compiled"] else "eager") == "eager"]
    models, norms = (list(dict.fromkeys(r[key] for r in records)) for key in ("model", "norm"))
    found = {(r["norm"], r["model"]): r["device_ms"] or r["wall_ms"] for r in records if r["why"] is None}
    rows = [[norm, *(f"{found[norm, m]:.1f}" if (norm, m) in found else "" for m in models)] for norm in norms]
    where = f"{describe(result['environment'])}, {result['environment']['time'][:10]}."
    return f"{where}\n\n{markdown(['a training step, ms', *models], rows)}"


def render(result, short=False):
    """Markdown: where and when, share of the copy bandwidth, speed-up over the contestants, targets."""
    parts = [
        f"{describe(result['environment'])}, {result['environment']['time'][:10]}. Device time, bf16 `x` beside fp32 "
        f"parameters, M x N >= 64 Mi; the copy bandwidth of the run is {result['copy_gbps']:.0f} GB/s."
    ]
    large = [r for r in result["records"] if r["status"] == "ok" and is_target_case(r)]
    family = [] if short else dict.fromkeys(operation_of(r) for r in large if operation_of(r) in FAMILY)
    for operation in "layer_norm", *family:
        records = of_operation(large, operation)
        what = "" if operation == "layer_norm" else f"{operation}, "
        for direction in "forward", "backward":
            shares = _shares(records, direction, result["copy_gbps"])
            parts.append(f"Share of the copy bandwidth, {what}{direction}:\n\n{shares}")
        speedups = _speedups(records, operation)
        parts.append(f"How many times faster, {what}forward and backward, batch noise with KL:\n\n{speedups}")
    if not short:
        parts.append("```\n" + "\n".join(lines(evaluate(result))) + "\n```")
    return "\n\n".join(parts)


def _shares(records, direction, copy_gbps):
    found = {
        (r["noise"], r["width"]): f"{100 * r[direction]['gbps'] / copy_gbps:.0f} %"
        for r in records
        if r["contestant"] == "klnorm"
    }
    widths = sorted({width for _, width in found})
    noises = [noise for noise in (*KLNORM_NOISES, LAYER_NORM) if any((noise, n) in found for n in widths)]
    rows = [[noise, *(found.get((noise, n), "") for n in widths)] for noise in noises]
    return markdown(["noise", *(f"N={n}" for n in widths)], rows)


def _speedups(records, operation):
    contestants = OF_OPERATION[operation]
    ratios = {name: speed_ratios(records, name) for name in contestants if name != "klnorm"}
    widths = sorted({width for by_width in ratios.values() for width in by_width})
    rows = [
        [contestants[name].label, *(f"{1 / by_width[n]:.2f}" if n in by_width else "" for n in widths)]
        for name, by_width in ratios.items()
        if by_width
    ]
    return markdown(["over", *(f"N={n}" for n in widths)], rows)


if __name__ == "__main__":
    sys.exit(main())
