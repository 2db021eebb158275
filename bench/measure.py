"""One case: buffers, the gate, times, memory. Works on the CPU too, with a clock that is not a GPU's."""

import gc

import torch

from .cases import operation_of, sets_beyond, traffic
from .check import Wrong, check, output_gradients
from .contestants import contestant_of
from .layers import dtype_of, make_values
from .report import reason
from .timing import MOST_CALLS, measure, wall

DIRECTIONS = "forward", "backward", "both"


class Buffers:
    """`sets` of inputs, (x,) or (x, residual), and of the cotangents of the outputs like them, (dy,) or (dy, dsum)."""

    def __init__(self, case, device, sets):
        generator = torch.Generator(device=device).manual_seed(1)
        shape = case.shape.samples, case.shape.rows, case.shape.width
        count = 2 if case.variant.residual else 1

        def normal(shift):
            return (torch.randn(shape, generator=generator, device=device) + shift).to(dtype_of(case))

        self.inputs = [[normal(0.5).requires_grad_() for _ in range(count)] for _ in range(sets)]
        self.cotangents = [[normal(0.0) for _ in range(count)] for _ in range(sets)]


def calls(layer, buffers):
    """{direction: function that makes its call}. Call i uses set i % sets of the buffers, and holds as many results as
    there are sets: they rotate too.
    """
    sets, parameters = len(buffers.inputs), list(layer.parameters.values())

    def forward():
        kept = [None] * sets

        def call(i):
            kept[i % sets] = layer.forward(*buffers.inputs[i % sets])

        return call

    def backward():
        graphs = [layer.forward(*inputs) for inputs in buffers.inputs]
        gradients = [output_gradients(*pair) for pair in zip(graphs, buffers.cotangents, strict=True)]
        kept = [None] * sets

        def call(i):
            s = i % sets
            leaves = [*buffers.inputs[s], *parameters]
            kept[s] = torch.autograd.grad(graphs[s], leaves, gradients[s], retain_graph=True)

        return call

    def both():
        kept = [None] * sets

        def call(i):
            s = i % sets
            outputs = layer.forward(*buffers.inputs[s])
            leaves = [*buffers.inputs[s], *parameters]
            kept[s] = torch.autograd.grad(outputs, leaves, output_gradients(outputs, buffers.cotangents[s]))

        return call

    return {"forward": forward, "backward": backward, "both": both}


def build(case, device, sets):
    """The contestant's layer and its buffers."""
    layer = contestant_of(case).build(case, make_values(case.parameter_shape, device), device)
    return layer, Buffers(case, device, sets)


def prepare(case, device, sets):
    """The layer and its buffers, past the gate."""
    layer, buffers = build(case, device, sets)
    check(layer, case, contestant_of(case).family, buffers.inputs[0], buffers.cotangents[0])
    return layer, buffers


def compile_case(case, device="cuda"):
    """One forward and backward of a case, for what it leaves in the compilers' caches."""
    calls(*build(case, torch.device(device), 1))["both"]()(0)
    torch.cuda.empty_cache()  # other processes need the memory


def record_of(case):
    """What every record of a case begins with."""
    return {
        "operation": case.operation, "contestant": case.contestant, "noise": case.noise, "shape": str(case.shape),
        "dtype": case.dtype, "n_rows": case.shape.n_rows,
    }  # fmt: skip


def untimed(case, status="ok", why=None):
    """The record of a case, of which nothing is known yet."""
    return record_of(case) | {
        "samples": case.shape.samples, "width": case.shape.width, "elements": case.shape.elements,
        "status": status, "why": why, "parameter_dtype": None,
        "forward": None, "backward": None, "both": None, "wall_ms": None, "peak_bytes": None, "saved_bytes": None,
    }  # fmt: skip


def measure_case(case, clock, device, cache_bytes):
    """The record of a case. `status`: "ok"; "wrong", then nothing was timed; "failed", where it raised an error."""
    record = untimed(case)
    try:
        _measure(record, case, clock, device, cache_bytes)
    except Wrong as wrong:
        record |= {"status": "wrong", "why": str(wrong)}
    except Exception as error:  # a peer may raise anything, and must not end the run
        record |= {"status": "failed", "why": reason(error)}
    gc.collect()
    return record


def _measure(record, case, clock, device, cache_bytes):
    itemsize = dtype_of(case).itemsize
    sets = sets_beyond(cache_bytes, case.shape.elements * itemsize, MOST_CALLS)
    layer, buffers = prepare(case, device, sets)
    record["parameter_dtype"] = str(layer.parameters["weight"].dtype).removeprefix("torch.")
    *_, record["saved_bytes"] = saved_bytes(layer, buffers.inputs[0])
    for direction, make in calls(layer, buffers).items():
        call = make()
        timing = measure(call, clock)
        gbps = traffic(case, direction, itemsize) / timing.median_ms / 1e6
        record[direction] = {**timing._asdict(), "gbps": gbps}
        if direction == "both":
            record["wall_ms"] = wall(call, clock)
        del call
    record["peak_bytes"] = peak(calls(layer, buffers)["both"]()) if device.type == "cuda" else None


def saved_bytes(layer, inputs):
    """(bytes of what is normalized, of parameters and buffers, of everything else) that a forward saves for backward.

    What is normalized is x, or x and residual, and their sum, the output after y. Each storage counts once.
    """
    saved = {}

    def pack(tensor):
        kept = tensor.detach()  # an output that its own node holds would keep the whole graph, and the model, for ever
        saved[kept.untyped_storage().data_ptr()] = kept  # held, so that no address is given out twice
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = layer.forward(*inputs)
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address}
    normalized, state = [*inputs, *outputs[1 : len(inputs)]], [*layer.parameters.values(), *layer.buffers]
    of_normalized, of_state = (
        sum(sizes.pop(t.untyped_storage().data_ptr(), 0) for t in tensors) for tensors in (normalized, state)
    )
    return of_normalized, of_state, sum(sizes.values())


def peak(call):
    """Most bytes that one forward and backward allocates beyond the buffers and the parameters."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    return torch.cuda.max_memory_allocated() - before


def start_of(record):
    """What the line of a record on the screen begins with."""
    operation = operation_of(record)
    start = f"{record['contestant']:<14} {record['noise']:<6} {record['shape']:>12} {record['dtype']}"
    return start if operation == "layer_norm" else f"{start} {operation}"


def line(record, copy_gbps):
    """The record as a line of the table on the screen."""
    if record["status"] != "ok":
        return f"{start_of(record)}  {record['status'].upper()}: {record['why']}"
    cells = []
    for direction in DIRECTIONS:
        timing = record[direction]
        percent = f"{100 * timing['gbps'] / copy_gbps:3.0f} %" if copy_gbps else ""
        cells.append(f"{timing['median_ms']:8.4f} {percent}{'*' if timing['gaps'] else ' '}")
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:8.1f}"
    return f"{start_of(record)} {' '.join(cells)} {record['wall_ms']:8.4f} {peak}"


HEADER = (
    f"{'':14} {'noise':<6} {'M x N':>12} dtype  forward ms, of copy; backward; both; wall ms; peak MiB"
    "   (*: launch gaps included)"
)
