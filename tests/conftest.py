"""Options and fixtures of all tests.

Without a GPU the kernels run on CPU tensors in Triton's interpreter; `--device cuda` runs the same tests natively.
"""

import os
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from native import NativeCompilation


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the kernels run (default: cpu)")
    parser.addoption("--in-process", action="store_true", help="run tests marked own_process in this process")


def pytest_configure(config):
    config.addinivalue_line("markers", "own_process: run the test in a process of its own, which it may wreck")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic matmuls refuse to run on CUDA
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which no test module has done yet
        config.pluginmanager.register(NativeCompilation())
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA GPU, and torch sees none")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test marked `own_process` by another pytest: a failed graph capture spoils torch's generator for good."""
    config = pyfuncitem.config
    if pyfuncitem.get_closest_marker("own_process") is None or config.getoption("--in-process"):
        return None
    options = ["--in-process", f"--device={config.getoption('--device')}", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, pyfuncitem.nodeid]
    done = subprocess.run(command, cwd=config.rootpath, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{pyfuncitem.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
    return True


@pytest.fixture(scope="session")
def device(request):
    """The device that the kernels run on."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _poisoned_and_deterministic():
    """Fill memory that torch.empty returns with NaN, so that reading what nobody wrote shows; refuse atomics."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def _patched_once():
    """The interpreter patches its language for every call of a device function, which takes longer than the call."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(fn):
        modules = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        return patch(fn) if any(tl.core.is_builtin(module.load) for module in modules) else None

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture
def fresh_plans():
    """Launches are planned anew: a test may patch what they are planned by."""
    from klnorm import launch

    for plan in launch.forward_plan, launch.backward_plan:
        plan.cache_clear()
    yield
    for plan in launch.forward_plan, launch.backward_plan:
        plan.cache_clear()


@pytest.fixture
def few_programs(device, fresh_plans, monkeypatch):
    """In the interpreter, where a program costs milliseconds, one finalizes more features than on a GPU."""
    from klnorm import tuning

    def finalizer_shape(n_cols):
        return tuning.Shape(2, min(1 << 16, max(64, tuning.next_power_of_2(n_cols))), 4)

    if device.type == "cpu":
        monkeypatch.setattr(tuning, "finalizer_shape", finalizer_shape)


@pytest.fixture
def kernels_path(few_programs, monkeypatch):
    """CPU tensors take the way of CUDA tensors, to the kernels."""
    from klnorm import launch, ops

    monkeypatch.setattr(ops, "_compute_forward", launch.forward)
    monkeypatch.setattr(ops, "_compute_backward", launch.backward)


@pytest.fixture(params=["cpu_path", "kernels"])
def path(request, monkeypatch):
    """The way that the call takes; "wide_kernels", for whoever asks for it, takes rows in pieces of 256."""
    from small_tiles import in_pieces

    if request.param != "cpu_path":
        request.getfixturevalue("kernels_path")
    if request.param == "wide_kernels":
        in_pieces(monkeypatch, 256, 2)
    return request.param


class Event:
    """An event of a GPU that is late for as long as a test says so, and then not at all."""

    late = False

    def query(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return not Event.late


class PhiloxGenerator:
    """What the host sees of a CUDA generator: a seed, and an offset that random operations move on."""

    def __init__(self, seed=0):
        self.manual_seed(seed)

    def manual_seed(self, seed):
        self._seed, self._offset = seed, 0

    def initial_seed(self):
        return self._seed

    def get_offset(self):
        return self._offset

    def set_offset(self, offset):
        assert offset % 4 == 0
        self._offset = offset


@pytest.fixture
def like_cuda(kernels_path, monkeypatch, device):
    """CPU tensors take the way of CUDA tensors everywhere: nobody may wait for their values, or launch for a seed.

    The event and, on `device`, the generator that they meet are attributes of what the fixture returns.
    """
    from klnorm import finite, seeds

    philox, default = PhiloxGenerator(), seeds.default_generator
    monkeypatch.setattr(finite, "is_far", lambda tensor: True)
    monkeypatch.setattr(finite, "recorded_event", lambda device: Event())
    monkeypatch.setattr(seeds, "known_to_host", lambda x: True)
    monkeypatch.setattr(seeds, "default_generator", lambda d: default(d) if d.type == "cuda" else philox)
    monkeypatch.setattr(Event, "late", False)
    here = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    return SimpleNamespace(event=Event, generator=seeds.default_generator(here))


@pytest.fixture
def process_group(device):
    """A group of one process, for wrappers that want one."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # fully_shard moves parameters to the GPU
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def no_gpu(monkeypatch):
    """Without a GPU, whatever the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def one_thread():
    """Sums in the order of one thread; more of them would only wait for each other in small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with the study's tiny model."""
    from study_inputs import make_model

    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder with the study's tiny data."""
    from study_inputs import make_data

    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return str(folder)


@pytest.fixture
def fresh_dynamo():
    """torch.compile without what an earlier test compiled, and without leaving anything."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager_seeds():
    """Eager's random numbers in compiled checkpoints.

    On CUDA torch gives those a generator of their own by default, seeded from the CPU's when first called.
    """
    config = torch._functorch.config
    if not hasattr(config, "graphsafe_rng_functionalization"):  # older torch has no such generators
        yield
        return
    with config.patch(graphsafe_rng_functionalization=False):
        yield


@pytest.fixture(scope="session")
def _cpp_compiler(tmp_path_factory):
    """Skip without a C++ compiler that finds what inductor's code includes; trying inductor itself takes far longer."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    source = tmp_path_factory.mktemp("probe") / "probe.cpp"
    source.write_text("#include <Python.h>\n#include <omp.h>\n#include <cmath>\n")
    try:
        command = [get_cpp_compiler(), "-fsyntax-only", "-fopenmp", f"-I{sysconfig.get_path('include')}", source]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except Exception as error:
        reason = getattr(error, "stderr", None) or str(error) or type(error).__name__
        pytest.skip(f"inductor needs a C++ compiler with OpenMP and Python's headers: {reason.splitlines()[0]}")


@pytest.fixture
def inductor(_cpp_compiler, fresh_dynamo):
    """Inductor, which is not to compile C++ for many seconds to find what the processor can do."""
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        yield
