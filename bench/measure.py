"""One case: buffers, the gate, times, memory. Works on the CPU too, with a clock that is not a GPU's."""

import gc
import math

import torch

from .cases import traffic
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


def build(case, device, sets=1):
    """The contestant's layer and its buffers."""
    layer = contestant_of(case).build(case, make_values(case.parameter_shape, device), device)
    return layer, Buffers(case, device, sets)


def calls(layer, buffers):
    """{direction: function that makes its call}. Call i uses set i % sets of the buffers, and holds as many results as
    there are sets: they rotate too.
    """
    sets, parameters = len(buffers.inputs), list(layer.parameters.values())

    def rotating(result_of):
        kept = [None] * sets

        def call(i):
            kept[i % sets] = result_of(i % sets)

        return call

    def gradients_of(s, outputs, gradients, **options):
        return torch.autograd.grad(outputs, [*buffers.inputs[s], *parameters], gradients, **options)

    def forward():
        return rotating(lambda s: layer.forward(*buffers.inputs[s]))

    def backward():
        graphs = [layer.forward(*inputs) for inputs in buffers.inputs]
        gradients = [output_gradients(*pair) for pair in zip(graphs, buffers.cotangents, strict=True)]
        return rotating(lambda s: gradients_of(s, graphs[s], gradients[s], retain_graph=True))

    def both():
        def result_of(s):
            outputs = layer.forward(*buffers.inputs[s])
            return gradients_of(s, outputs, output_gradients(outputs, buffers.cotangents[s]))

        return rotating(result_of)

    return {"forward": forward, "backward": backward, "both": both}


def compile_case(case, device="cuda"):
    """One forward and backward of a case, for what it leaves in the compilers' caches."""
    calls(*build(case, torch.device(device)))["both"]()(0)
    torch.cuda.empty_cache()  # other processes need the memory


def measure_case(case, function, *arguments):
    """The record of a case, with what the function returns of it. `status`: "ok"; "wrong", then nothing was timed;
    "failed", where it raised an error.
    """
    shape = case.shape
    record = {
        "operation": case.operation, "contestant": case.contestant, "noise": case.noise, "shape": str(shape),
        "dtype": case.dtype, "n_rows": shape.n_rows, "samples": shape.samples, "width": shape.width,
        "elements": shape.elements, "status": "ok", "why": None,
    }  # fmt: skip
    try:
        record |= function(case, *arguments)
    except Wrong as wrong:
        record |= {"status": "wrong", "why": str(wrong)}
    except Exception as error:  # a peer may raise anything, and must not end the run
        record |= {"status": "failed", "why": reason(error)}
    gc.collect()
    return record


def timed(case, clock, device, cache_bytes):
    """Times and bytes of a case, past the gate. Its buffers exceed twice the cache."""
    itemsize = dtype_of(case).itemsize
    sets = min(MOST_CALLS, max(2, math.ceil(2 * cache_bytes / (case.shape.elements * itemsize))))
    layer, buffers = build(case, device, sets)
    check(layer, case, contestant_of(case).family, buffers.inputs[0], buffers.cotangents[0])
    found = {"parameter_dtype": str(layer.parameters["weight"].dtype).removeprefix("torch.")}
    *_, found["saved_bytes"] = saved_bytes(layer, buffers.inputs[0])
    for direction, make in calls(layer, buffers).items():
        call = make()
        timing = measure(call, clock)
        gbps = traffic(case, direction, itemsize) / timing.median_ms / 1e6
        found[direction] = {**timing._asdict(), "gbps": gbps}
        if direction == "both":
            found["wall_ms"] = wall(call, clock)
        del call
    return found | {"peak_bytes": peak(layer, buffers, device)}


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


def peak(layer, buffers, device):
    """Most bytes that one forward and backward allocates beyond the buffers and the parameters; None on a CPU."""
    if device.type != "cuda":
        return None
    call, before = calls(layer, buffers)["both"](), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(0)
    return torch.cuda.max_memory_allocated() - before
