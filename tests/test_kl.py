"""`klnorm.kl_divergence`: its value, its gradient, where it comes from, and that it keeps nothing alive."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as divergence_of
from torch.utils.checkpoint import checkpoint

import klnorm
from klnorm import KLLayerNorm, functional, kl_divergence, kl_layers

N = 6
RHO_OF_ONE = math.log(math.e - 1)  # softplus of it is 1


def small_model(device, dtype=torch.float64, following=nn.Linear, **options):
    """Linear, KL-Norm, and a layer that does (nn.Linear) or does not (nn.Dropout) save its input; random posteriors."""
    last = following(N, 3) if following is nn.Linear else following()
    model = nn.Sequential(nn.Linear(4, N), KLLayerNorm(N, prior_std=0.4, **options), last).to(device, dtype)
    with torch.no_grad():
        for t in (*model[1].parameters(), *model[1].buffers()):
            t.add_(torch.randn_like(t) * 0.3)
    return model


def batch(device, dtype=torch.float64):
    return torch.randn(5, 4, device=device, dtype=dtype)


def by_distributions(*layers):
    """The KL divergence of layers according to torch.distributions, differentiable, in fp64."""
    total = 0
    for layer in layers:
        for name in "weight", "bias":
            mean, rho, prior = (getattr(layer, name + suffix) for suffix in ("", "_rho", "_prior"))
            if mean is not None:
                s = nn.functional.softplus(rho.double())
                prior = Normal(prior.double(), torch.full_like(s, layer.prior_std))
                total = total + divergence_of(Normal(mean.double(), s), prior).sum()
    return total


def gradients_of(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {name: grad for (name, _), grad in zip(model.named_parameters(), found, strict=True)}


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name in found:
        if found[name] is None or expected[name] is None:
            assert not any(g is not None and g.any() for g in (found[name], expected[name])), name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def is_attached(kl):
    """Whether the graph of `kl` leads to a layer's forward."""
    nodes = [kl.grad_fn]
    while nodes:
        node = nodes.pop()
        if node.name() == "KLNormFunctionBackward":
            return True
        nodes += [child for child, _ in node.next_functions if child is not None]
    return False


# Value


def test_hand_worked_value(device):
    layer = KLLayerNorm(2, prior_std=2.0, device=device)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 4.0]))
        layer.bias.copy_(torch.tensor([1.0, -1.0]))
        layer.weight_rho.fill_(RHO_OF_ONE)
        layer.bias_rho.fill_(RHO_OF_ONE)
    # deviation 1, prior deviation 2; distances from the prior means 1, 3 and 1, -1
    by_hand = 4 * math.log(2) + (4 + 1 + 9 + 1 + 1) / 8 - 4 / 2
    assert kl_divergence(layer).item() == pytest.approx(by_hand, rel=1e-6)
    assert layer.kl_divergence().item() == pytest.approx(by_hand, rel=1e-6)
    y = layer(torch.randn(3, 2, device=device))
    assert is_attached(kl_divergence(layer))
    assert kl_divergence(layer).item() == pytest.approx(by_hand, rel=1e-6)
    assert y.requires_grad


def test_posterior_equal_to_the_prior_is_at_divergence_zero(device):
    layer = KLLayerNorm(N, init_std=0.3, prior_std=0.3, device=device, dtype=torch.float64)
    assert abs(kl_divergence(layer).item()) < 1e-14
    for grad in torch.autograd.grad(kl_divergence(layer), list(layer.parameters())):
        assert grad.abs().max() < 1e-14


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_agrees_with_torch_distributions(device, attached, bias):
    model = small_model(device, bias=bias)
    y = model(batch(device)) if attached else None
    kl = kl_divergence(model)
    assert is_attached(kl) == attached
    assert kl.shape == ()
    expected = by_distributions(model[1])
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    assert_same(gradients_of(1.7 * kl, model), gradients_of(1.7 * expected, model))
    assert y is None or y.requires_grad


def test_sums_over_layers_of_any_depth_and_dtype(device):
    model = nn.ModuleDict(
        {
            "a": KLLayerNorm(N, init_std=0.2, device=device),
            "b": nn.Sequential(nn.ReLU(), KLLayerNorm(3, dtype=torch.float64, bias=False, device=device)),
            "c": nn.ModuleList([KLLayerNorm(2, dtype=torch.bfloat16, prior_std=0.7, device=device)]),
        }
    )
    expected = by_distributions(model["a"], model["b"][1], model["c"][0])
    torch.testing.assert_close(kl_divergence(model).double(), expected, rtol=1e-6, atol=0)
    assert all(grad.any() for name, grad in gradients_of(kl_divergence(model), model).items() if "rho" in name)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(), nn.LayerNorm(3), nn.ReLU()], ids=repr)
def test_a_model_without_kl_layers_has_a_kl_of_zero(device, model):
    model.to(device)
    kl = kl_divergence(model)
    assert kl.shape == ()
    assert kl.item() == 0
    loss = torch.full((), 2.5, device=device, requires_grad=True) * 1
    (loss + kl / 10).backward()
    assert (loss + 0 * kl).item() == 2.5
    if next(model.parameters(), None) is not None:
        assert kl.device == next(model.parameters()).device


@pytest.mark.parametrize("model", [None, 3, [nn.LayerNorm(3)], torch.zeros(3)], ids=["None", "int", "list", "tensor"])
def test_a_model_that_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, expected an nn\.Module"):
        kl_divergence(model)


@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_bfloat16_parameters_are_taken_as_they_are_and_summed_in_fp32(device, attached):
    model = small_model(device, torch.bfloat16)
    y = model(batch(device, torch.bfloat16)) if attached else None
    kl = kl_divergence(model)
    assert is_attached(kl) == attached
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), by_distributions(model[1]), rtol=1e-5, atol=0)
    expected = gradients_of(by_distributions(copied := copy.deepcopy(model)[1].double()), copied)
    for name, grad in gradients_of(kl, model[1]).items():
        assert grad.dtype == torch.bfloat16
        # rounded once to 8 bits
        torch.testing.assert_close(grad.double(), expected[name], rtol=2**-8, atol=1e-5)
    assert y is None or y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_a_vanishing_deviation_has_an_exact_finite_kl_and_gradient(device, attached, dtype):
    layer = KLLayerNorm(N, device=device, dtype=dtype, prior_std=0.5)
    with torch.no_grad():
        layer.weight_rho.fill_(-200.0)  # softplus underflows in fp32; its logarithm is -200
        layer.bias_rho.fill_(-200.0)
        layer.weight.fill_(1.5)
    y = layer(torch.randn(3, N, device=device, dtype=dtype)) if attached else None
    kl = kl_divergence(layer)
    assert is_attached(kl) == attached
    # log(1/2) + 200 - 1/2 for each, and 0.5^2 / (2 * 0.5^2) for every scale
    assert kl.item() == pytest.approx(N * (2 * (math.log(0.5) + 200 - 0.5) + 0.5), rel=1e-6)
    weight, bias, weight_rho, bias_rho = torch.autograd.grad(
        kl, [layer.weight, layer.bias, layer.weight_rho, layer.bias_rho]
    )
    assert weight.tolist() == [2.0] * N
    assert bias.tolist() == [0.0] * N
    assert weight_rho.tolist() == bias_rho.tolist() == [-1.0] * N
    assert y is None or y.isfinite().all()


@pytest.mark.parametrize("rho", [-60.0, -40.0, -39.99, -20.0, 0.0, 15.0, 60.0])
@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_deviations_of_every_size(device, attached, rho):
    layer = KLLayerNorm(N, device=device, dtype=torch.float32, prior_std=0.5)
    with torch.no_grad():
        layer.weight_rho.fill_(rho)
    y = layer(torch.randn(3, N, device=device)) if attached else None
    exact = copy.deepcopy(layer).double()
    kl, expected = kl_divergence(layer), by_distributions(exact)
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
    (grad,) = torch.autograd.grad(kl, layer.weight_rho)
    (expected,) = torch.autograd.grad(expected, exact.weight_rho)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=0)
    assert y is None or y.requires_grad


# Not finite


@pytest.mark.parametrize("parameter", ["weight", "bias", "weight_rho", "bias_rho", "weight_prior", "bias_prior"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("forward", [False, True])
def test_a_tensor_that_is_not_finite_is_named_with_its_layer(device, forward, value, parameter):
    model = nn.Sequential(KLLayerNorm(N), nn.ModuleDict({"norm": KLLayerNorm(N)})).to(device)
    layer = model[1]["norm"]
    with torch.no_grad():
        getattr(layer, parameter)[3] = value
    y = layer(torch.randn(2, N, device=device)) if forward else None
    with pytest.raises(ValueError, match=rf"layer '1\.norm' is (nan|inf): {parameter} has 1 .* index 3.*Remedy"):
        kl_divergence(model)
    for kl_of_layer in layer.kl_divergence, lambda **options: kl_divergence(layer, **options):
        with pytest.raises(ValueError, match=rf"layer '\(the model itself\)' is (nan|inf): {parameter} has 1"):
            kl_of_layer()
        assert not kl_of_layer(check_finite=False).isfinite()
    assert not kl_divergence(model, check_finite=False).isfinite()
    assert math.isfinite(kl_divergence(model[0]).item())
    assert y is None or y.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prior_that_is_not_finite_is_named_by_the_functional_forms(value):
    x, scale, prior = torch.randn(2, N), torch.ones(N), torch.zeros(N)
    prior[3] = value
    explained = r"divergence is (nan|inf): {} has 1 such value\(s\), the first at index 3"
    for name in "weight_prior", "bias_prior":
        with pytest.raises(ValueError, match=explained.format(name)):
            functional.kl_layer_norm(x, N, scale, scale, scale, scale, **{name: prior})
    with pytest.raises(ValueError, match=explained.format("weight_prior")):
        functional.kl_rms_norm(x, N, scale, scale, weight_prior=prior)


def test_overflow_of_finite_parameters_is_explained(device):
    layer = KLLayerNorm(N, device=device)
    with torch.no_grad():
        layer.weight_rho.fill_(1e30)
    with pytest.raises(
        ValueError, match="every parameter and prior mean is finite, so a squared deviation or distance overflowed"
    ):
        kl_divergence(layer)


# Shared layers


class Twice(nn.Module):
    """One layer, used twice in a forward and registered under two names."""

    def __init__(self, device):
        super().__init__()
        self.first = KLLayerNorm(N, device=device, dtype=torch.float64, init_std=0.3)
        self.linear = nn.Linear(N, N, device=device, dtype=torch.float64)
        self.second = self.first
        self.head = nn.Linear(N, 3, device=device, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.second(self.linear(self.first(x))))


@pytest.mark.parametrize("attached", [False, True], ids=["closed_form", "attached"])
def test_a_shared_layer_counts_once(device, attached):
    model = Twice(device)
    y = model(torch.randn(4, N, device=device, dtype=torch.float64)) if attached else None
    kl, expected = kl_divergence(model), by_distributions(model.first)
    assert is_attached(kl) == attached
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    assert_same(gradients_of(kl, model), gradients_of(expected, model))
    data, both = gradients_of(y.sum(), model) if attached else None, None
    if attached:
        both = gradients_of(y.sum() + kl_divergence(model), model)
        expected = gradients_of(expected, model)
        assert_same(
            both, {name: grad if expected[name] is None else grad + expected[name] for name, grad in data.items()}
        )


def test_layers_with_the_same_parameters_count_once(device):
    model = nn.Sequential(KLLayerNorm(N, device=device), KLLayerNorm(N, device=device))
    apart = kl_divergence(model)
    for name in "weight", "bias", "weight_rho", "bias_rho":
        setattr(model[1], name, getattr(model[0], name))
    torch.testing.assert_close(kl_divergence(model), apart / 2)


# Which layers


def test_kl_layers_in_order_and_once(device):
    model = nn.ModuleDict({"a": Twice(device), "b": nn.Sequential(nn.LayerNorm(N), KLLayerNorm(N, device=device))})
    model["c"] = model["b"]
    found = kl_layers(model)
    assert list(found) == ["a.first", "b.1"]
    assert found["a.first"] is model["a"].second
    assert found["b.1"] is model["b"][1]
    layer = KLLayerNorm(N)
    assert kl_layers(layer) == {"": layer}
    assert kl_layers(nn.LayerNorm(N)) == {}


def test_kl_layers_survive_a_module_that_holds_its_owner(device):
    model = small_model(device)
    model[0].register_module("owner", model)
    assert list(kl_layers(model)) == ["1"]


def test_kl_layers_of_a_compiled_model_are_the_layers_themselves(device):
    """torch.compile's module passes attributes through, and is no layer for that."""
    layer = KLLayerNorm(N, device=device)
    assert kl_layers(torch.compile(layer, backend="eager")) == {"_orig_mod": layer}


@pytest.mark.parametrize("model", [None, [nn.LayerNorm(3)]], ids=["None", "list"])
def test_kl_layers_of_what_is_no_module_are_refused(model):
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, expected an nn\.Module"):
        kl_layers(model)


# The last forward, or the closed form


def closed_form(model):
    """(value, gradients) that `kl_divergence` must have, whatever happened before."""
    expected = by_distributions(*(m for m in model.modules() if isinstance(m, KLLayerNorm)))
    return expected.detach(), gradients_of(expected, model)


def assert_exact(model, attached):
    """`kl_divergence` has the right value and gradient, from where it should; what was attached is spent by that."""
    kl = kl_divergence(model)
    assert is_attached(kl) == attached
    value, grads = closed_form(model)
    torch.testing.assert_close(kl.detach(), value, rtol=1e-12, atol=1e-12)
    assert_same(gradients_of(kl, model), grads)


def test_the_last_forward_is_used_while_a_following_layer_keeps_the_output(device):
    model = small_model(device)
    assert_exact(model, attached=False)
    loss = model(batch(device)).square().sum()
    kl = kl_divergence(model)
    assert is_attached(kl)
    data, kl_grads = gradients_of(loss, model), closed_form(model)[1]
    (loss + 0.1 * kl).backward()
    by_hand = {name: grad + (0 if kl_grads[name] is None else 0.1 * kl_grads[name]) for name, grad in data.items()}
    assert_same({name: p.grad for name, p in model.named_parameters()}, by_hand)
    assert_exact(model, attached=False)  # that graph is spent


def test_the_last_forward_is_used_for_inputs_of_any_dimension(device):
    """A linear layer saves of (2, 5, 4) not that tensor but a view of it, which must keep that tensor."""
    model = small_model(device)
    loss = model(torch.stack([batch(device), batch(device)])).square().sum()
    assert_exact(model, attached=True)
    assert loss.requires_grad


def test_value_and_gradient_of_the_last_forward(device):
    model = small_model(device)
    y = model(batch(device))
    assert_exact(model, attached=True)
    assert y.requires_grad


def test_an_output_that_nobody_keeps_has_its_kl_all_the_same(device):
    model = small_model(device, following=nn.Dropout)  # which saves its mask alone
    loss = model(batch(device)).square().sum()
    assert_exact(model, attached=True)
    (loss + kl_divergence(model)).backward()
    assert_exact(model, attached=False)


def test_the_kl_can_be_taken_again_while_somebody_holds_it(device):
    model = small_model(device)
    y = model(batch(device))
    loss = y.square().sum() + kl_divergence(model)
    for _ in range(2):
        assert is_attached(kl_divergence(model))
    assert_exact(model, attached=True)  # which differentiates it
    del loss
    assert_exact(model, attached=False)
    with torch.no_grad():
        model(batch(device))


def test_looking_without_gradients_does_not_take_the_kl(device):
    model = small_model(device)
    y = model(batch(device))
    with torch.no_grad():
        value = kl_divergence(model)
    torch.testing.assert_close(value, closed_form(model)[0], rtol=1e-12, atol=0)
    assert_exact(model, attached=True)
    assert y.requires_grad


@pytest.mark.parametrize(
    "change",
    [nn.ReLU(inplace=True), lambda y: y.mul_(2), lambda y: y.to(torch.float32), lambda y: y[:1] * 2],
    ids=["relu_in_place", "mul_in_place", "cast", "part"],
)
def test_what_becomes_of_the_output_does_not_matter(device, change):
    model = small_model(device)
    x = batch(device)

    def data_loss():
        torch.manual_seed(1)
        return change(model[1](model[0](x))).sum()

    data, kl_grads = gradients_of(data_loss(), model), closed_form(model)[1]
    loss = data_loss()
    kl = kl_divergence(model)
    assert is_attached(kl)
    both = gradients_of(loss + kl, model)
    for name, grad in both.items():
        expected = [g for g in (data[name], kl_grads[name]) if g is not None]
        assert (grad is None) == (not expected)
        # one of the changes rounds to fp32, the same way both times
        torch.testing.assert_close(grad, sum(expected) if expected else None, rtol=1e-12, atol=1e-12)


def test_each_forward_replaces_the_one_before(device):
    model = small_model(device)
    first = model(batch(device))
    before = kl_divergence(model)
    with torch.no_grad():
        model[1].weight.add_(0.5)
    model(batch(device))
    with torch.no_grad():
        assert kl_divergence(model) != before
    assert_exact(model, attached=True)
    assert_exact(model, attached=False)  # that one has been taken and dropped
    assert first.requires_grad


@pytest.mark.parametrize("retain", [False, True])
def test_after_backward(device, retain):
    model = small_model(device)
    loss = model(batch(device)).square().sum()
    assert is_attached(kl_divergence(model))
    loss.backward(retain_graph=retain)
    assert_exact(model, attached=False)
    kl_divergence(model).backward()
    kl_divergence(model).backward()


def test_after_a_backward_of_the_kl_alone(device):
    model = small_model(device)
    loss = model(batch(device)).square().sum()
    assert is_attached(kl_divergence(model))
    torch.autograd.grad(kl_divergence(model), list(model[1].parameters()))
    assert_exact(model, attached=False)
    assert loss.requires_grad


def test_after_an_optimizer_step_it_has_the_new_values(device):
    model = small_model(device)
    for optimizer in torch.optim.SGD(model.parameters(), 0.1), torch.optim.AdamW(model.parameters(), 0.1):
        before = kl_divergence(model).item()
        loss = model(batch(device)).square().sum() + kl_divergence(model)
        loss.backward()
        optimizer.step()
        assert_exact(model, attached=False)
        assert abs(kl_divergence(model).item() - before) > 1e-3


@pytest.mark.parametrize("name", ["weight", "bias", "weight_rho", "bias_rho", "weight_prior", "bias_prior"])
def test_a_change_between_forward_and_kl_is_seen(device, name):
    model = small_model(device)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    with torch.no_grad():
        getattr(model[1], name).add_(0.5)
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_a_new_prior_deviation_between_forward_and_kl_is_seen(device):
    model = small_model(device)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    model[1].prior_std = 1.5
    assert_exact(model, attached=False)
    assert y.requires_grad


def lookalike(parameter):
    """Another parameter, of other values, that has been changed in place as often."""
    other = parameter.detach() + 0.5
    while other._version < parameter._version:
        other.add_(0.1)
    return nn.Parameter(other)


def test_replaced_parameters_between_forward_and_kl_are_seen(device):
    model = small_model(device)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    for name, p in list(model[1].named_parameters()):
        setattr(model[1], name, lookalike(p))
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_a_forward_without_gradients_leaves_nothing_attached(device):
    model = small_model(device)
    with torch.no_grad():
        y = model(batch(device))
    assert_exact(model, attached=False)
    y = model(batch(device))
    assert is_attached(kl_divergence(model))
    with torch.no_grad():
        quiet = model[1](y.new_ones(3, N))
    assert_exact(model, attached=False)
    assert not quiet.requires_grad
    with torch.no_grad():
        assert not kl_divergence(model).requires_grad


def test_a_forward_in_inference_mode(device):
    model = small_model(device)
    with torch.inference_mode():
        y = model(batch(device))
        value = kl_divergence(model)
    torch.testing.assert_close(value.clone(), closed_form(model)[0], rtol=1e-12, atol=0)
    assert_exact(model, attached=False)
    assert y.is_inference()


def test_evaluation_has_the_same_kl(device):
    model = small_model(device).eval()
    y = model(batch(device))
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_frozen_layers_still_count(device):
    model = small_model(device)
    expected = kl_divergence(model).item()
    model[1].requires_grad_(False)
    y = model(batch(device))
    assert kl_divergence(model).item() == pytest.approx(expected, rel=1e-12)
    assert y.requires_grad


def test_kl_of_a_graph_freed_below_the_layer_raises(device):
    """The documented limit of sharing a node with y: autograd's own error, never a wrong gradient."""
    model = small_model(device)
    hidden = model[0](batch(device))
    y = model[1](hidden)
    hidden.square().sum().backward()  # an auxiliary loss, which frees the graph below the layer
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        kl_divergence(model).backward()
    assert y.requires_grad


class WithKL(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), kl_divergence(self.model)


def test_functional_call_with_other_parameters(device):
    model, x = small_model(device), batch(device)
    others = {name: lookalike(p) for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, others, (x,))
    assert_exact(model, attached=False)  # its own parameters, not those of the call
    prefixed = {f"model.{name}": p for name, p in others.items()}
    y, kl = torch.func.functional_call(WithKL(model), prefixed, (x,))
    moved = copy.deepcopy(model)
    moved.load_state_dict({**model.state_dict(), **others})
    value, grads = closed_form(moved)
    torch.testing.assert_close(kl.detach(), value, rtol=1e-12, atol=0)
    found = torch.autograd.grad(kl, list(others.values()), allow_unused=True)
    assert_same(dict(zip(others, found, strict=True)), grads)
    assert_exact(model, attached=False)
    assert y.requires_grad


def test_functional_call_with_another_prior(device):
    model, x = small_model(device), batch(device)
    y = torch.func.functional_call(model, {"1.weight_prior": model[1].weight_prior + 0.5}, (x,))
    assert_exact(model, attached=False)
    assert y.requires_grad


# Accumulation and checkpointing


def test_gradient_accumulation_adds_the_kl_of_every_part(device):
    model = small_model(device)
    parts = [batch(device) for _ in range(4)]
    by_hand = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    kl_grads = closed_form(model)[1]
    for i, part in enumerate(parts):
        torch.manual_seed(i)
        for name, grad in gradients_of(model(part).square().sum(), model).items():
            by_hand[name] += grad + (0 if kl_grads[name] is None else 0.1 * kl_grads[name])
    for i, part in enumerate(parts):
        torch.manual_seed(i)
        (model(part).square().sum() + 0.1 * kl_divergence(model)).backward()
    assert_same({name: p.grad for name, p in model.named_parameters()}, by_hand)


def test_all_forwards_before_one_backward(device):
    model = small_model(device)
    parts = [batch(device) for _ in range(4)]
    kl_grads, by_hand = closed_form(model)[1], None
    torch.manual_seed(1)
    by_hand = gradients_of(sum(model(part).square().sum() for part in parts), model)
    torch.manual_seed(1)
    loss = sum(model(part).square().sum() for part in parts) + kl_divergence(model)
    loss.backward()
    expected = {name: grad + (0 if kl_grads[name] is None else kl_grads[name]) for name, grad in by_hand.items()}
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)


class Checkpointed(nn.Module):
    """Linear, then a block with a KL-Norm at its start, in its middle or at its end, checkpointed or not."""

    def __init__(self, device, place, reentrant):
        super().__init__()
        block = [nn.Linear(N, N), nn.GELU(), nn.Dropout(0.3)]
        block.insert(place, KLLayerNorm(N, init_std=0.3))
        self.stem, self.block, self.head = nn.Linear(4, N), nn.Sequential(*block), nn.Linear(N, 3)
        self.to(device, torch.float64)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.stem(x)
        if self.reentrant is None:
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("place", [0, 1, 3], ids=["first", "middle", "last"])
def test_activation_checkpointing_changes_no_gradient(device, place, reentrant):
    plain = Checkpointed(device, place, None)
    model = Checkpointed(device, place, reentrant)
    model.load_state_dict(plain.state_dict())
    x = batch(device)

    def train(model, kl_after_backward=False):
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(x).square().sum()
        if kl_after_backward:
            loss.backward()
            (0.1 * kl_divergence(model)).backward()
        else:
            (loss + 0.1 * kl_divergence(model)).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = train(plain)
    assert (expected[f"block.{place}.weight_rho"] != 0).all()
    for _ in range(2):  # a second step meets what the first one left
        assert_same(train(model), expected)
        assert_same(train(model, kl_after_backward=True), expected)
    assert_exact(model, attached=False)


# Nothing old is kept alive


class Box:
    """What a graph saves, in a Python object that a weak reference can watch."""

    def __init__(self, tensor):
        self.tensor = tensor


def watched_forward(model, x):
    """(output, weak references to all that the graph saved)."""
    boxes = []

    def pack(tensor):
        box = Box(tensor)
        boxes.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        return model(x), boxes


def alive(references):
    return sum(reference() is not None for reference in references)


@pytest.fixture
def no_collector():
    """Garbage collection switched off: what is freed is freed by counting references, without cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("following", [nn.Linear, nn.Dropout])
def test_a_graph_whose_kl_was_taken_is_freed_with_it(device, following):
    model = small_model(device, following=following)
    y, saved = watched_forward(model, batch(device))
    kl = kl_divergence(model)
    assert alive(saved) == len(saved) > 5
    del y
    assert alive(saved)  # the KL itself is somebody's
    del kl
    assert alive(saved) == 0
    assert_exact(model, attached=False)


def _forward_without_gradients(model, x):
    with torch.no_grad():
        model(x)


LET_GO = {
    "forward": lambda model, x: model(x),
    "forward_without_gradients": _forward_without_gradients,
    "eval": lambda model, x: model.eval(),
    "kl_taken": lambda model, x: kl_divergence(model),
}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("let_go", LET_GO.values(), ids=LET_GO)
def test_a_graph_whose_kl_nobody_took_is_held_until(device, let_go):
    model = small_model(device)
    y, saved = watched_forward(model, batch(device))
    del y
    assert alive(saved)  # by the layer
    let_go(model, batch(device))
    assert alive(saved) == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_hold_no_graph(device, copying):
    model = small_model(device)
    y, saved = watched_forward(model, batch(device))
    copied = copying(model)
    assert_exact(copied, attached=False)
    kl_divergence(model)
    del y
    assert alive(saved) == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_fifty_steps_take_as_much_memory_as_one(device, taken, backward):
    model, counts = small_model(device), []
    for step in range(50):
        loss = model(batch(device)).square().sum()
        if taken:
            loss = loss + kl_divergence(model)
        if backward:
            loss.backward()
            model.zero_grad()
        if step in (2, 49):
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        del loss
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("no_collector")
def test_a_tensor_of_a_discarded_graph_is_freed_without_hooks_too(device):
    model = small_model(device)
    hidden, output = [], []
    model[0].register_forward_hook(lambda _m, _a, h: hidden.append(weakref.ref(h)))
    model[1].register_forward_hook(lambda _m, _a, y: output.append(weakref.ref(y)))
    y = model(batch(device))
    assert hidden[0]() is not None  # saved by KL-Norm
    assert output[0]() is not None  # saved by the linear layer after it
    assert is_attached(kl_divergence(model))
    del y
    assert hidden[0]() is None
    assert output[0]() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("retain", [False, True])
def test_a_graph_is_freed_after_training_on_it(device, retain):
    model = small_model(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    old = []
    for _ in range(3):
        y, saved = watched_forward(model, batch(device))
        assert alive(old) == 0
        loss = y.square().sum() + kl_divergence(model)
        loss.backward(retain_graph=retain)
        optimizer.step()
        optimizer.zero_grad()
        del y, loss
        old = saved
        assert alive(old) == 0


@pytest.mark.usefixtures("no_collector")
def test_an_older_graph_is_freed_while_the_newest_lives(device):
    model = small_model(device)
    first, saved_first = watched_forward(model, batch(device))
    second, saved_second = watched_forward(model, batch(device))
    del first
    assert alive(saved_first) == 0
    assert alive(saved_second) == len(saved_second)
    assert_exact(model, attached=True)
    assert second.requires_grad


@pytest.mark.usefixtures("no_collector")
def test_a_shared_layer_does_not_keep_its_graph(device):
    model = Twice(device)
    y, saved = watched_forward(model, torch.randn(4, N, device=device, dtype=torch.float64))
    assert alive(saved) == len(saved)
    del y
    model.eval()
    assert alive(saved) == 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_checkpointing_keeps_no_graph(device, reentrant):
    model = Checkpointed(device, 3, reentrant)
    seen = []
    model.block[3].register_forward_hook(lambda _m, args, y: seen.extend((weakref.ref(args[0]), weakref.ref(y))))
    loss = model(batch(device)).square().sum() + kl_divergence(model)
    loss.backward()
    assert len(seen) >= 2
    del loss
    assert alive(seen) == 0


@pytest.mark.usefixtures("no_collector")
def test_a_deleted_model_is_freed_though_its_output_lives(device):
    model = small_model(device)
    y = model(batch(device))
    layer = weakref.ref(model[1])
    del model
    assert layer() is None
    assert y.requires_grad


def test_replaced_layers_of_a_real_model_take_part(device):
    model = klnorm.replace_layer_norm(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=device).double())
    y = model(torch.randn(2, 5, 8, device=device, dtype=torch.float64))
    value, grads = closed_form(model)
    kl = kl_divergence(model)
    torch.testing.assert_close(kl.detach(), value, rtol=1e-12, atol=0)
    assert_same(gradients_of(kl, model), grads)
    assert y.requires_grad


def test_parametrized_layers_count_each(device):
    """Their parameters are made anew at every look, so nothing may be told apart by the id of one that is gone."""

    class Same(nn.Module):
        def forward(self, parameter):
            return parameter * 1.0

    for count in range(2, 12):
        model = nn.Sequential(*(klnorm.KLLayerNorm(8, bias=False) for _ in range(count))).to(device)
        one = kl_divergence(model[0]).item()
        for layer in model:
            nn.utils.parametrize.register_parametrization(layer, "weight", Same())
            nn.utils.parametrize.register_parametrization(layer, "weight_rho", Same())
        assert kl_divergence(model).item() == pytest.approx(count * one, rel=1e-6)


def test_the_returned_kl_may_be_changed_in_place(device):
    layer = klnorm.KLLayerNorm(8).to(device)
    y = layer(torch.randn(3, 4, 8, device=device))
    expected = kl_divergence(layer).item()
    for _ in range(2):
        kl = layer.kl_divergence()
        kl /= 1000
        kl = kl_divergence(layer)
        kl /= 1000
    assert kl_divergence(layer).item() == expected
    assert y.requires_grad


def test_thawed_parameters_receive_the_gradient(device):
    layer = klnorm.KLLayerNorm(8).to(device)
    layer.weight.requires_grad_(False)
    nn.init.constant_(layer.weight, 2.0)
    y = layer(torch.randn(3, 4, 8, device=device))
    layer.weight.requires_grad_(True)
    kl_divergence(layer).backward()
    assert torch.allclose(layer.weight.grad, torch.full((8,), 1 / 0.1**2, device=device))  # (2 - 1) / p^2
    assert y.requires_grad


def test_a_finished_step_leaves_no_graph_at_the_parameters():
    """Of a graph that lives, autograd keeps the parameters' node and its stream, which breaks a capture."""

    def node():
        return layer.weight.view_as(layer.weight).grad_fn.next_functions[0][0]

    layer = klnorm.KLLayerNorm(6)
    y = layer(torch.randn(3, 6))
    kl = klnorm.kl_divergence(layer)
    node().metadata["seen"] = True
    assert "seen" in node().metadata
    (y.sum() + kl).backward()
    del y, kl
    assert "seen" not in node().metadata


# What a later call finds


def broken(model, name="weight_rho"):
    with torch.no_grad():
        getattr(model[1], name)[2] = math.nan
    return model


def test_on_a_gpu_a_kl_that_is_not_finite_raises_a_call_later(device, like_cuda):
    model = small_model(device)
    assert kl_divergence(model).isfinite()
    model(batch(device))
    kl_divergence(broken(model))  # sends it
    with pytest.raises(
        ValueError, match=r"an earlier call found a KL divergence .* layer '1' is nan: weight_rho has 1"
    ):
        kl_divergence(model)


def test_the_layer_of_an_earlier_forward_is_named(device, like_cuda):
    model = broken(nn.Sequential(KLLayerNorm(4), KLLayerNorm(4)).to(device))
    model(torch.randn(3, 4, device=device))
    kl_divergence(model)
    with torch.no_grad():
        model[1].weight_rho.fill_(0.0)  # mended meanwhile
    model(torch.randn(3, 4, device=device))
    with pytest.raises(ValueError, match=r"the KL divergence of layer '1' was nan\. Remedy: look for a diverged step"):
        kl_divergence(model)
    for _ in range(3):  # it is said once
        model(torch.randn(3, 4, device=device))
        kl_divergence(model)


def test_what_has_not_arrived_is_waited_for_by_nobody(device, like_cuda):
    model = broken(nn.Sequential(nn.Identity(), KLLayerNorm(4)).to(device))
    like_cuda.event.late = True
    for _ in range(3):
        kl_divergence(model)
    like_cuda.event.late = False
    with pytest.raises(ValueError, match="an earlier call found"):
        kl_divergence(model)


def test_whoever_asks_for_it_waits(device, like_cuda):
    model = broken(nn.Sequential(nn.Identity(), KLLayerNorm(4)).to(device))
    with pytest.raises(ValueError, match=r"^the KL divergence of layer '1' is nan: weight_rho has 1 .* index 2"):
        kl_divergence(model, check_finite=True)
    for _ in range(3):
        assert not kl_divergence(model, check_finite=False).isfinite()


def test_models_are_told_apart_and_not_kept(device, like_cuda):
    bad, good = broken(nn.Sequential(nn.Identity(), KLLayerNorm(4)).to(device)), KLLayerNorm(4).to(device)
    kl_divergence(bad)
    for _ in range(2):
        kl_divergence(good)
    with pytest.raises(ValueError, match="an earlier call found"):
        kl_divergence(bad)
    kl_divergence(good)
    reference = weakref.ref(good)
    del good
    gc.collect()
    assert reference() is None


def test_a_rank_that_finds_it_later_communicates_with_nobody(device, like_cuda, monkeypatch):
    """Ranks see their copies arrive at different calls: one that explained sharded layers alone would wait for all."""
    model = broken(small_model(device))
    kl_divergence(model)
    monkeypatch.setattr(klnorm.finite, "is_sharded", lambda tensor: True)
    monkeypatch.setattr(KLLayerNorm, "kl_divergence", None)
    with pytest.raises(ValueError, match="KL divergence of a sharded layer was nan"):
        kl_divergence(model)
