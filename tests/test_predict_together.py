"""`klnorm.mc_predict` with max_batch puts many draws through the model together, where they stay independent."""

import threading

import pytest
import torch
from sampled_models import Head, N, classifier, flags, hooks_of, many_switches
from torch import nn

from klnorm import KLLayerNorm, mc_predict, replace_layer_norm, sampling


def tokens(**options):
    """(batch, length, 4) -> (batch, classes), with two layers that sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N), nn.GELU(), nn.Linear(N, N), nn.LayerNorm(N))
    return nn.Sequential(replace_layer_norm(model, init_std=0.5, **options), Pool(), nn.Linear(N, 3))


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


def outputs_of(model, *inputs, **options):
    """The outputs (draws, batch, ...) that mc_predict sees."""
    found, batch = [], len(inputs[0])
    hook = model.register_forward_hook(lambda module, args, output: found.append(output.unflatten(0, (-1, batch))))
    mc_predict(model, inputs, **options)
    hook.remove()
    return found


@pytest.mark.parametrize("noise", ["sample", "token"])
@pytest.mark.parametrize(("max_batch", "sizes"), [(5, [1] * 5), (6, [2, 2, 1]), (11, [3, 2]), (100, [5])])
def test_as_many_draws_as_fit_go_through_the_model_together(noise, max_batch, sizes):
    model, x = tokens(noise=noise), torch.randn(3, 7, 4)
    torch.manual_seed(3)
    found = outputs_of(model, x, samples=5, max_batch=max_batch)
    assert [len(output) for output in found] == sizes
    torch.manual_seed(3)
    prediction = mc_predict(model, x, samples=5, max_batch=max_batch)
    # the model, called by hand with the repeated inputs and the same seed
    torch.manual_seed(3)
    with torch.no_grad(), sampling(model.eval()):
        p = torch.cat([model(torch.cat([x] * size)).unflatten(0, (size, 3)) for size in sizes]).softmax(-1)
    torch.testing.assert_close(prediction.probabilities, p.mean(0))
    assert len({row.numpy().tobytes() for row in torch.cat(found).flatten(0, 1)}) == 15  # no two alike


@pytest.mark.parametrize("noise", ["sample", "token"])
def test_the_first_draw_is_that_of_the_loop(noise):
    """Within a sum's rounding: a matrix product may take its rows in another order."""
    model, x = tokens(noise=noise), torch.randn(3, 7, 4)
    torch.manual_seed(3)
    together = torch.cat(outputs_of(model, x, samples=4, max_batch=100))
    torch.manual_seed(3)
    loop = torch.cat(outputs_of(model, x, samples=4))
    torch.testing.assert_close(together[0], loop[0])
    assert not torch.isclose(together[1:], loop[1:]).any(-1).all()


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_a_batch_that_fits_once_is_the_loop(noise):
    model, x = tokens(noise=noise), torch.randn(3, 7, 4)
    results = []
    for max_batch in None, 1, 5:
        torch.manual_seed(3)
        results.append(mc_predict(model, x, samples=4, max_batch=max_batch))
    for result in results[1:]:
        assert all(torch.equal(found, expected) for found, expected in zip(result, results[0], strict=True))


@pytest.mark.parametrize("noise", ["sample", "token"])
def test_draws_together_have_the_distribution_of_the_loop(noise):
    model, x, samples = tokens(noise=noise).double(), torch.randn(2, 3, 4, dtype=torch.float64), 1000
    loop = torch.cat(outputs_of(model, x, samples=samples))
    together = torch.cat(outputs_of(model, x, samples=samples, max_batch=16))
    assert loop.shape == together.shape == (samples, 2, 3)
    deviation = loop.std(0)
    # five standard errors of a difference of means, and of a ratio of variances
    assert ((loop.mean(0) - together.mean(0)).abs() < 5 * deviation * (2 / samples) ** 0.5).all()
    assert ((together.std(0) / deviation - 1).abs() < 5 * (1 / samples) ** 0.5).all()
    # Draws of one forward are independent: so are inputs of one forward, as in the loop.
    neighbours = (together - together.mean(0)) / together.std(0)
    assert ((neighbours[:-1] * neighbours[1:]).mean(0).abs() < 5 / samples**0.5).all()
    assert ((neighbours[:, 0] * neighbours[:, 1]).mean(0).abs() < 5 / samples**0.5).all()


def test_every_tensor_of_the_batch_is_repeated_and_no_other():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.seen = classifier(), []

        def forward(self, x, pair, scale, table=None, flag=None):
            self.seen.append([tuple(t.shape) for t in (x, *pair, scale, table["ids"])] + [flag])
            return self.body(x * scale + pair[0][:, None] + table["ids"].sum(0) + pair[1])

    x, model = torch.randn(6, 4), Model()
    inputs = {
        "x": x, "pair": (torch.randn(6), torch.randn(4)), "scale": torch.tensor(2.0),
        "table": {"ids": torch.randn(1, 4)}, "flag": "a",
    }  # fmt: skip
    mc_predict(model, inputs, samples=2, max_batch=12)
    assert model.seen == [[(12, 4), (12,), (4,), (), (1, 4), "a"]]


class TimeFirst(nn.Module):
    def __init__(self, sample_dim):
        super().__init__()
        self.norm, self.head = KLLayerNorm(4, sample_dim=sample_dim, init_std=0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(x.transpose(0, 1)).mean(0))


def test_a_layer_may_count_inputs_in_another_dimension():
    assert mc_predict(TimeFirst(1), torch.randn(3, 7, 4), samples=4, max_batch=12).probabilities.shape == (3, 3)


class Shared(nn.Module):
    """A norm of something that the inputs share."""

    def __init__(self, noise):
        super().__init__()
        self.norm, self.table, self.head = KLLayerNorm(4, noise=noise), nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(x=self.table).mean(0) + x.mean(1))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (tokens(noise="batch"), "0.1"), (TimeFirst(0), "norm"), (Shared("sample"), "norm"), (Shared("token"), "norm"),
        (nn.Sequential(KLLayerNorm(4, sample_dim=1), Pool()), "0"),
    ],
    ids=["batch", "time first", "shared by samples", "shared by tokens", "another dimension"],
)  # fmt: skip
def test_layers_in_which_repeated_inputs_would_share_a_draw_are_refused(model, name):
    x, hooks, before = torch.randn(3, 7, 4), hooks_of(model), flags(model)
    with pytest.raises(ValueError, match=rf"layer '{name}' with noise=.* for 12 inputs .*Remedy: leave out max_batch"):
        mc_predict(model, x, samples=4, max_batch=12)
    assert flags(model) == before
    assert hooks_of(model) == hooks
    assert mc_predict(model, x, samples=4).entropy.shape == (3,)


def test_predictions_of_threads_with_and_without_max_batch():
    model, x, errors = tokens(), torch.randn(3, 7, 4), []

    def use(max_batch):
        try:
            for _ in range(10):
                mc_predict(model, x, samples=4, max_batch=max_batch)
        except Exception as error:
            errors.append(error)

    with many_switches():
        threads = [threading.Thread(target=use, args=(max_batch,)) for max_batch in (None, 6, 12, None, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert hooks_of(model.eval()) == 0


def test_a_compiled_model_takes_many_draws_at_once(fresh_dynamo):
    model, x = tokens(), torch.randn(3, 7, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    results = []
    for function in model, compiled:
        for max_batch in 6, 12, 6:
            torch.manual_seed(3)
            results.append(mc_predict(function, x, samples=4, max_batch=max_batch))
    for found, expected in zip(results[3:], results[:3], strict=True):
        torch.testing.assert_close(found, expected)


def test_inputs_and_outputs_that_do_not_count_a_batch_are_refused():
    class Mean(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean(0, keepdim=True)

    class Number(nn.Sequential):
        def forward(self, x):
            return super().forward(torch.full((1, 4), x))

    model, x = Mean(classifier()), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"output of shape \(1, 3\) for 18 inputs.*Remedy: leave out max_batch"):
        mc_predict(model, x, samples=3, max_batch=100)
    assert mc_predict(model, x, samples=3).entropy.shape == (1,)
    model = Number(classifier())
    with pytest.raises(ValueError, match=r"no input is a tensor with a dimension.*Remedy: leave out max_batch"):
        mc_predict(model, (1.0,), max_batch=100)
    assert mc_predict(model, [1.0]).entropy.shape == (1,)
    with pytest.raises(ValueError, match=r"have the batch there.*class_dim=0"):
        mc_predict(Head(), torch.randn(6, 4), max_batch=100, class_dim=0)
