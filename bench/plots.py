"""One picture of a result: GB/s against N forward and backward, time over native, peak memory; then the family."""

from .cases import DTYPES, FAMILY, TARGET_SHAPES, operation_of
from .contestants import OF_OPERATION
from .targets import is_target_case, of_operation


def plot(result, path):
    """Write the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 16), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2)
    done = [r for r in result["records"] if r["status"] == "ok"]
    records = of_operation(done, "layer_norm")
    large = [r for r in records if is_target_case(r)]
    for axis, direction in zip(axes[0], ("forward", "backward"), strict=True):
        _bandwidth(axis, large, direction, result["copy_gbps"])
    _ratio(axes[1][0], large)
    _memory(axes[1][1], records)
    for axis, direction in zip(axes[2], ("forward", "backward"), strict=True):
        _family(axis, done, direction, result["copy_gbps"])
    figure.suptitle(f"{result['environment']['device']}, commit {result['environment']['commit'][:12]}")
    figure.savefig(path, dpi=110)


def _lines(records):
    """{label: records of that contestant and noise, by width}."""
    lines = {}
    for record in sorted(records, key=lambda r: r["width"]):
        lines.setdefault(label(record), []).append(record)
    return lines


def label(record):
    name = OF_OPERATION[operation_of(record)][record["contestant"]].label
    return name if record["noise"] == "none" else f"{name}, {record['noise']}"


def _bandwidth(axis, records, direction, copy_gbps):
    for name, line in _lines(records).items():
        ours = name.startswith("klnorm")
        x, y = [r["width"] for r in line], [r[direction]["gbps"] for r in line]
        axis.plot(x, y, "o-" if ours else "x--", label=name, linewidth=2 if ours else 1)
    axis.axhline(copy_gbps, color="black", linewidth=0.8, label="copy")
    _decorate(axis, f"{direction}, bf16, M x N >= 64 Mi", "GB/s of minimal traffic")


def _ratio(axis, records):
    native = {r["shape"]: r["both"]["median_ms"] for r in records if r["contestant"] == "native"}
    for name, line in _lines(records).items():
        points = [(r["width"], r["both"]["median_ms"] / native[r["shape"]]) for r in line if r["shape"] in native]
        if points:
            axis.plot(*zip(*points, strict=True), "o-" if name.startswith("klnorm") else "x--", label=name)
    axis.set_yscale("log")
    _decorate(axis, "forward and backward, bf16, M x N >= 64 Mi", "time over nn.LayerNorm")


def _decorate(axis, title, y_label):
    axis.set(title=title, xlabel="N", ylabel=y_label)
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7)


def _family(axis, records, direction, copy_gbps):
    """A bar per operation, contestant and noise, at the most measured of the large bf16 shapes."""
    large = [r for operation in FAMILY for r in of_operation(records, operation) if is_target_case(r)]
    shapes = [r["shape"] for r in large]
    chosen = [r for r in large if r["shape"] == max(shapes, key=shapes.count)][::-1]
    axis.barh(range(len(chosen)), [r[direction]["gbps"] for r in chosen])
    axis.set_yticks(range(len(chosen)), [f"{operation_of(r)}: {label(r)}" for r in chosen], fontsize=7)
    axis.axvline(copy_gbps, color="black", linewidth=0.8, label="copy")
    axis.set(title=f"the family, {direction}, {'bf16 ' + chosen[0]['shape'] if chosen else 'not measured'}")
    axis.set_xlabel("GB/s of minimal traffic")
    axis.legend(fontsize=7)


def _memory(axis, records):
    """Bytes saved and peak, as multiples of x, at the first of the target shapes, else wherever most was measured."""
    shapes = [r["shape"] for r in records if r["dtype"] == "bf16"]
    shape = max(set(shapes), key=lambda s: (s == str(TARGET_SHAPES[0]), shapes.count(s)), default=None)
    chosen = [r for r in records if r["shape"] == shape and r["dtype"] == "bf16"]
    x_bytes = {r["shape"]: 2 * r["elements"] for r in chosen}
    for offset, key, name in (-0.2, "saved_bytes", "saved for backward, besides x"), (0.2, "peak_bytes", "peak"):
        heights = [(r[key] or 0) / x_bytes[r["shape"]] for r in chosen]
        axis.barh([i + offset for i in range(len(chosen))], heights, 0.4, label=name)
    axis.set_yticks(range(len(chosen)), [label(r) for r in chosen], fontsize=7)
    axis.set(title=f"memory of forward and backward, {shape}, {DTYPES['bf16']}", xlabel="multiples of x")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=7)
