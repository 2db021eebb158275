"""What klnorm says about a torch or triton that is too old or missing, and what `python -m klnorm.versions` prints."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType

import pytest
import torch

import klnorm
from klnorm.versions import __main__ as command
from klnorm.versions import require_triton, require_versions


def fake(monkeypatch, package, version):
    module = ModuleType(package)
    if version is not None:
        module.__version__ = version
    monkeypatch.setitem(sys.modules, package, module)


@pytest.mark.parametrize(
    "version", ["2.6.0", "2.6.0a0+git1", "2.13.0+cpu", "2.11.0a0+git", "10.0", "3.0.0.post1", "main"]
)
def test_torch_new_enough(monkeypatch, version):
    fake(monkeypatch, "torch", version)
    require_versions()


@pytest.mark.parametrize("version", ["2.5.1+cu124", "1.13.1", "0.4.0.post2"])
def test_torch_too_old(monkeypatch, version):
    fake(monkeypatch, "torch", version)
    with pytest.raises(ImportError) as error:
        require_versions()
    assert str(error.value) == f"klnorm needs torch>=2.6, found {version}. Remedy: pip install 'torch>=2.6'"
    assert error.value.name == "torch"


@pytest.mark.parametrize("version", ["3.4.0", "3.5.0.post1", "3.10.0+git9", "4.0"])
def test_triton_new_enough(monkeypatch, version):
    fake(monkeypatch, "triton", version)
    require_triton()


@pytest.mark.parametrize("version", ["3.3.1", "2.3.1"])
def test_triton_too_old(monkeypatch, version):
    fake(monkeypatch, "triton", version)
    with pytest.raises(ImportError, match=rf"triton>=3\.4, found {version}\. Remedy: pip install 'triton>=3\.4'"):
        require_triton()


def test_triton_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"triton>=3\.4, found none\. Remedy: pip install"):
        require_triton()


def test_folder_called_triton_is_not_triton(monkeypatch):
    fake(monkeypatch, "triton", None)
    with pytest.raises(ImportError, match="found none"):
        require_triton()


def test_error_inside_triton_is_passed_on(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("import a_library_that_triton_lacks\n")
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_triton_lacks"):
        require_triton()


def test_installed_versions_are_new_enough():
    pytest.importorskip("triton")
    require_versions()
    require_triton()


def told(capsys):
    """{label: what was printed beside it} of the command."""
    assert command.main() == 0
    return {line[:14].rstrip(): line[14:] for line in capsys.readouterr().out.splitlines()}


def test_command_runs_without_warnings(tmp_path):
    # -W error: runpy warns where the package has imported the module that it is to run.
    line = [sys.executable, "-W", "error::RuntimeWarning", "-m", "klnorm.versions"]
    path = os.pathsep.join([str(Path(klnorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    labels = [text[:14].rstrip() for text in done.stdout.splitlines()]
    assert labels == list(command.PROBES)
    assert f"klnorm        {klnorm.__version__}, in " in done.stdout
    assert f"torch         {torch.__version__}, " in done.stdout


def test_command_says_that_cpu_tensors_take_the_pytorch_path(capsys, no_gpu):
    found = told(capsys)
    assert found["device"].startswith("CPU, ")
    assert found["driver"] == "none: torch sees no CUDA GPU"
    assert found["PyTorch path"] == "a forward and a backward ran"
    assert found["kernels"] == "not tried: CPU tensors take the PyTorch path"


def test_command_tells_how_far_kernels_are_from_the_pytorch_path(capsys, device, monkeypatch, kernels_path):
    """Without a GPU the interpreter runs them; both steps then, so that nothing is between them."""
    if device.type != "cuda":
        step = command._step
        monkeypatch.setattr(command, "_step", lambda place: step(device))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = told(capsys)["kernels"]
    how, _, ran = found.partition("; ")
    assert how == ("compiled" if device.type == "cuda" else "interpreted, as TRITON_INTERPRET says")
    match = re.fullmatch(r"a forward and a backward ran, at most (\d\.\de[+-]\d\d) from the PyTorch path", ran)
    assert match is not None, found
    assert float(match[1]) < 1e-5


@pytest.mark.parametrize(("wrong", "printed"), [(2.5, "2.5e+00"), (float("nan"), "nan")])
def test_kernels_far_from_the_pytorch_path_are_told(capsys, monkeypatch, wrong, printed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = {"cuda": [torch.zeros(3), torch.tensor([0.0, wrong])], "cpu": [torch.zeros(3), torch.zeros(2)]}
    monkeypatch.setattr(command, "_step", lambda place: steps[place.type])
    assert f"at most {printed} from the PyTorch path" in told(capsys)["kernels"]


def test_command_prints_the_exception_of_every_probe_that_fails(capsys, monkeypatch):
    def fail(*args, **options):
        raise OSError("nobody is at home")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    monkeypatch.setattr(command, "version", fail)
    monkeypatch.setattr(command, "_step", fail)
    found = told(capsys)
    failed = {label for label, text in found.items() if text == "OSError: nobody is at home"}
    assert failed == {"transformers", "device", "driver", "PyTorch path", "kernels"}


def test_command_names_packages_that_are_missing(capsys, monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(command, "version", missing)
    found = told(capsys)
    assert found["triton"] == "ImportError: klnorm needs triton>=3.4, found none. Remedy: pip install 'triton>=3.4'"
    assert found["transformers"].startswith("not installed")


def test_a_gpu_that_torch_promises_and_does_not_have_is_told(capsys, monkeypatch, device):
    if device.type == "cuda":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "Error: " in told(capsys)["device"]
