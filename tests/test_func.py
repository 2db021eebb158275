"""The transforms of torch.func: grad, vmap and their like, of the functional and of models by functional_call."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vmap

import klnorm
from klnorm.functional import kl_layer_norm

# torch's own warning
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
N, ROWS, CALLS = 6, 4, 3
NOISES = pytest.mark.parametrize("noise", ["batch", "sample", "token", "none"])
NAMES = "x", "weight", "bias", "weight_rho", "bias_rho"
OTHER_BITS = {"rtol": 1e-12, "atol": 1e-12}  # fp64: sums in another order


def random(device, *size):
    return torch.randn(size, dtype=torch.float64, device=device)


def loss_function(noise, bias=True):
    """A function of (tensors by name, seed, dy): both outputs of the functional, weighted and summed."""

    def loss(tensors, seed, dy):
        mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise}
        posterior = [tensors[name] if bias or "bias" not in name else None for name in NAMES[1:]]
        y, kl = kl_layer_norm(tensors["x"], N, *posterior, seed=seed, **mode)
        return (y * dy).sum() - 1.3 * kl

    return loss


def arguments(device, calls=CALLS):
    """Arguments of a loss function, each stacked for as many calls."""
    tensors = {name: random(device, calls, *((ROWS, 2, N) if name == "x" else (N,))) for name in NAMES}
    return tensors, torch.arange(calls, device=device)[:, None] + 7, random(device, calls, ROWS, 2, N)


def one(arguments, i):
    tensors, seed, dy = arguments
    return {name: t[i] for name, t in tensors.items()}, seed[i], dy[i]


def by_autograd(loss, tensors, *args):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    value = loss(leaves, *args)
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), value.detach()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@NOISES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_grad_is_that_of_autograd(device, noise, bias):
    loss, (tensors, *rest) = loss_function(noise, bias), one(arguments(device), 0)
    found, value = grad_and_value(loss)(tensors, *rest)
    expected, expected_value = by_autograd(loss, tensors, *rest)
    assert torch.equal(value, expected_value)
    assert_same_bits(found, expected)


@NOISES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_vmap_of_grad_is_a_loop_over_it(device, noise, bias):
    """Gradients per example, every one with a seed of its own."""
    loss, stacked = loss_function(noise, bias), arguments(device)
    found = vmap(grad(loss))(*stacked)
    for i in range(CALLS):
        assert_same_bits({name: t[i] for name, t in found.items()}, by_autograd(loss, *one(stacked, i))[0])


@NOISES
def test_vmap_over_some_arguments_and_dimensions(device, noise):
    loss, (tensors, seed, dy) = loss_function(noise), arguments(device)
    shared = {name: t if name == "x" else t[0] for name, t in tensors.items()}
    shared["x"] = shared["x"].movedim(0, 2)
    in_dims = {name: 2 if name == "x" else None for name in NAMES}, None, 0
    found = vmap(loss, in_dims)(shared, seed[0], dy)
    for i in range(CALLS):
        expected = loss({**shared, "x": tensors["x"][i]}, seed[0], dy[i])
        torch.testing.assert_close(found[i], expected, **OTHER_BITS)


def small_model(device):
    model = nn.Sequential(nn.Linear(4, N), klnorm.KLLayerNorm(N, init_std=0.3), nn.GELU(), nn.Linear(N, 2))
    return model.to(device, torch.float64)


class Loss(nn.Module):
    """A model's loss with the KL divergence in it, as one module for functional_call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).square().mean() + klnorm.kl_divergence(self.model) / 100


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_grad_of_functional_call(device, training):
    module, x = Loss(small_model(device)).train(training), random(device, 5, 4)
    others = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in module.named_parameters()}
    own_kl = klnorm.kl_divergence(module)

    def loss(parameters):
        torch.manual_seed(3)
        return functional_call(module, parameters, (x,))

    found, value = grad_and_value(loss)(others)
    expected, expected_value = by_autograd(loss, others)
    torch.testing.assert_close(value, expected_value, **OTHER_BITS)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **OTHER_BITS)
    assert (found["model.1.weight_rho"] != 0).all()
    assert torch.equal(klnorm.kl_divergence(module), own_kl)  # of its own parameters, not of those of the call


def test_vmap_of_a_model_draws_as_its_randomness_says(device):
    model, x = small_model(device), random(device, 1, 5, 4).expand(CALLS, 5, 4)
    torch.manual_seed(3)
    same = vmap(model, randomness="same")(x)
    torch.manual_seed(3)
    expected = model(x[0])
    torch.testing.assert_close(same, expected.expand(CALLS, -1, -1), **OTHER_BITS)
    different = vmap(model, randomness="different")(x)
    assert all(not torch.isclose(different[i], different[j]).any() for i in range(CALLS) for j in range(i))
    with pytest.raises(RuntimeError, match="random operation"):
        vmap(model)(x)
    torch.testing.assert_close(vmap(model.eval())(x), model(x), **OTHER_BITS)


def test_vmap_of_grad_of_a_model_with_the_kl(device):
    module, x = Loss(small_model(device)), random(device, CALLS, 1, 4)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    torch.manual_seed(3)
    found = vmap(grad(lambda p, x: functional_call(module, p, (x,))), (None, 0), randomness="same")(parameters, x)
    for i in range(CALLS):
        torch.manual_seed(3)
        expected, _ = by_autograd(lambda p, i=i: functional_call(module, p, (x[i],)), parameters)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[i], expected[name], **OTHER_BITS)


@NOISES
def test_a_jacobian(device, noise):
    tensors, seed, _ = one(arguments(device), 0)
    loss = loss_function(noise)
    dy = random(device, CALLS, ROWS, 2, N)
    found = jacrev(lambda tensors: torch.stack([loss(tensors, seed, v) for v in dy]))(tensors)
    for i, v in enumerate(dy):
        expected, _ = by_autograd(loss, tensors, seed, v)
        for name in NAMES:
            torch.testing.assert_close(found[name][i], expected[name], **OTHER_BITS)


def test_batched_cotangents(device):
    (tensors, seed, _), dy = one(arguments(device), 0), random(device, CALLS, ROWS, 2, N)
    weight = tensors["weight_rho"].requires_grad_()
    y, _ = kl_layer_norm(tensors["x"], N, *[tensors[name] for name in NAMES[1:]], seed=seed)
    (found,) = torch.autograd.grad(y, weight, dy, retain_graph=True, is_grads_batched=True)
    for i, v in enumerate(dy):
        torch.testing.assert_close(found[i], torch.autograd.grad(y, weight, v, retain_graph=True)[0], **OTHER_BITS)


def test_second_and_forward_mode_derivatives_are_refused(device):
    tensors, seed, dy = one(arguments(device), 0)
    loss = loss_function("sample")

    def of_x(x):
        return loss({**tensors, "x": x}, seed, dy)

    with pytest.raises(RuntimeError, match=r"klnorm has no second derivatives.*klnorm\.reference"):
        grad(lambda x: grad(of_x)(x).square().sum())(tensors["x"])
    with pytest.raises(RuntimeError, match=r"klnorm has no forward-mode derivatives.*Remedy: torch\.func\.vjp"):
        jvp(of_x, (tensors["x"],), (dy,))
