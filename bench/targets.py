"""The targets, and which of them a set of results meets.

All but the wall time and the memory are for bf16 x beside fp32 parameters, M * N >= 64 Mi elements, device time. A
target that covers several shapes or noise modes is met if the worst of them meets it.
"""

import math
from typing import NamedTuple

from .cases import BERT, TARGET_ELEMENTS, name_of, operation_of, tensors

SHARED = "eval", "batch", "sample"


class Bandwidth(NamedTuple):
    """At least this fraction of the copy bandwidth, for widths from `narrowest` to `widest`."""

    direction: str
    noises: tuple
    narrowest: int
    widest: int
    fraction: float


BANDWIDTH = [
    Bandwidth("forward", SHARED, 256, 8192, 0.93),
    Bandwidth("forward", SHARED, 16384, 65536, 0.85),
    Bandwidth("forward", ("token",), 256, 8192, 0.65),
    Bandwidth("forward", ("token",), 16384, 65536, 0.55),
    Bandwidth("backward", SHARED, 256, 256, 0.85),
    Bandwidth("backward", SHARED, 1024, 8192, 0.90),
    Bandwidth("backward", SHARED, 16384, 65536, 0.55),
    Bandwidth("backward", ("token",), 256, 256, 0.55),
    Bandwidth("backward", ("token",), 1024, 8192, 0.60),
    Bandwidth("backward", ("token",), 16384, 65536, 0.45),
]
# Forward and backward of klnorm, batch noise, with KL: at most this multiple of the contestant's time.
PEERS = "compiled", "apex_fused", "apex_fast", "liger", "quack", "fla"
RATIO = {"native": 0.75, **dict.fromkeys(PEERS, 0.95), "eager": 0.12, "eager_compiled": 0.60}
RESIDUALS = "residual", "rms_residual"
# Tensors of the size of x that a residual addition and a normalization move, each at its own minimum. Forward: the
# addition reads x and residual and writes their sum, the normalization reads that and writes y. Backward: the
# normalization reads the sum and dy and writes a gradient, which is added to that of the sum: two read, one written.
# One kernel moves fewer (`tensors`), and may take that share of the pair's time: 4/5 forward, 4/6 backward, 8/11 both.
UNFUSED_TENSORS = {"forward": 3 + 2, "backward": 3 + 3, "both": 5 + 6}
WALL_RATIO = 1.5  # of one forward and backward call at 8 x 128 x 768, to nn.LayerNorm
SAVED_BYTES_PER_ROW = 8  # for backward, beyond x (or its sum with a residual), the parameters and an 8-byte seed


def evaluate(result):
    """A dict per target: name, wanted, measured (None if nothing was), met, at (the worst place)."""
    done, copy_gbps = [r for r in result["records"] if r["status"] == "ok"], result["copy_gbps"]
    layer_norm = of_operation(done, "layer_norm")
    verdicts = [_bandwidth(target, layer_norm, copy_gbps) for target in BANDWIDTH]
    verdicts += [_ratio(contestant, limit, layer_norm) for contestant, limit in RATIO.items()]
    rms_norm = of_operation(done, "rms_norm")
    verdicts += [_bandwidth(target, rms_norm, copy_gbps, "rms_norm, ") for target in BANDWIDTH]
    verdicts += [_fused(operation, direction, done) for operation in RESIDUALS for direction in UNFUSED_TENSORS]
    return [*verdicts, _wall(layer_norm), _memory(done)]


def of_operation(records, operation):
    return [r for r in records if operation_of(r) == operation]


def is_target_case(record):
    return record["dtype"] == "bf16" and record["elements"] >= TARGET_ELEMENTS


def speed_ratios(records, contestant, direction="both"):
    """{width: time of klnorm over that of the contestant}: batch noise with KL, large shapes, records of one operation.

    `direction`: "forward", "backward", or "both" one after the other.
    """
    ok = [r for r in records if r["status"] == "ok" and is_target_case(r) and r["noise"] in ("batch", "none")]
    times = {(r["contestant"], r["shape"]): r[direction]["median_ms"] for r in ok}
    width = {r["shape"]: r["width"] for r in ok}
    ours = {shape: ms for (name, shape), ms in times.items() if name == "klnorm"}
    return {width[s]: ms / times[contestant, s] for s, ms in ours.items() if (contestant, s) in times}


def _verdict(name, wanted, found, at_least):
    """`found`: {place: value}; the worst one counts."""
    if not found:
        return {"target": name, "wanted": wanted, "measured": None, "met": None, "at": None}
    place = (min if at_least else max)(found, key=found.get)
    value = found[place]
    met = value >= wanted if at_least else value <= wanted
    return {"target": name, "wanted": wanted, "measured": value, "met": met, "at": str(place)}


def _bandwidth(target, records, copy_gbps, prefix=""):
    direction, noises, narrowest, widest, fraction = target
    found = {
        f"N={r['width']}, {r['noise']}": r[direction]["gbps"] / copy_gbps
        for r in records
        if r["contestant"] == "klnorm" and r["noise"] in noises
        if is_target_case(r) and narrowest <= r["width"] <= widest
    }
    widths = f"N={narrowest}" if narrowest == widest else f"N={narrowest} to {widest}"
    name = f"{prefix}{direction}, {'/'.join(noises)}, {widths}: share of copy"
    return _verdict(name, fraction, found, at_least=True)


def _ratio(contestant, limit, records):
    found = {f"N={width}": ratio for width, ratio in speed_ratios(records, contestant).items()}
    return _verdict(f"forward+backward, batch: time over {contestant}", limit, found, at_least=False)


def _fused(operation, direction, records):
    ratios = speed_ratios(of_operation(records, operation), "unfused", direction)
    found = {f"N={width}": ratio for width, ratio in ratios.items()}
    limit = tensors(operation, direction) / UNFUSED_TENSORS[direction]
    return _verdict(f"{operation}, {direction}, batch: time over add, then klnorm", limit, found, at_least=False)


def _wall(records):
    walls = {
        r["contestant"]: r["wall_ms"] for r in records if r["shape"] == str(BERT) and r["noise"] in ("batch", "none")
    }
    found = {str(BERT): walls["klnorm"] / walls["native"]} if {"klnorm", "native"} <= walls.keys() else {}
    return _verdict("wall time of a call: over native", WALL_RATIO, found, at_least=False)


def _memory(records):
    found = {
        f"{name_of(operation_of(r), r['shape'])} {r['dtype']}, {r['noise']}": math.ceil(
            max(0, r["saved_bytes"] - 8) / r["n_rows"]
        )
        for r in records
        if r["contestant"] == "klnorm" and r["noise"] != "eval" and r["saved_bytes"] is not None
    }
    return _verdict("bytes per row saved beyond x, parameters, seed", SAVED_BYTES_PER_ROW, found, at_least=False)


def lines(verdicts):
    """One printed line per target."""
    for v in verdicts:
        result = {True: "met", False: "MISSED", None: "not measured"}[v["met"]]
        measured = "     -" if v["measured"] is None else f"{v['measured']:6.3f}"
        yield f"{v['target']:<70} {measured}  target {v['wanted']:<5.3g} {result}" + (
            f" ({v['at']})" if v["at"] else ""
        )
