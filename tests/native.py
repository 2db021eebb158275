"""Whatever the tests launch in Triton's interpreter is compiled as well, for sm_90, by Triton's real compiler.

The interpreter runs code that the compiler refuses. As a plugin of pytest this file records what `klnorm.launch`
launches while the tests run, every kind of launch once, in a file of pytest's cache. As a program
(`make compile`) it compiles what the file holds, and fails where the compiler refuses something.
"""

import importlib
import os
import pickle
import re
import shlex
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import pytest

CAPABILITY = 90
WIDEST_BLOCK = 1024  # tests give the interpreter tiles of 2^18, at which the compiler works for hours


class Launch(NamedTuple):
    """A launch without its tensors: of each argument that is one only its dtype is left, of an int its value.

    `test`: one that made it.
    """

    module: str
    kernel: str
    arguments: tuple
    numbers: tuple
    constants: dict
    num_warps: int
    test: str

    @classmethod
    def of(cls, call, arguments):
        function, constants = call.kernel.fn, dict(call.constants)
        if "TILE" in constants:
            tile = constants["TILE"]
            constants["TILE"] = tile._replace(
                BLOCK_M=min(tile.BLOCK_M, WIDEST_BLOCK), BLOCK_N=min(tile.BLOCK_N, WIDEST_BLOCK)
            )
        if "MODE" in constants:  # the choice of a GPU's launch, which the interpreter's cannot make: it runs no PTX
            constants["MODE"] = constants["MODE"]._replace(FAST=True)
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        numbers = tuple(call.numbers)
        return cls(
            function.__module__, function.__name__, _described(arguments), numbers, constants, call.num_warps, test
        )

    @property
    def flat_constants(self):
        """By name, those of named tuples too."""
        flat = {}
        for name, value in self.constants.items():
            flat |= value._asdict() if hasattr(value, "_asdict") else {name: value}
        return flat

    @property
    def kind(self):
        """What decides which code is compiled. Of the numbers among the constants only some widths do."""
        flat = self.flat_constants
        chosen = [(k, v) for k, v in sorted(flat.items()) if isinstance(v, (str, bool))]
        constants = *chosen, flat.get("OFFSET") == 0, flat.get("N") == 1, flat.get("N", 0) > flat.get("BLOCK_N", 0)
        arguments = _described(self.arguments, lambda a: int if isinstance(a, int) else a)
        return self.module, self.kernel, arguments, tuple(number < 2**31 for number in self.numbers), constants

    @property
    def cost(self):
        """Larger for what takes longer to compile."""
        return sum(v for k, v in self.flat_constants.items() if k.startswith("BLOCK"))

    def __str__(self):
        arguments = str(self.arguments).replace("torch.", "")
        name = f"{self.kernel}({arguments}; {', '.join(f'{k}={v!r}' for k, v in self.flat_constants.items())})"
        return f"{name}\nTo see it again: python -m pytest {shlex.quote(self.test)}"


def _described(arguments, describe=lambda a: getattr(a, "dtype", a)):
    """Arguments of a launch, in tuples as they are, each described."""
    described = [_described(a, describe) if isinstance(a, tuple) else describe(a) for a in arguments]
    return type(arguments)(*described) if hasattr(arguments, "_fields") else tuple(described)


class NativeCompilation:
    """The plugin."""

    def __init__(self):
        self.launches = {}

    def record(self, call, *arguments):
        if hasattr(call.kernel, "fn"):  # not a test's stand-in for a kernel
            self.keep(Launch.of(call, arguments))

    def keep(self, launch):
        """Of every kind the cheapest."""
        known = self.launches.setdefault(launch.kind, launch)
        if launch.cost < known.cost:
            self.launches[launch.kind] = launch

    def pytest_sessionstart(self):
        from klnorm import launch

        run = launch.Call.launch

        def recorded(call, *arguments):
            run(call, *arguments)
            self.record(call, *arguments)

        launch.Call.launch = recorded

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """With pytest-xdist: a worker is done."""
        for launch in pickle.loads(getattr(node, "workeroutput", {}).get("launches", pickle.dumps([]))):
            self.keep(launch)

    def pytest_sessionfinish(self, session):
        launches, config = pickle.dumps(list(self.launches.values())), session.config
        if hasattr(config, "workeroutput"):
            config.workeroutput["launches"] = launches
        elif hasattr(config, "cache"):
            Path(config.cache.mkdir("native"), "launches").write_bytes(launches)


def refusal(launch):
    """None if the launch compiles to code that lets NaN through, as the interpreter does; else what is wrong.

    For a process of its own: its output is caught, where Triton's passes say what they refuse.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        for stream in sys.stdout, sys.stderr:
            os.dup2(said.fileno(), stream.fileno())
        try:
            ptx = compiled(launch).asm["ptx"]
        except Exception as error:
            sys.stdout.flush()
            said.seek(0)
            errors = [line.rstrip() for line in said if "error" in line.lower()]
            return "\n".join([str(launch), *causes(error), *errors[:20]])
    if deaf := sorted(set(re.findall(r"\b(?:max|min)(?:\.ftz)?\.f(?:16|32)\b|\b(?:max|min)\.bf16\b", ptx))):
        return f"{launch}\nIts {', '.join(deaf)} lets no NaN through. Remedy: propagate_nan=tl.PropagateNan.ALL."
    return None


def compiled(launch):
    import torch

    from bench.launches import compile_ahead
    from klnorm.launch import Call

    def tensor(argument):
        return torch.empty(0, dtype=argument, device="meta") if isinstance(argument, torch.dtype) else argument

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    call = Call(
        kernel, torch.device("meta"), launch.arguments, (1, 1), launch.numbers, launch.constants, launch.num_warps
    )
    return compile_ahead(call, _described(launch.arguments, tensor), CAPABILITY)


def causes(error):
    """The error and its causes: Triton names the call in the kernel first and the fault in a helper last."""
    while error:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


def refusal_alone(launch):
    """`refusal` in a process that the compiler may end: a failed assertion of LLVM's raises nothing."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(refusal, launch).result()
        except BrokenProcessPool:
            return f"{launch}\nThe compiler ended its process."


def main(file):
    begin = time.monotonic()
    launches = pickle.loads(Path(file).read_bytes()) if Path(file).exists() else []
    if not launches:
        sys.exit(f"There are no launches in {file}: run tests that launch kernels first, as in make test compile")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        outcomes = [pool.submit(refusal, launch) for launch in launches]
    broken = [isinstance(outcome.exception(), BrokenProcessPool) for outcome in outcomes]
    texts = [refusal_alone(a) if b else o.result() for a, o, b in zip(launches, outcomes, broken, strict=True)]
    refused = [text for text in texts if text]
    for text in refused:
        print(f"Refused: {text}\n")
    seconds = time.monotonic() - begin
    print(f"{len(launches)} kinds of launches compiled for sm_90 in {seconds:.0f} s, {len(refused)} refused")
    sys.exit(bool(refused))


if __name__ == "__main__":
    # Pickled launches belong to the module that recorded them, this one under its name.
    sys.modules["native"] = sys.modules["__main__"]
    main(*sys.argv[1:])
