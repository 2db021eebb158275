"""bench.train_step: tiny models on the CPU."""

import json

import pytest

from bench import train_step

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_training_step_smoke(tmp_path):
    assert train_step.main(["--smoke", "--quick", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "train_step.json").read_text())
    assert [r["norm"] for r in result["records"]] == train_step.NORMS
    assert all(r["why"] is None and r["wall_ms"] > 0 for r in result["records"])
    launches = {r["norm"]: r["launches"] for r in result["records"]}
    assert launches["LayerNorm"] < launches["klnorm, sample"] < launches["eager, sample"]


def test_training_step_of_one_line(tmp_path):
    chosen = ["--model", "gpt2", "--norm", "klnorm, token", "--mode", "eager"]
    assert train_step.main(["--smoke", *chosen, "--output", str(tmp_path)]) == 0
    (record,) = json.loads((tmp_path / "train_step.json").read_text())["records"]
    assert (record["model"][:5], record["norm"], record["mode"]) == ("GPT-2", "klnorm, token", "eager")


def test_training_step_without_a_gpu(capsys):
    assert train_step.main([]) == 0
    assert "needs a CUDA GPU" in capsys.readouterr().out
