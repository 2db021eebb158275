"""Counts what a training step has a GPU do, on a CPU: operations that compute, and klnorm's launches."""

import ctypes
import re
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klnorm import compat, launch

from .launches import way_of_cuda

FREE = {
    "view", "_unsafe_view", "alias", "detach", "expand", "t", "transpose", "empty", "empty_like", "empty_strided",
    "new_empty", "unsqueeze", "squeeze", "select", "slice", "split", "permute", "as_strided", "_reshape_alias",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts dispatched operations by name, but views and allocations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname not in FREE:
            self.counts[func._overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def launch_zeros(call, inputs, parameters, seed, outputs):
    """In the place of `launch.Call.launch`: outputs are 0, without an operation of torch."""
    for output in tree_leaves(outputs):
        if output is not None:
            ctypes.memset(output.data_ptr(), 0, output.nbytes)


def count_operations(step):
    """Operations of a step that compute, and klnorm's launches, on the way that CUDA tensors take."""
    launches = []

    def counted(call, *arguments):
        launches.append(call)
        launch_zeros(call, *arguments)

    launched = mock.patch.object(launch.Call, "launch", counted)
    not_watched = mock.patch.object(compat, "is_watched", bool)  # by what counts here
    with way_of_cuda(), launched, not_watched, Operations() as operations:
        step()
    return operations.counts.total() + len(launches)


def count_in_compiled_code(step):
    """The same of a compiled step, by the profiler: torch.compile does nothing under a dispatch mode.

    An operator of klnorm is one operation here.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ahead, count = [e for e in profile.events() if e.cpu_parent is None], 0
    while ahead:
        event = ahead.pop()
        if re.match(r"aten::|klnorm::|graph_\d+_cpp_fused", event.name):
            count += event.name.removeprefix("aten::") not in FREE
        else:
            ahead += event.cpu_children
    return count
