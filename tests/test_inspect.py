"""`python -m bench.inspect --check`: what is past the budget is said."""

import pytest

from bench import inspect, report

ROW = {
    "n": 1024, "dtype": "bf16", "mode": "shared", "kind": "forward", "arch": "sm_90", "spilled": 0, "shared": 0,
    "total": 12.5, "widths": {4: 2, 16: 24},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 2048}, "2048 bytes of shared memory, budget 64"),
        ({"total": 13.0}, "13.0 instructions per element, budget 12.6"),
        ({"widths": {1: 4, 16: 24}}, "accesses of {1: 4, 16: 24}"),
        ({"widths": {4: 9, 16: 24}}, "accesses of {4: 9, 16: 24}"),
    ],
)
def test_what_is_past_the_budget(change, message):
    (found,) = inspect.check([ROW | change])
    assert found.startswith("forward shared N=1024 bf16 sm_90: ")
    assert message in found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mode": "eval"},
        {"n": 1000, "total": 99.0},  # no budget of instructions
        {"n": 256, "shared": 2048},
        {"kind": "backward", "shared": 8192, "total": 20.0},
        {"kind": "finalize", "total": None, "widths": {}},
        {"mode": "token, residual", "total": 29.0},
    ],
)
def test_what_is_within(change):
    assert list(inspect.check([ROW | change])) == []


def test_the_budget_holds_for_one_triton_alone(monkeypatch, capsys, tmp_path):
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\ntriton==1.2.3\n")
    monkeypatch.setattr(inspect, "ROOT", tmp_path)
    monkeypatch.setattr(inspect, "inspect", None)  # nothing is compiled
    assert inspect.main(["--check"]) == 0
    version = inspect.triton.__version__
    assert capsys.readouterr().out == f"not checked: the budget holds for Triton 1.2.3 alone, and this is {version}\n"


def test_the_pinned_triton_is_that_of_the_constraints():
    assert f"triton=={inspect.pinned_triton()}\n" in (report.ROOT / "constraints.txt").read_text()
