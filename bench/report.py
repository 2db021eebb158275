"""Where and with what a result came about; running through cases; files; progress; tables."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

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
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(path, result):
    """Write JSON so that a reader never finds half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def reason(error):
    """An exception as one line of a result."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def run_through(items, key, measure, show, result, path, deadline=math.inf, lost=lambda record: False):
    """Append the record that `measure` makes of every item to the "records" of `result`, and print it, as `show` says.

    Saved at `path` before and after every item: "running" is the key of one that never came back. Those not begun
    before the deadline are "not_run". Ends after a record that is `lost`, its item still "running"; whether it did.
    """
    progress = Progress(len(items))
    for i, item in enumerate(items):
        if time.monotonic() > deadline:
            result["not_run"] = [key(item) for item in items[i:]]
            save(path, result)
            print(f"time is up: {len(items) - i} of {len(items)} were not run")
            break
        result["running"] = key(item)
        save(path, result)
        progress.begin(key(item))
        record = measure(item)
        result["records"].append(record)
        progress.finish(show(record))
        if lost(record):
            save(path, result)
            return True
        del result["running"]
        save(path, result)
    return False


def describe(result_environment):
    """One line about an environment."""
    e = result_environment
    versions = ", ".join(f"{name} {e['versions'][name]}" for name in ("torch", "triton"))
    return f"{e['device']}, driver {e['driver']}, {versions}, Python {e['python']}, commit {e['commit'][:12]}"


def markdown(header, rows):
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


class Progress:
    """Lines of results under a bar that redraws itself on a terminal; elsewhere every line has the share done."""

    WIDTH = 30

    def __init__(self, total, stream=None):
        self.total, self.done = max(1, total), 0
        self.stream = stream or sys.stdout
        self.redraws = self.stream.isatty()

    def begin(self, label):
        """Show what is being done."""
        if self.redraws:
            bar = "#" * (self.WIDTH * self.done // self.total)
            print(f"\r\x1b[K[{bar:-<{self.WIDTH}}] {self._percent()}  {label}", end="", file=self.stream, flush=True)

    def finish(self, line):
        """Count one item done and print its line."""
        self.done += 1
        start = "\r\x1b[K" if self.redraws else f"[{self._percent()}] "
        print(start + line, file=self.stream, flush=True)

    def _percent(self):
        return f"{100 * self.done // self.total:3d} %"
