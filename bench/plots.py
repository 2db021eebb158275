"""One picture of a result: GB/s against N forward and backward, time over native, peak memory."""

from .cases import DTYPES, TARGET_SHAPES
from .contestants import CONTESTANTS
from .targets import is_target_case


def plot(result, path):
    """Write the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    records = [r for r in result["records"] if r["status"] == "ok"]
    large = [r for r in records if is_target_case(r)]
    for axis, direction in zip(axes[0], ("forward", "backward"), strict=True):
        _bandwidth(axis, large, direction, result["copy_gbps"])
    _ratio(axes[1][0], large)
    _memory(axes[1][1], records)
    figure.suptitle(f"{result['environment']['device']}, commit {result['environment']['commit'][:12]}")
    figure.savefig(path, dpi=110)


def _lines(records):
    """{label: records of that contestant and noise, by width}."""
    lines = {}
    for record in sorted(records, key=lambda r: r["width"]):
        lines.setdefault(label(record), []).append(record)
    return lines


def label(record):
    name = CONTESTANTS[record["contestant"]].label
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
