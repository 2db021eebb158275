"""Options and fixtures of all tests.

Without a GPU the kernels run on CPU tensors in Triton's interpreter; `--device cuda` runs the same tests natively.
"""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the kernels run (default: cpu)")


def pytest_configure(config):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or deterministic matmuls refuse to run on CUDA
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which no test module has done yet
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a CUDA GPU, and torch sees none")


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
