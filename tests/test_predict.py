"""`klnorm.mc_predict` averages over draws what its likelihood says."""

import itertools
import math
import re
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sampled_models import Head, N, classifier, flags
from torch import nn

import klnorm
from klnorm import KLLayerNorm, mc_predict, restore_layer_norm, sampling


class Fixed(nn.Module):
    """Returns prepared logits, one set a call; the norm is there to be sampled."""

    def __init__(self, *logits):
        super().__init__()
        self.norm, self.logits, self.calls = KLLayerNorm(N), list(logits), 0

    def forward(self, x):
        self.calls += 1
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.logits[self.calls - 1].log()


def test_hand_worked_values():
    # two draws: sure of opposite classes for the first input, equally unsure for the second
    draws = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    model = Fixed(*draws)
    probabilities, entropy, information = mc_predict(model, torch.zeros(2), samples=2)
    assert model.calls == 2
    assert torch.equal(probabilities, torch.full((2, 2), 0.5))
    torch.testing.assert_close(entropy, torch.full((2,), math.log(2)))
    torch.testing.assert_close(information, torch.tensor([math.log(2), 0.0]))


def test_equals_the_average_over_calls_in_sampling():
    model = classifier().train()
    model[2].eval()
    before, x = flags(model), torch.randn(6, 4)
    torch.manual_seed(2)
    prediction = mc_predict(model, x, samples=5)
    assert flags(model) == before
    assert len(model[1]._forward_pre_hooks) == 1  # its guard, as before
    torch.manual_seed(2)
    model.eval()
    with torch.no_grad(), sampling(model):
        p = torch.stack([F.softmax(model(x), -1) for _ in range(5)]).double()
    entropy = lambda q: -(q * q.log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(prediction.probabilities.double(), p.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prediction.entropy.double(), entropy(p.mean(0)), rtol=1e-5, atol=1e-6)
    expected = entropy(p.mean(0)) - entropy(p).mean(0)
    assert (expected > 1e-3).all()
    torch.testing.assert_close(prediction.mutual_information.double(), expected, rtol=1e-4, atol=1e-6)
    assert not prediction.probabilities.requires_grad


def test_predictions_of_threads_may_overlap():
    """The model, in training mode before, stays in evaluation mode until the last one ends, not the first to begin."""
    model, x = classifier(), torch.randn(6, 4)
    model[1].eval()
    before, seen, started, finish = flags(model), [], threading.Event(), threading.Event()

    def look(dropout, args):
        seen.append(dropout.training)
        if threading.current_thread() is first:
            started.set()
            finish.wait(60)
        elif first.is_alive():
            finish.set()
            first.join()

    model[2].register_forward_pre_hook(look)
    first = threading.Thread(target=mc_predict, args=(model, x), kwargs={"samples": 2})
    first.start()
    started.wait(60)
    mc_predict(model, x, samples=3)
    assert seen == [False] * 5
    assert flags(model) == before
    assert torch.equal(model[1](torch.ones(1, N)), model[1](torch.ones(1, N)))


def test_one_draw_has_no_mutual_information():
    assert torch.equal(mc_predict(classifier(), torch.randn(6, 4), samples=1).mutual_information, torch.zeros(6))


def test_takes_every_kind_of_input_and_output():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = classifier()

        def forward(self, x, shift=0.0):
            return SimpleNamespace(logits=self.body(x + shift))

    model, x = Model(), torch.randn(6, 4)
    results = []
    for inputs in (x, 1.0), [x, 1.0], {"x": x, "shift": 1.0}, x + 1.0:
        torch.manual_seed(3)
        results.append(mc_predict(model, inputs, samples=2).probabilities)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_probabilities_are_fp32_or_wider(dtype):
    model = classifier().to(dtype)
    prediction = mc_predict(model, torch.randn(6, 4, dtype=dtype), samples=3)
    assert {t.dtype for t in prediction} == {torch.promote_types(dtype, torch.float32)}
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(6, dtype=prediction.entropy.dtype))


def test_bad_arguments_are_refused():
    x = torch.randn(6, 4)
    for name in "samples", "max_batch":
        for value, error in (0, ValueError), (2.0, TypeError), (True, TypeError), ("a", TypeError):
            with pytest.raises(error, match=f"{name} is "):
                mc_predict(classifier(), x, **{name: value})
    for value, error in ("poisson", ValueError), (None, TypeError), (["gaussian"], TypeError), (x, TypeError):
        with pytest.raises(error, match="likelihood is "):
            mc_predict(classifier(), x, likelihood=value)
    for value in 1.0, "1", None, True, x:
        for likelihood in "categorical", "gaussian":
            with pytest.raises(TypeError, match="class_dim is "):
                mc_predict(classifier(), x, class_dim=value, likelihood=likelihood)
    for value in 2, -3:
        with pytest.raises(ValueError, match=rf"have no dimension {value}"):
            mc_predict(classifier(), x, class_dim=value)
    with pytest.raises(ValueError, match="no KL layer"):
        mc_predict(restore_layer_norm(classifier()), x)
    with pytest.raises(TypeError, match="model is a function"):
        mc_predict(lambda x: x, x)
    model = nn.ModuleList([classifier()]).train()
    model.forward = lambda x: [x]
    with pytest.raises(TypeError, match=r"model returned a list, expected a floating-point tensor of logits.*Remedy"):
        mc_predict(model, x)
    assert all(flags(model).values())


def test_public_names():
    assert klnorm.sampling is sampling
    assert klnorm.mc_predict is mc_predict


# Likelihoods


def test_hand_worked_values_of_decisions():
    """Two draws: sure of opposite answers, equally unsure, equally sure of yes."""
    draws = torch.tensor([[[-200.0, 0.0, 200.0]], [[200.0, 0.0, 200.0]]], dtype=torch.float64)
    model = Fixed(*draws.exp())
    probabilities, entropy, information = mc_predict(model, torch.zeros(1, N), samples=2, likelihood="bernoulli")
    ln2 = math.log(2)
    torch.testing.assert_close(probabilities, draws.new_tensor([[0.5, 0.5, 1.0]]))
    torch.testing.assert_close(entropy, draws.new_tensor([[ln2, ln2, 0.0]]))
    torch.testing.assert_close(information, draws.new_tensor([[ln2, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("shape", "max_batch"), [((), None), *itertools.product([(6, 1), (6,), (6, 3)], [None, 100])], ids=str
)
def test_decisions_are_two_classes_of_which_one_has_the_logit_0(shape, max_batch):
    class TwoClasses(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            logits = self.model(x)
            return torch.stack([torch.zeros_like(logits), logits], -1)

    model, x = Head(shape), torch.randn(6, 4)
    torch.manual_seed(5)
    decisions = mc_predict(model, x, likelihood="bernoulli", max_batch=max_batch)
    torch.manual_seed(5)
    probabilities, entropy, information = mc_predict(TwoClasses(model), x, max_batch=max_batch)
    assert [tuple(t.shape) for t in decisions] == [shape] * 3
    torch.testing.assert_close(decisions.probabilities, probabilities[..., 1])
    torch.testing.assert_close(decisions.entropy, entropy)
    torch.testing.assert_close(decisions.mutual_information, information)


@pytest.mark.parametrize("max_batch", [None, 12, 24, 1000])
@pytest.mark.parametrize("shape", [(6, 3), (6, 1), (6,)], ids=str)
def test_mean_and_variance_over_draws(shape, max_batch):
    model, x, found = Head(shape).double(), torch.randn(6, 4, dtype=torch.float64), []
    model.register_forward_hook(lambda module, args, output: found.extend(output.unflatten(0, (-1, 6))))
    mean, variance = mc_predict(model, x, samples=7, likelihood="gaussian", max_batch=max_batch)
    draws = torch.stack(found)
    assert len(draws) == 7
    assert mean.shape == variance.shape == shape
    torch.testing.assert_close(mean, draws.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(variance, draws.var(0, correction=0), rtol=1e-12, atol=1e-14)
    assert (variance > 0).all()
    assert not mc_predict(model, x, samples=1, likelihood="gaussian").variance.any()


@pytest.mark.parametrize("max_batch", [None, 18])
@pytest.mark.parametrize("class_dim", [1, -3])
def test_the_dimension_of_the_classes(class_dim, max_batch):
    """Of an image, say: (batch, classes, height, width)."""

    class Pixels(Head):
        def forward(self, x):
            return super().forward(x)[:, :, None, None] * torch.tensor([[1.0, 2.0]])

    x, options = torch.randn(6, 4), {"samples": 4, "max_batch": max_batch}
    torch.manual_seed(5)
    pixels = mc_predict(Pixels(), x, class_dim=class_dim, **options)
    torch.manual_seed(5)
    plain = mc_predict(Head(), x, **options)
    assert pixels.probabilities.shape == (6, 3, 1, 2)
    assert pixels.entropy.shape == pixels.mutual_information.shape == (6, 1, 2)
    for found, expected in zip(pixels, plain, strict=True):
        torch.testing.assert_close(found[..., 0, 0], expected)


@pytest.mark.parametrize("shape", [(6, 1), (6,), (), (6, 0)], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_logits_that_can_be_no_classes_are_refused(shape, samples):
    model, x = Head(shape), torch.randn(6, 4)
    with pytest.raises(ValueError, match=rf"logits of shape {re.escape(str(shape))}, .* class_dim=-1\. Remedy") as e:
        mc_predict(model, x, samples=samples)
    for likelihood in "bernoulli", "gaussian":  # what it advises
        assert f"likelihood='{likelihood}'" in str(e.value)
        assert mc_predict(model, x, samples=samples, likelihood=likelihood)[0].shape == shape
    if shape == (6,):
        assert mc_predict(model, x, samples=samples, class_dim=0).entropy.shape == ()


def test_one_input_without_a_batch_may_have_classes():
    model = classifier(noise="batch")
    prediction = mc_predict(model, torch.randn(4), samples=3)
    assert prediction.probabilities.shape == (3,)
    assert prediction.entropy.shape == ()


@pytest.mark.parametrize("max_batch", [None, 10])
def test_an_empty_batch_has_empty_predictions(max_batch):
    options = {"samples": 3, "max_batch": max_batch}
    prediction = mc_predict(classifier(), torch.randn(0, 4), **options)
    assert [tuple(t.shape) for t in prediction] == [(0, 3), (0,), (0,)]
    decisions = mc_predict(classifier(), torch.randn(0, 4), likelihood="bernoulli", **options)
    assert [tuple(t.shape) for t in decisions] == [(0, 3)] * 3
    numbers = mc_predict(classifier(), torch.randn(0, 4), likelihood="gaussian", **options)
    assert [tuple(t.shape) for t in numbers] == [(0, 3)] * 2
