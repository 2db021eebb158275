"""The layout: device code in kernels/, installed as klnorm.kernels, and imports that go one way."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from klnorm.versions import __version__

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ["kernels", "launch", "ops", "functional", "layers"]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
SOURCES = KERNELS + sorted(path for path in (ROOT / "klnorm").rglob("*.py") if "kernels" not in path.parts)


def module_of(path):
    """("klnorm", "kernels", "noise") for kernels/noise.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts if parts[0] == "klnorm" else ("klnorm", *parts)


def imports_of(path):
    """Dotted names of all that a file imports, wherever in it, relative ones made absolute."""
    package = module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += (node.module,) if node.module else ()
            yield from (".".join([*base, alias.name]) for alias in node.names)


def foreign_imports(folder, allowed):
    """{file: imports} of what the files of a folder import from outside it, other than the allowed packages."""
    own = ".".join(module_of(folder)) + "."
    found = {}
    for path in folder.glob("*.py"):
        names = [name for name in imports_of(path) if name.split(".")[0] not in allowed and not name.startswith(own)]
        if names:
            found[path.name] = names
    return found


def test_kernels_is_a_folder_without_init():
    assert KERNELS
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the published package of that name"


def test_link_is_relative():
    assert os.readlink(ROOT / "klnorm" / "kernels") == os.path.join("..", "kernels")


@pytest.mark.parametrize("stem", [path.stem for path in KERNELS])
def test_klnorm_kernels_are_the_files_in_kernels(stem):
    assert Path(find_spec(f"klnorm.kernels.{stem}").origin).resolve() == ROOT / "kernels" / f"{stem}.py"


def test_kernels_import_triton_alone():
    assert foreign_imports(ROOT / "kernels", {"triton", "math", "typing"}) == {}


def test_reference_imports_torch_alone():
    assert foreign_imports(ROOT / "klnorm" / "reference", {"torch", *sys.stdlib_module_names}) == {}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer):
    parts = {module_of(path)[1] for path in SOURCES}
    graph = {part: set() for part in parts}
    for path in SOURCES:
        if path.stem == "__main__":
            continue  # a command, which nothing imports
        names = [name.split(".") for name in imports_of(path)]
        # Names that are not files come from klnorm/__init__.py.
        targets = {(name[1:] or ["__init__"])[0] for name in names if name[0] == "klnorm"}
        graph[module_of(path)[1]] |= {target if target in parts else "__init__" for target in targets}
    reached, todo = set(), {layer}
    while todo:
        reached |= todo
        todo = set().union(*(graph.get(part, set()) for part in todo)) - reached
    above = {"__init__", *LAYERS[LAYERS.index(layer) + 1 :]}
    assert not reached & above


def copy_tree(folder):
    """The source tree without environments and build output."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored))


def build(kind, tree, folder):
    """Call the build backend for an sdist or a wheel, as pip does."""
    folder.mkdir()
    code = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=tree, check=True)
    (archive,) = folder.iterdir()
    return archive


def pip(command, *arguments):
    """Run pip without a network, with the build backend of this environment."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


def pip_install(target, *what):
    pip("install", "--target", target, *what)


def assert_trains(target, package):
    """Where `target` is a site folder Python finds klnorm in the folder `package`, nothing called kernels, and trains.

    Triton, where there is one, takes the kernels of that folder.
    """
    code = """if True:
        import json, site, sys
        from importlib.util import find_spec
        target, stems, others = json.loads(sys.argv[1])
        site.addsitedir(target)
        print(find_spec("kernels"))
        sys.path += others
        import torch
        import klnorm
        layer = klnorm.KLLayerNorm(8)
        (layer(torch.randn(2, 8)).square().sum() + klnorm.kl_divergence(layer)).backward()
        print(klnorm.__version__, layer.weight_rho.grad.isfinite().all().item())
        if find_spec("triton"):
            import klnorm.launch
        for name in ["klnorm", *("klnorm.kernels." + stem for stem in stems)]:
            print(find_spec(name).origin)
    """
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    arguments = json.dumps([str(target), [path.stem for path in KERNELS], others])
    # -I and -S: neither the working folder nor the klnorm installed for these tests may help.
    command = [sys.executable, "-I", "-S", "-c", code, arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    top_level, trained, *origins = done.stdout.splitlines()
    assert top_level == "None"
    assert trained == f"{__version__} True"
    files = package / "__init__.py", *(package / "kernels" / path.name for path in KERNELS)
    assert [Path(origin).resolve() for origin in origins] == [path.resolve() for path in files]
    assert (package / "py.typed").is_file()


def package_files(wheel):
    return sorted(name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name)


EXPECTED_FILES = sorted(["klnorm/py.typed", *("/".join(module_of(path)) + ".py" for path in SOURCES)])


def test_wheel(tmp_path):
    wheel = build("wheel", copy_tree(tmp_path / "tree"), tmp_path / "dist")
    assert wheel.name == f"klnorm-{__version__}-py3-none-any.whl"
    assert package_files(wheel) == EXPECTED_FILES


def test_sdist(tmp_path):
    sdist = build("sdist", copy_tree(tmp_path / "tree"), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert sorted(name for name in names if name.startswith("kernels/")) == [f"kernels/{path.name}" for path in KERNELS]
    assert not [name for name in names if name.startswith("klnorm/kernels")]
    pip("wheel", "--wheel-dir", tmp_path / "dist", sdist)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert package_files(wheel) == EXPECTED_FILES
    pip_install(tmp_path / "site", wheel)
    assert_trains(tmp_path / "site", tmp_path / "site" / "klnorm")


def test_editable_install(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    pip_install(tmp_path / "site", "--editable", tree)
    assert_trains(tmp_path / "site", tree / "klnorm")


EXTRAS = {"plot": {"matplotlib"}, "demo": {"scikit-learn", "scipy", "matplotlib", "tabulate", "tqdm"}}


def test_extras_that_remedies_name_bring_what_is_missing():
    named = {
        extra for path in SOURCES for extra in re.findall(r"pip install 'klnorm\[(\w+)\]'", path.read_text("utf-8"))
    }
    assert named == EXTRAS.keys()
    for extra, packages in EXTRAS.items():
        required = [line for line in metadata.requires("klnorm") if line.endswith(f'extra == "{extra}"')]
        assert {re.match(r"[\w-]+", line)[0] for line in required} == packages
