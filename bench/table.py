"""The tables of README, from result files.   Run: python -m bench.table bench/results/FILE.json [--short]"""

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

from . import sweep
from .cases import FAMILY, KLNORM_NOISES, LAYER_NORM, is_large
from .contestants import OF_OPERATION
from .report import describe


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="result file of norms, memory, train_step or sweep")
    parser.add_argument("--short", action="store_true", help="of bench.norms: LayerNorm alone")
    options = parser.parse_args(arguments)
    result = json.loads(options.result.read_text(encoding="utf-8"))
    if "absent" in result:
        print(speed(result, options.short))
    elif "copy_gbps" in result:
        print(sweep.table(result))
    else:
        print(training(result) if "models" in result else memory(result))
    return 0


def memory(result):
    """What contestants keep for backward beside what is normalized and the parameters, at the largest shape."""
    counted = [r for r in result["records"] if r["dtype"] == "bf16" and r["why"] is None]
    parts = [[r for r in counted if (r["operation"] in FAMILY) is family] for family in (False, True)]
    return "\n\n".join(map(_kept, filter(None, parts)))


def _kept(records):
    largest = [r for r in records if r["x_bytes"] == max(r["x_bytes"] for r in records)]
    noises = list(dict.fromkeys(r["noise"] for r in largest if r["noise"] != LAYER_NORM))
    kept = {}
    for r in largest:
        kept.setdefault((r["operation"], r["contestant"]), {})[r["noise"]] = r["saved_rest"]
    rows = [
        [_label(*name), *(f"{of.get(noise, of.get(LAYER_NORM)):,}" for noise in noises)] for name, of in kept.items()
    ]
    header = f"bytes beside x ({largest[0]['x_bytes']:,}) and parameters, {largest[0]['shape']} bf16"
    return _table([header, *(f"{noise} noise" for noise in noises)], rows)


def _label(operation, contestant):
    label = OF_OPERATION[operation][contestant].label
    return label if operation == "layer_norm" else f"{operation}: {label}"


def training(result):
    """Where and when, a training step of every model in eager mode with every norm."""
    records = [r for r in result["records"] if r.get("mode", "eager") == "eager" and not r.get("compiled")]
    models, norms = (list(dict.fromkeys(r[key] for r in records)) for key in ("model", "norm"))
    found = {(r["norm"], r["model"]): f"{r['device_ms'] or r['wall_ms']:.1f}" for r in records if r["why"] is None}
    rows = [[norm, *(found.get((norm, model), "") for model in models)] for norm in norms]
    return f"{_where(result)}\n\n{_table(['a training step, ms', *models], rows)}"


def _where(result):
    return f"{describe(result['environment'])}, {result['environment']['time'][:10]}."


def speed(result, short=False):
    """Where and when, shares of the copy bandwidth, speed-up over the other contestants."""
    parts = [
        f"{_where(result)} Device time, bf16 `x` beside fp32 parameters, M x N >= 64 Mi; the copy bandwidth of the run "
        f"is {result['copy_gbps']:.0f} GB/s."
    ]
    large = [r for r in result["records"] if r["status"] == "ok" and is_large(r)]
    for operation in dict.fromkeys(("layer_norm", *(r["operation"] for r in large))):
        records = [r for r in large if r["operation"] == operation]
        what = "" if operation == "layer_norm" else f"{operation}, "
        for direction in "forward", "backward":
            shares = _shares(records, direction, result["copy_gbps"])
            parts.append(f"Share of the copy bandwidth, {what}{direction}:\n\n{shares}")
        speedups = _speedups(records)
        parts.append(f"How many times faster, {what}forward and backward, batch noise with KL:\n\n{speedups}")
        if short:
            break
    return "\n\n".join(parts)


def _shares(records, direction, copy_gbps):
    ours = [r for r in records if r["contestant"] == "klnorm"]
    found = {(r["noise"], r["width"]): f"{100 * r[direction]['gbps'] / copy_gbps:.0f} %" for r in ours}
    return _by_width("noise", {noise: noise for noise in (*KLNORM_NOISES, LAYER_NORM)}, found)


def _speedups(records):
    times = {(r["contestant"], r["width"]): r["both"]["median_ms"] for r in records if r["noise"] in ("batch", "none")}
    found = {
        (name, width): f"{ms / times['klnorm', width]:.2f}"
        for (name, width), ms in times.items()
        if name != "klnorm" and ("klnorm", width) in times
    }
    contestants = OF_OPERATION[records[0]["operation"]] if records else {}
    return _by_width("over", {name: contestant.label for name, contestant in contestants.items()}, found)


def _by_width(header, labels, found):
    """A row per label of what was found, {(key, width): cell}."""
    keys, widths = ({at[i] for at in found} for i in (0, 1))
    rows = [[label, *(found.get((key, n), "") for n in sorted(widths))] for key, label in labels.items() if key in keys]
    return _table([header, *(f"N={n}" for n in sorted(widths))], rows)


def _table(header, rows):
    """The first column to the left, the others to the right."""
    aligned = "left", *["right"] * (len(header) - 1)
    return tabulate(rows, header, tablefmt="github", colalign=aligned, disable_numparse=True)


if __name__ == "__main__":
    sys.exit(main())
