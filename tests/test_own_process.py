"""The marker `own_process`: a test that fails or crashes there leaves the others alone."""

import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import os
import pytest

@pytest.mark.own_process
def test_crashes():
    os.abort()

@pytest.mark.own_process
def test_fails():
    assert 1 == 2

@pytest.mark.own_process
def test_is_elsewhere():
    os.environ["LEFT_BEHIND"] = "1"

def test_survives():
    assert "LEFT_BEHIND" not in os.environ
"""


def test_a_crash_is_one_failure(tmp_path):
    for name in "conftest.py", "native.py":
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert "test_crashes ended with" in done.stdout
    assert "assert 1 == 2" in done.stdout
