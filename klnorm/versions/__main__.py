"""Prints the environment of klnorm for a bug report.   Run: python -m klnorm.versions"""

import platform
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import functional
from . import __version__, require_triton


def main():
    """Print a line for every probe; one that fails prints its exception."""
    for label, probe in PROBES.items():
        try:
            found = probe()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        print(f"{label:<14}{found}", flush=True)  # a later probe may end the process
    return 0


def _klnorm():
    return f"{__version__}, in {Path(__file__).parents[1]}"


def _python():
    return f"{platform.python_version()}, {platform.platform()}"


def _torch():
    return f"{torch.__version__}, built for CUDA {torch.version.cuda or 'not at all'}"


def _triton():
    require_triton()
    return import_module("triton").__version__


def _transformers():
    try:
        return version("transformers")
    except PackageNotFoundError:
        return "not installed; nothing but klnorm.integrations.transformers needs it"


def _device():
    if not torch.cuda.is_available():
        return f"CPU, {platform.machine()}; torch sees no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, capability {major}.{minor}"


def _driver():
    if not torch.cuda.is_available():
        return "none: torch sees no CUDA GPU"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]


def _pytorch_path():
    _step(torch.device("cpu"))
    return "a forward and a backward ran"


def _kernels():
    if not torch.cuda.is_available():
        return "not tried: CPU tensors take the PyTorch path"
    pairs = zip(_step(torch.device("cuda")), _step(torch.device("cpu")), strict=True)
    differences = torch.cat([(a.cpu() - b).abs().flatten() for a, b in pairs])
    kernel = import_module("klnorm.kernels.forward").forward_kernel
    how = (
        "compiled"
        if isinstance(kernel, import_module("triton").JITFunction)
        else "interpreted, as TRITON_INTERPRET says"
    )
    return f"{how}; a forward and a backward ran, at most {differences.max():.1e} from the PyTorch path"


def _step(device):
    """Run a small step, the same on every device; return [y, kl, dx, gradients of the parameters]."""
    x, rho = torch.linspace(-1, 1, 4 * 64).sin().view(4, 64), torch.full((64,), -3.0)
    inputs = [t.to(device).requires_grad_() for t in (x, torch.ones(64), torch.zeros(64), rho, rho.clone())]
    seed = torch.tensor([1], device=device)
    y, kl = functional.kl_layer_norm(inputs[0], 64, *inputs[1:], seed=seed)
    return [y.detach(), kl.detach(), *torch.autograd.grad(y.square().sum() + kl, inputs)]


PROBES = {
    "klnorm": _klnorm,
    "Python": _python,
    "torch": _torch,
    "triton": _triton,
    "transformers": _transformers,
    "device": _device,
    "driver": _driver,
    "PyTorch path": _pytorch_path,
    "kernels": _kernels,
}

if __name__ == "__main__":
    sys.exit(main())
