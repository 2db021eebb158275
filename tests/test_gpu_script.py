"""bench/gpu.sh, the one command for a GPU, with a stand-in for Python."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_script(tmp_path, *arguments, does=()):
    """gpu.sh with a stand-in for Python, which notes its arguments, and {words in them: what it does}."""
    fake, calls = tmp_path / "python", tmp_path / "calls"
    cases = "".join(f'*"{words}"*) {command} ;;\n' for words, command in dict(does).items())
    fake.write_text(f'#!/bin/sh\necho "$@" >> "{calls}"\ncase "$*" in\n{cases}esac\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHON": str(fake)}, capture_output=True, text=True)
    modules = [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []
    return done, [words for words in modules if words[0] == "-m"]


def minutes(words):
    return float(words[words.index("--minutes") + 1])


def test_script_runs_every_part(tmp_path):
    done, calls = run_script(tmp_path, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    modules = ["pytest", "bench.sweep", "bench.norms", "bench.train_step"]
    assert [words[1] for words in calls] == modules
    tests, sweep_part, norms_part, training = calls
    assert tests.index("tests/test_kernels.py") < tests.index("tests/test_modules.py")
    files = {f"tests/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    on_device = {name for name, text in files.items() if re.search(r"\bdevice\b", text)}
    assert on_device == {word for word in tests if word.startswith("tests/")} < set(files)
    assert tests[tests.index("-n") + 1] == "auto"
    # Nothing took time: the norms have all but what the training step is promised, and the training step all of that.
    assert minutes(sweep_part) == pytest.approx((180 - 10) / 60, abs=1e-4)
    assert minutes(norms_part) == pytest.approx((720 - 10 - 180 - 15) / 60, abs=0.1)
    assert minutes(training) == pytest.approx((720 - 10 - 15) / 60, abs=0.1)
    assert "== train_step: ended well" in (tmp_path / "out" / "log.txt").read_text()


def test_script_goes_on_after_failures_and_tells(tmp_path):
    done, calls = run_script(
        tmp_path, str(tmp_path / "out"), "--quick", does={"-m pytest": "exit 1", "bench.norms": "exit 3"}
    )
    assert done.returncode == 1
    assert "tests: STATUS 1" in done.stdout
    assert "norms: STATUS 3" in done.stdout
    assert [words[1] for words in calls[2:]] == ["bench.norms", "bench.train_step"]
    assert sum("--quick" in words for words in calls) == 2
    assert calls[1][1:4] == ["bench.sweep", "--output", str(tmp_path / "out")]
    assert "1024" in calls[1]


def test_script_without_xdist(tmp_path):
    _, calls = run_script(tmp_path, str(tmp_path / "out"), does={"import xdist": "exit 1"})
    assert "-n" not in calls[0]


def test_script_needs_a_gpu(tmp_path):
    done, calls = run_script(tmp_path, str(tmp_path / "out"), does={"torch.cuda": "exit 1"})
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr
    assert not calls


@pytest.mark.parametrize("arguments", [[], ["--quick"], ["out", "--slow"]])
def test_script_refuses_wrong_usage(arguments, tmp_path):
    done, calls = run_script(tmp_path, *arguments)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert not calls


def test_script_ends_with_how_the_parts_ended_and_with_tables(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_step.json").write_text("of an earlier run")
    does = {"-m pytest": "echo 'FAILED tests/test_x.py::test_y - boom'; echo '1 failed, 2 passed in 4.20s'; exit 1"}
    does |= {"bench.norms": f"touch {out}/norms.json", "bench.table": "echo a table"}
    done, calls = run_script(tmp_path, str(out), does=does)
    assert done.returncode == 1
    assert calls[-1] == ["-m", "bench.table", f"{out}/norms.json"]
    summary = (out / "summary.txt").read_text()
    assert done.stdout.endswith(summary)
    first, second, third, *_, last = summary.splitlines()
    assert (first, second, last) == ("FAILED tests/test_x.py::test_y - boom", "1 failed, 2 passed in 4.20s", "a table")
    assert third.startswith("== tests: STATUS 1 after")
    assert "== train_step: ended well" in summary
