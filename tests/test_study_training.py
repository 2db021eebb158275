"""The study: training, and what is measured."""

import contextlib
import itertools
import types

import numpy as np
import pytest
import torch
from study_inputs import CLINC, CPU, FSDD, TREC, run_of
from torch import nn

from study import baselines, plan, training
from study.data import Split

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_epoch_has_every_example_once():
    order = training.batch_order(12, 6, 4, 0).flatten()
    for epoch in order.split(12):
        assert sorted(epoch.tolist()) == list(range(12))


class Spy(baselines.LayerNorm):
    """One weight w, 0 at first, under the loss w + w, whose second half is the penalty; notes what every step sees."""

    def __init__(self, lr):
        model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
        nn.init.zeros_(model[0].weight)
        super().__init__(model, {"lr": lr}, 4, 10)
        self.weight, self.batches, self.after, self.rates = model[0].weight, [], [], []

    def loss(self, batch, labels):
        assert self.model.training
        self.batches.append(batch["inputs"][:, 0].tolist())
        return self.weight.sum()

    def penalty(self):
        return self.weight.sum()

    def after_step(self, lr):
        self.after.append(self.weight.item())
        self.gradient = self.weight.grad.item()
        self.rates.append(lr)


def four_examples():
    return Split([torch.tensor([i]) for i in range(4)], torch.zeros(4, dtype=torch.long))


def test_training_warms_up_clips_decays_and_keeps_the_order():
    spy = Spy(0.1)
    training.train(spy, four_examples(), 20, 2, 0.1, seed=3, device=CPU)
    assert spy.batches == training.batch_order(4, 20, 2, 3).tolist()
    # Two steps of warm-up, then down to 1 / 18 of the rate in the last step.
    expected = [0.05, 0.1, *(0.1 * (20 - step) / 18 for step in range(2, 20))]
    np.testing.assert_allclose(spy.rates, expected, rtol=1e-6)
    assert spy.gradient == pytest.approx(training.CLIP, rel=1e-5)
    # AdamW goes down by the rate under a constant gradient, and decays: w <- w (1 - rate * decay) - rate.
    weight, path = 0.0, []
    for rate in expected:
        weight = weight * (1 - rate * baselines.WEIGHT_DECAY) - rate
        path.append(weight)
    np.testing.assert_allclose(spy.after, path, rtol=1e-5)


def test_the_penalty_counts(monkeypatch):
    monkeypatch.setattr(Spy, "penalty", lambda self: -3 * self.weight.sum())
    spy = Spy(0.1)
    training.train(spy, four_examples(), 3, 2, 0.1, seed=3, device=CPU)
    assert spy.after[-1] > 0


def test_training_draws_the_same_whatever_was_drawn_before(monkeypatch):
    monkeypatch.setattr(Spy, "penalty", lambda self: self.weight.sum() * torch.randn(()))
    found = []
    for seed in 1, 1, 2:
        torch.rand(len(found) + 1)
        spy = Spy(0.1)
        training.train(spy, four_examples(), 5, 2, 0.1, seed=seed, device=CPU)
        found.append(spy.after)
    assert found[0] == found[1] != found[2]


# ---- Measures --------------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Logits that a test chose, by the first token."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, inputs, mask):
        return self.logits[inputs[:, 0]]


def test_metrics_by_hand():
    probabilities = torch.tensor([[0.95, 0.05], [0.65, 0.35], [0.25, 0.75], [0.15, 0.85]])
    arm = types.SimpleNamespace(model=Fixed(probabilities.log()))
    inputs = [torch.tensor([i] + [0] * (4 - i)) for i in range(4)]
    metrics = training.evaluate(arm, {"test": Split(inputs, torch.tensor([0, 1, 1, 1]))}, 0, 0, CPU)["test"]
    assert metrics["accuracy"] == 0.75
    assert metrics["nll"] == pytest.approx(-np.log([0.95, 0.35, 0.75, 0.85]).mean())
    assert metrics["mcc"] == pytest.approx((1 * 2 - 0 * 1) / np.sqrt(1 * 3 * 2 * 2))
    assert metrics["ece"] == pytest.approx((0.05 + 0.65 + 0.25 + 0.15) / 4, abs=1e-6)
    assert [n for n, *_ in metrics["bins"]] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_monte_carlo_averages_probabilities_of_all_draws():
    calls = itertools.count()

    class Changing(nn.Module):
        def forward(self, inputs, mask):
            p = 0.9 if next(calls) % 4 == 0 else 0.2
            return torch.tensor([[p, 1 - p]]).log().expand(len(inputs), 2)

    entered = []
    arm = types.SimpleNamespace(model=Changing(), stochastic=lambda: entered.append(1) or contextlib.nullcontext())
    split = Split([torch.tensor([1]), torch.tensor([1])], torch.tensor([0, 0]))
    metrics = training.evaluate(arm, {"test": split}, 8, 0, CPU)["test"]
    assert metrics["nll"] == pytest.approx(-np.log((2 * 0.9 + 6 * 0.2) / 8), rel=1e-5)
    assert entered == [1]


def test_out_of_scope_auroc_is_that_of_confidence():
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.5, 0.0]])
    arm = types.SimpleNamespace(model=Fixed(logits))
    inside = Split([torch.tensor([i]) for i in (0, 1, 2)], torch.tensor([0, 1, 0]))
    outside = Split([torch.tensor([i]) for i in (3, 4)], torch.tensor([-1, -1]))
    found = training.evaluate(arm, {"test": inside, "oos": outside}, 0, 0, CPU)
    assert found["oos"] == {"auroc": pytest.approx(5 / 6)}  # of 3 x 2 pairs one is in the wrong order


def test_a_task_with_examples_out_of_scope_runs(model_folder, data_folder):
    sizes = plan.Sizes("", 2, 150, 20, 2)
    result = run_of(CLINC, "kl_sample", model_folder, data_folder, sizes=sizes)
    assert 0 <= result["metrics"]["mc"]["oos"]["auroc"] <= 1


def test_speech_runs_and_learns(data_folder):
    sizes = plan.Sizes("", 60, 20, 10, 2)
    result = run_of(FSDD, "layer_norm", "", data_folder, sizes=sizes, settings={"lr": 4})
    assert result["metrics"]["mean"]["train"]["nll"] < 0.8 * np.log(10)
    assert set(result["metrics"]["mean"]) == {"train", "test", "ood"}


def test_the_same_configuration_gives_the_same_numbers(model_folder, data_folder):
    one, two = (run_of(TREC, "kl_token", model_folder, data_folder)["metrics"] for _ in range(2))
    assert one == two
    assert one != run_of(TREC, "kl_token", model_folder, data_folder, seed=1)["metrics"]


def test_what_is_counted(model_folder, data_folder):
    plain, ours = (run_of(TREC, arm, model_folder, data_folder) for arm in ("layer_norm", "kl_sample"))
    assert ours["parameters"] - plain["parameters"] == 5 * 2 * 16
    assert [len(numbers) for numbers in ours["layers"].values()] == [3] * 5
    assert plain["layers"] == {}
