"""`klnorm.sampling` and `klnorm.mc_predict`."""

import contextlib
import copy
import itertools
import math
import pickle
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from klnorm import KLLayerNorm, mc_predict, replace_layer_norm, restore_layer_norm, sampling

N = 8


def classifier(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, N), nn.LayerNorm(N), nn.Dropout(0.5), nn.Linear(N, 3))
    return replace_layer_norm(model, init_std=0.5, **options)


def encoder(**options):
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.5, "activation": "gelu", **options}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(N, 2, 16, **options), 2, nn.LayerNorm(N))
    return replace_layer_norm(model, init_std=0.3).eval()


def hooks_of(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@contextlib.contextmanager
def many_switches():
    """Between threads."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def flags(model):
    return {name: module.training for name, module in model.named_modules()}


# sampling


def test_samples_in_evaluation_mode_what_the_seed_says_and_nothing_else():
    model = classifier().eval()
    x = torch.randn(5, 4)
    before, mean = flags(model), model(x)
    with sampling(model) as same:
        assert same is model
        assert flags(model) == before
        torch.manual_seed(1)
        first, second = model(x), model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
    assert not torch.isclose(first, second).any()
    assert torch.equal(model(x), mean)
    # dropout stays off: the same draws through the layers by hand
    torch.manual_seed(1)
    expected = model[3](model[1].train()(model[0](x)))
    assert torch.equal(first, expected)


def test_nests_and_ends_with_an_error():
    model = classifier().eval()
    x = torch.randn(5, 4)
    with sampling(model):
        with sampling(model):
            pass
        assert not torch.equal(model(x), model(x))
        with pytest.raises(KeyError), sampling(model):
            raise KeyError
        assert not torch.equal(model(x), model(x))
    assert torch.equal(model(x), model(x))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("order", list(itertools.permutations("abc")), ids="".join)
def test_blocks_may_end_in_any_order(order):
    model, x = encoder(), torch.randn(3, 5, N)
    parts = {"a": model, "b": model.layers[0], "c": model}
    blocks = {name: sampling(part) for name, part in parts.items()}
    for block in blocks.values():
        block.__enter__()
    for i, name in enumerate(order):
        assert bool(model.use_nested_tensor) == (order[i:] == ("b",))
        assert not torch.equal(model(x), model(x))
        blocks[name].__exit__(None, None, None)
    assert torch.equal(model(x), model(x))
    assert model.use_nested_tensor is True
    assert hooks_of(model) == 0


def test_a_generator_that_is_closed_late_ends_its_block_alone():
    model = classifier().eval()
    x = torch.randn(5, 4)

    def draws():
        with sampling(model):
            while True:
                yield model(x)

    one, two = draws(), draws()
    assert not torch.equal(next(one), next(two))
    one.close()
    assert not torch.equal(model(x), next(two))
    del two  # closed by the garbage collector
    assert torch.equal(model(x), model(x))


def test_threads_that_sample_one_model():
    model, x = encoder(), torch.randn(3, 5, N)
    mean, start, wrong = model(x).detach(), threading.Barrier(8), []

    def use(number):
        start.wait()
        for i in range(20):
            with contextlib.suppress(KeyError), sampling(model.layers[number % 2] if i % 3 else model):
                if torch.equal(model(x), mean):
                    wrong.append((number, i))
                if i % 4 == number % 4:
                    raise KeyError

    with many_switches():
        threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert torch.equal(model(x), mean)
    assert model.use_nested_tensor is True
    assert hooks_of(model) == 0


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_of_a_block_does_not_sample(copy_of):
    model, x = encoder(), torch.randn(3, 5, N)
    mean = model(x)
    with sampling(model):
        copied = copy_of(model)
        assert torch.equal(copied(x), mean)
        with sampling(copied):
            assert not torch.equal(copied(x), copied(x))
        assert torch.equal(copied(x), mean)
        assert not torch.equal(model(x), model(x))
    assert torch.equal(copied(x), mean)
    assert copied.use_nested_tensor is True
    assert hooks_of(copied) == 0


def test_norms_may_be_restored_inside_of_a_block():
    model, x = classifier().eval(), torch.randn(5, 4)
    mean = model(x)
    with sampling(model):
        restore_layer_norm(model)
        assert torch.equal(model(x), mean)
    assert torch.equal(replace_layer_norm(model)(x), mean)


def test_a_compiled_model_samples_inside_of_a_block_alone(fresh_dynamo):
    model, x = classifier().eval(), torch.randn(5, 4)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mean = compiled(x)
    for _ in range(2):
        with sampling(model):
            torch.manual_seed(1)
            found = compiled(x)
            torch.manual_seed(1)
            torch.testing.assert_close(found, model(x))
        assert torch.equal(compiled(x), mean)


def test_part_of_a_model_can_be_sampled():
    model = nn.Sequential(classifier(), nn.LayerNorm(3)).eval()
    replace_layer_norm(model, init_std=0.5)
    x = torch.randn(5, 4)
    with sampling(model[1]):
        torch.manual_seed(1)
        y = model(x)
    torch.manual_seed(1)
    assert torch.equal(y, model[1].train()(model[0](x)))


def test_a_model_without_kl_layers_is_refused():
    with pytest.raises(ValueError, match="no KL layer"), sampling(nn.LayerNorm(N)):
        pass
    with pytest.raises(TypeError, match="model is a list"), sampling([]):
        pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_shortcut_of_a_transformer_encoder_is_taken_for_means_and_not_for_samples(masked, norm_first, monkeypatch):
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))
    model, x = encoder(norm_first=norm_first), torch.randn(3, 5, N)
    padding = torch.arange(5) >= torch.tensor([[5], [4], [2]]) if masked else None
    with torch.no_grad():
        mean = model(x, src_key_padding_mask=padding)
        assert len(calls) == 2
        with sampling(model):
            torch.manual_seed(1)
            y = model(x, src_key_padding_mask=padding)
        assert len(calls) == 2
        assert torch.equal(model(x, src_key_padding_mask=padding), mean)
        assert len(calls) == 4
    # what the modules compute where autograd keeps them from the shortcut
    with sampling(model):
        torch.manual_seed(1)
        expected = model(x, src_key_padding_mask=padding)
    real = ~padding if masked else slice(None)
    torch.testing.assert_close(y[real], expected[real])
    assert not torch.isclose(y[real], mean[real], rtol=1e-3).all(-1).any()


def test_a_norm_left_in_training_mode_is_not_bypassed_either():
    model, x = encoder(norm_first=False), torch.randn(3, 5, N)
    for module in model.modules():
        if isinstance(module, KLLayerNorm):
            module.train()
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = model(x), model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
    assert not torch.isclose(first, second).all(-1).any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_in_training_and_normalized_in_evaluation():
    layer, x = KLLayerNorm(N), torch.nested.nested_tensor([torch.randn(2, N), torch.randn(3, N)])
    with pytest.raises(TypeError, match=r"x is a nested tensor.*klnorm\.sampling"):
        layer(x)
    torch.testing.assert_close(layer.eval()(x).to_padded_tensor(0.0)[1, :3], F.layer_norm(x[1], (N,)))


@pytest.mark.parametrize("copied", [False, True])
def test_the_guard_of_the_shortcut_comes_and_goes_with_sampling(copied):
    model = encoder()
    if copied:
        model = copy.deepcopy(model.train()).eval()
    assert hooks_of(model) == 0
    model.train()
    assert hooks_of(model) == 5
    with sampling(model):
        model.eval()
        assert hooks_of(model) == 5
    assert hooks_of(model) == 0
    restore_layer_norm(model.train())
    assert hooks_of(model) == 0


# mc_predict


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


class Head(nn.Module):
    """A regressor or classifier (batch, 4) -> `shape`, whose first dimension is that of the batch."""

    def __init__(self, shape=(6, 3), **options):
        super().__init__()
        self.body, self.shape = classifier(**options), shape

    def forward(self, x):
        y = self.body(x)
        if self.shape == ():
            return y[0, 0]
        if len(self.shape) == 1:
            return y[:, 0]
        return y[:, : self.shape[1]]


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


# Many draws in one forward


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
