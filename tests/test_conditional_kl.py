"""The KL divergence of a conditional layer is that of its last forward, and keeps no graph longer than that."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conditional_layers import CONDITIONS, C, N, assert_same, exactness, gradients, inputs, specified, trained
from torch import nn
from trained_layers import seeded

import klnorm
from klnorm import KLLayerNorm, kl_divergence

# The KL divergence


def later(layer, x, given):
    """A training step, after which the graph of its forward is spent; the options without graphs of their own."""
    (seeded(layer, x, **given).sum() + kl_divergence(layer)).backward()
    return {name: t.detach() for name, t in given.items()}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_value_outlives_the_graph_and_follows_the_parameters(device, condition):
    layer, (x, given) = trained(condition, device), inputs(condition, device=device)
    given = later(layer, x, given)
    close = {"rtol": 1e-6 if device.type == "cuda" else 1e-13, "atol": 0}
    for _ in range(2):
        torch.manual_seed(1)
        value, after = kl_divergence(layer), torch.get_rng_state()
        assert torch.equal(after, torch.manual_seed(1).get_state())  # nothing is drawn for it
        torch.testing.assert_close(value, specified(layer, x, **given)[1], **close)
        with torch.no_grad():  # as an optimizer does
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    value = kl_divergence(layer)
    layer.eval()(torch.randn_like(x), **given)
    assert torch.equal(kl_divergence(layer), value)  # evaluation changes nothing


def test_conditions_that_the_caller_changes_later_are_kept_as_they_were(device):
    layer, (x, given) = trained(C, device), inputs(C, device=device)
    with torch.no_grad():
        layer(x, **given)
        value = kl_divergence(layer)
        given["condition"].zero_()
        assert torch.equal(kl_divergence(layer), value)


@pytest.mark.parametrize("samples", [4, 1])
@pytest.mark.parametrize("differentiate", ["backward", "grad"])
def test_a_gradient_that_would_be_incomplete_raises(device, differentiate, samples):
    layer, (x, given) = trained(device=device), inputs("self", (samples, 5), device)

    def attempt():
        kl = kl_divergence(layer)
        with pytest.raises(
            RuntimeError, match=r"cannot be differentiated any more.*Remedy: call every layer in the forward"
        ):
            kl.backward() if differentiate == "backward" else torch.autograd.grad(kl, layer.posterior_parameters())

    later(layer, x, given)
    attempt()
    with torch.no_grad():
        layer(x, **given)
    attempt()
    with torch.inference_mode():
        layer(x, **given)
    attempt()


def test_without_a_gradient_of_the_conditions_nothing_is_missing(device):
    """Then the value is differentiable later as well, with the whole gradient."""
    layer, (x, given) = trained(C, device), inputs(C, device=device)
    x, given = x.detach(), {"condition": given["condition"].detach()}
    later(layer, x, given)
    found = torch.autograd.grad(kl_divergence(layer), layer.posterior_parameters())
    expected = torch.autograd.grad(specified(layer, x, **given)[1], layer.posterior_parameters())
    assert len(found) == len(list(layer.parameters()))
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 10 * exactness(device))


def test_it_is_that_of_the_last_forward_and_can_be_had_twice(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    first = layer(x, **given)
    earlier = kl_divergence(layer)
    other = torch.randn_like(x)
    second = layer(other)
    expected = specified(layer, other)[1]
    for kl in kl_divergence(layer), layer.kl_divergence():
        torch.testing.assert_close(kl, expected, rtol=1e-6 if device.type == "cuda" else 1e-13, atol=0)
    assert not torch.isclose(earlier, expected)
    assert first.requires_grad
    assert second.requires_grad


def test_it_stays_in_the_graph_without_the_output(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    layer(x, **given)
    found = gradients([kl_divergence(layer)], layer, x)
    expected = gradients([specified(layer, x, **given)[1]], layer, x)
    assert (found["input 0"][given["mask"]] != 0).all()
    assert_same(found, expected, 10 * exactness(device))


def test_models_add_it_to_that_of_other_layers(device):
    model = nn.Sequential(trained(device=device), KLLayerNorm(N, device=device, dtype=torch.float64))
    model(torch.randn(4, 5, N, dtype=torch.float64, device=device))
    parts = [layer.kl_divergence() for layer in model]
    torch.testing.assert_close(kl_divergence(model), sum(parts), rtol=1e-14, atol=0)
    assert list(klnorm.kl_layers(model)) == ["0", "1"]
    assert klnorm.KLWeight(per_parameter=model).value == 1 / (4 * N)


def test_before_a_forward_there_is_none(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    message = r"has no KL divergence yet.*Remedy: call the model in training mode"
    with pytest.raises(ValueError, match=message):
        kl_divergence(layer)
    layer.eval()(x, **given)
    with pytest.raises(ValueError, match=message):
        kl_divergence(layer)
    with klnorm.sampling(layer):
        assert not torch.equal(layer(x, **given), layer(x, **given))
    expected = specified(layer, x, **given)[1]
    torch.testing.assert_close(kl_divergence(layer), expected, rtol=1e-6 if device.type == "cuda" else 1e-13, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_have_no_forward_behind_them(device, duplicate):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    y = seeded(layer, x, **given)
    other = duplicate(layer)
    with pytest.raises(ValueError, match="has no KL divergence yet"):
        kl_divergence(other)
    assert torch.equal(seeded(other, x, **given), y)
    assert torch.equal(kl_divergence(other), kl_divergence(layer))


def test_a_value_that_is_not_finite_is_explained(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    with torch.no_grad():
        layer.condition_up[1, 0, 2] = float("nan")
    layer(x, **given)
    with pytest.raises(ValueError, match=r"condition_up has 1 such value\(s\), the first at index 14"):
        kl_divergence(layer)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("sample_dim", [0, 1])
def test_backward_saves_x_and_nothing_else_of_its_size(device, sample_dim, condition, dtype):
    leading = (4, 256) if sample_dim == 0 else (256, 4)
    layer = trained(condition, device, dtype=torch.float32, sample_dim=sample_dim)
    x, given = inputs(condition, leading, device, dtype, sample_dim)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, **given)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert storages.pop(x.untyped_storage().data_ptr()) == x.numel() * x.element_size()
    # mean and rstd of the operator, 8 bytes a row; the summary's, at most as much, and its mask: 9 more
    assert sum(size for size in storages.values() if size >= 256 * 4) <= (17 if condition == "self" else 8) * 256 * 4


def test_backward_frees_the_graph_that_the_divergence_keeps(device):
    layer = trained(device=device)
    before = nn.Linear(N, N, device=device, dtype=torch.float64)
    hidden = before(torch.randn(4, 5, N, dtype=torch.float64, device=device)).tanh()
    alive = weakref.ref(hidden)
    loss = layer(hidden).sum() + kl_divergence(layer)
    del hidden
    assert alive() is not None
    loss.backward()
    del loss
    gc.collect()
    assert alive() is None
