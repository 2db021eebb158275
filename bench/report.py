"""Where and with what a result came about; a run through cases, its file, its tables."""

import json
import math
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = "torch", "triton", "numpy", "apex", "liger-kernel", "quack-kernels", "fla-core", "transformers"


def environment():
    """Device, driver, versions, commit and time."""
    gpu = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if gpu else None
    return {
        "device": properties.name if gpu else f"CPU, {platform.machine()}",
        "multiprocessors": properties.multi_processor_count if gpu else None,
        "memory_bytes": properties.total_memory if gpu else None,
        "l2_bytes": properties.L2_cache_size if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit():
    """The commit of the working tree, "+" if files differ from it; $KLNORM_COMMIT where there is no repository."""
    found = _output("git", "-C", ROOT, "rev-parse", "HEAD")
    if found is None:
        return os.environ.get("KLNORM_COMMIT", "unknown")
    return found + ("+" if _output("git", "-C", ROOT, "status", "--porcelain") else "")


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(result_environment):
    """One line about an environment."""
    e = result_environment
    versions = ", ".join(f"{name} {e['versions'][name]}" for name in ("torch", "triton"))
    return f"{e['device']}, driver {e['driver']}, {versions}, Python {e['python']}, commit {e['commit'][:12]}"


def reason(error):
    """An exception as one line of a result."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def save(path, result):
    """Write JSON so that a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def run_through(items, measure, show, result, path, deadline=math.inf):
    """Append the record that `measure` makes of every item to the "records" of `result`, and print what `show` says.

    Saved at `path` after every item. Those not begun before the deadline are "not_run".
    """
    progress = tqdm(items, leave=False, disable=None)  # a log gets no bar
    for i, item in enumerate(progress):
        if time.monotonic() > deadline:
            result["not_run"] = list(map(str, items[i:]))
            tqdm.write(f"time is up: {len(items) - i} of {len(items)} were not run")
            break
        progress.set_description(str(item))
        if progress.disable:
            print(f"{i + 1}/{len(items)} {item}", flush=True)
        result["records"].append(measure(item))
        save(path, result)
        tqdm.write(f"{item}  {show(result['records'][-1])}")
    save(path, result)
    print(f"results in {path}")
