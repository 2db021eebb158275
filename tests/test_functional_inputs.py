"""`klnorm.functional.kl_layer_norm` takes tensors of any strides, no rows, any priors, and saves nothing else."""

import math

import pytest
import torch
from functional_calls import DTYPES, NOISES, N, call, gradients, make, noise_error, seed_of

from klnorm.reference import kl_layer_norm as reference

# What must work


def _transposed(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _row_strided(x):
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), math.nan)
    wide[..., 2 : 2 + x.shape[-1]] = x
    return wide[..., 2 : 2 + x.shape[-1]]


def _every_other_row(x):
    twice = x.new_full((2 * x.shape[0], *x.shape[1:]), math.nan)
    twice[1::2] = x
    return twice[1::2]


@pytest.mark.parametrize("layout", [_transposed, _row_strided, _every_other_row])
@pytest.mark.parametrize("leading", [(4,), (3, 4)])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_strided_input_and_gradient(device, layout, leading, noise):
    tensors = make(device, leading, requires_grad=True)
    mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise, "seed": seed_of(3, device)}
    dy = torch.randn_like(tensors["x"])
    one = torch.ones((), dtype=torch.float64, device=device)
    y_expected, _, expected = gradients(tensors, dy, one, **mode)
    strided = layout(tensors["x"].detach())
    assert not strided.is_contiguous()
    tensors["x"] = strided.requires_grad_()
    y, _, grads = gradients(tensors, layout(dy), one, **mode)
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)
    assert y.is_contiguous()


@pytest.mark.parametrize("noise", NOISES)
def test_expanded_input(device, noise):
    tensors = make(device, leading=(1, 4), requires_grad=True)
    row = tensors["x"]
    tensors["x"] = row.expand(3, 4, N)
    copied = {**tensors, "x": row.detach().repeat(3, 1, 1).requires_grad_()}
    y, kl = call(tensors, noise=noise, seed=seed_of(3, device))
    y_expected, kl_expected = call(copied, noise=noise, seed=seed_of(3, device))
    assert y.is_contiguous()
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(kl, kl_expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, row, dy.expand_as(y))
    (expected,) = torch.autograd.grad(y_expected, copied["x"], dy)
    torch.testing.assert_close(dx, expected.sum(0, keepdim=True), rtol=1e-12, atol=1e-12)


def test_expanded_parameters_and_cotangent(device):
    # a scalar scale shared by all features, and the stride-0 gradient that y.sum() sends back
    tensors = make(device)
    for name in "weight", "bias", "weight_rho", "bias_rho":
        tensors[name] = tensors[name][:1].clone().requires_grad_()
    wide = {name: t if name == "x" else t.expand(N) for name, t in tensors.items()}
    y, kl = call(wide, seed=seed_of(9, device))
    y_expected, kl_expected = call(wide, reference, seed=seed_of(9, device))
    scalars = list(tensors.values())[1:]
    close = {"rtol": noise_error(device), "atol": noise_error(device)}
    torch.testing.assert_close(
        torch.autograd.grad(y.sum() + kl, scalars),
        torch.autograd.grad(y_expected.sum() + kl_expected, scalars),
        **close,
    )


@pytest.mark.parametrize("leading", [(4,), (3, 4)])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_the_output_may_be_changed_in_place(device, noise, leading):
    """As by nn.ReLU(inplace=True) or `hidden += residual`."""
    tensors = make(device, leading, requires_grad=True)
    dy = torch.randn_like(tensors["x"])

    def gradients(change):
        y, kl = call(
            tensors, seed=seed_of(5, device), noise="batch" if noise == "none" else noise, sample=noise != "none"
        )
        return torch.autograd.grad((change(y), kl), list(tensors.values()), (dy, kl.new_tensor(1.3)))

    expected = gradients(lambda y: torch.relu(y * 2))
    assert all(torch.equal(a, b) for a, b in zip(gradients(lambda y: y.mul_(2).relu_()), expected, strict=True))


@pytest.mark.parametrize("leading", [(0,), (0, 5), (4, 0)])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_no_rows_give_empty_output_and_the_exact_kl(device, noise, leading):
    tensors = make(device, leading, requires_grad=True)
    mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise}
    dkl = torch.tensor(-1.7, dtype=torch.float64, device=device)
    y, kl, grads = gradients(tensors, torch.randn_like(tensors["x"]), dkl, **mode)
    assert y.shape == (*leading, N)
    assert y.dtype == torch.float64
    assert grads["x"].shape == (*leading, N)
    some = {**tensors, "x": torch.randn(3, 4, N, dtype=torch.float64, device=device)}
    expected_kl = call(some, reference, seed=seed_of(0, device))[1]
    torch.testing.assert_close(kl, expected_kl, rtol=1e-13, atol=0)
    for name in "weight", "bias", "weight_rho", "bias_rho":
        (expected,) = torch.autograd.grad(expected_kl, tensors[name], dkl, retain_graph=True)
        torch.testing.assert_close(grads[name], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("noise", NOISES)
def test_input_of_exactly_the_normalized_shape_is_one_row(device, noise):
    tensors = make(device, leading=())
    y, _ = call(tensors, noise=noise, seed=seed_of(4, device))
    one_row, _ = call({**tensors, "x": tensors["x"][None]}, noise="token", seed=seed_of(4, device))
    assert y.shape == (N,)
    assert torch.equal(y, one_row[0])
    assert not torch.equal(y, call(tensors, sample=False)[0])


@pytest.mark.parametrize(("negative", "positive"), [(-2, 2), (-3, 1), (-4, 0)])
def test_negative_sample_dim_counts_from_the_end(device, negative, positive):
    tensors = make(device, leading=(2, 3, 4))
    y, _ = call(tensors, sample_dim=negative, seed=seed_of(4, device))
    assert torch.equal(y, call(tensors, sample_dim=positive, seed=seed_of(4, device))[0])
    assert not torch.equal(y, call(tensors, sample_dim=(positive + 1) % 3, seed=seed_of(4, device))[0])


def test_priors_as_tensors_and_as_floats(device):
    tensors = make(device)
    as_float = call(tensors, weight_prior=0.3, bias_prior=-2, sample=False)[1]
    weight_prior, bias_prior = torch.full_like(tensors["weight"], 0.3), torch.full_like(tensors["bias"], -2.0)
    as_tensor = call(tensors, weight_prior=weight_prior, bias_prior=bias_prior, sample=False)[1]
    mixed = call(tensors, weight_prior=weight_prior, bias_prior=-2, sample=False)[1]
    torch.testing.assert_close(as_float, as_tensor, rtol=1e-14, atol=0)
    torch.testing.assert_close(as_float, mixed, rtol=1e-14, atol=0)
    swapped = call(tensors, weight_prior=-2, bias_prior=0.3, sample=False)[1]
    assert abs(as_float - swapped) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    tensors = make(device, dtype=dtype, parameter_dtype=torch.float32)
    y, kl = call(tensors, seed=seed_of(5, device))
    with torch.autocast(device.type, torch.bfloat16):
        y_autocast, kl_autocast = call(tensors, seed=seed_of(5, device))
    assert y_autocast.dtype == dtype
    assert torch.equal(y, y_autocast)
    assert torch.equal(kl, kl_autocast)


# Memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, _transposed, _row_strided])
def test_backward_saves_the_inputs_and_eight_bytes_per_row(device, layout, noise, dtype):
    """The mean and rstd of a row in fp32; twice the bytes for fp64, whose mean and rstd are fp64."""
    tensors = make(device, dtype=dtype)
    tensors["x"] = layout(tensors["x"])
    for t in tensors.values():
        t.requires_grad_()
    prior, seed = torch.ones_like(tensors["weight"]), seed_of(3, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = call(
            tensors, noise="batch" if noise == "none" else noise, sample=noise != "none", seed=seed, weight_prior=prior
        )
    inputs = {t.untyped_storage().data_ptr() for t in (*tensors.values(), prior, seed)}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert set(extra) & inputs  # the hooks saw what the Function saves
    n_rows, bytes_per_row = tensors["x"].numel() // N, 16 if dtype == torch.float64 else 8
    assert sum(size for pointer, size in extra.items() if pointer not in inputs) <= n_rows * bytes_per_row
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert not held, "a tensor in ctx escapes the hooks"
