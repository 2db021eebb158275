"""What the README and the docstrings show, run as it stands there."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from bench import table

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_memory_table_is_that_of_the_result_file(capsys):
    table.main(["bench/results/memory_cpu.json"])
    assert capsys.readouterr().out.strip() in README


def test_example():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    before = [p.clone() for p in model.parameters()]
    x, target = torch.randn(6, 4), torch.randint(3, (6,))
    namespace = {"model": model, "batches": [(x, target)] * 3, "num_examples": 6}
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, namespace)
    assert type(model[1]) is nn.LayerNorm
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("module", ["functional", "kl", "modules", "plots", "predict", "replace", "report", "training", "integrations.transformers", "integrations.lightning"])
def test_docstring_examples(module):
    names = {"torch": torch, "nn": nn, "F": F, "klnorm": klnorm}
    failed, attempted = doctest.testmod(importlib.import_module(f"klnorm.{module}"), extraglobs=names)
    assert attempted > 0
    assert failed == 0
