"""What klnorm says about a torch or triton that is too old or missing."""

import sys
from types import ModuleType

import pytest

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
