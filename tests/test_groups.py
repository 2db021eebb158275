"""Parameters per group of rows in `kl_layer_norm` and `kl_rms_norm`: specification, gradients, memory, errors."""

import math

import pytest
import torch

from klnorm import reference
from klnorm.functional import kl_layer_norm, kl_rms_norm

N = 6
NAMES = "weight", "bias", "weight_rho", "bias_rho"
NOISES = "batch", "sample", "token"
LAYOUTS = [
    # leading dimensions, sample_dim, groups
    ((6, 4), 0, 6),  # a group is a sample
    ((6, 4), 0, 2),  # a group is three samples
    ((6, 4), 0, 12),  # a sample is two groups
    ((6, 4), 0, 24),  # a group is a row
    ((6, 4), 1, 3),  # time first: a group has two rows of every sample
    ((2, 3, 4), 1, 2),  # a group has four rows of each of three samples
    ((5,), 0, 1),
]


def make(device="cpu", leading=(6, 4), groups=3, shape=(N,), dtype=torch.float64, parameter_dtype=None, bias=True):
    """x and the parameters by name, random; their gradients are wanted."""

    def random(*size, dtype=parameter_dtype or dtype, centre=0.0):
        return (torch.randn(size, dtype=dtype, device=device) + centre).requires_grad_()

    tensors = {"x": random(*leading, *shape, dtype=dtype)}
    for name, centre in zip(NAMES, (1.0, 0.0, -1.0, -1.0), strict=True):
        tensors[name] = None if "bias" in name and not bias else random(groups, *shape, centre=centre)
    return tensors


def call(tensors, function=kl_layer_norm, **options):
    options.setdefault("seed", torch.tensor([2**40 + 3], device=tensors["x"].device))
    return function(tensors["x"], tuple(tensors["weight"].shape[1:]), *list(tensors.values())[1:], **options)


def gradients(tensors, outputs, cotangents):
    """By name."""
    present = {name: t for name, t in tensors.items() if t is not None}
    return dict(zip(present, torch.autograd.grad(outputs, list(present.values()), cotangents), strict=True))


def mode(noise):
    return {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise}


def assert_agree(tensors, expected_tensors=None, tolerance=1e-12, **options):
    """Op and reference: outputs, and gradients for random cotangents."""
    expected_tensors = expected_tensors or tensors
    outputs, expected = call(tensors, **options), call(expected_tensors, reference.kl_layer_norm, **options)
    cotangents = [torch.randn_like(output) for output in outputs]
    found = gradients(tensors, outputs, cotangents)
    wanted = gradients(expected_tensors, expected, [c.to(e) for c, e in zip(cotangents, expected, strict=True)])
    found, wanted = {"y": outputs[0], "kl": outputs[1], **found}, {"y": expected[0], "kl": expected[1], **wanted}
    for name in found:
        assert found[name].shape == wanted[name].shape, name
        torch.testing.assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance, check_dtype=False)


def exactness(device):
    return 1e-12 if device.type == "cpu" else 2e-5  # rounding alone; on a GPU the noise is made in fp32


# Agreement with the specification


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize(("leading", "sample_dim", "groups"), LAYOUTS)
def test_agrees_with_the_reference(device, leading, sample_dim, groups, noise, bias):
    options = {
        "sample_dim": sample_dim, "eps": 0.1, "prior_std": 0.3, "bias_prior": -0.7,
        "weight_prior": torch.randn(N, dtype=torch.float64, device=device),
    }  # fmt: skip
    tensors = make(device, leading, groups, bias=bias)
    assert_agree(tensors, tolerance=exactness(device), **options, **mode(noise))
    assert call(tensors, **options, **mode(noise))[1].shape == (groups,)


@pytest.mark.parametrize("noise", NOISES)
def test_several_normalized_dimensions(device, noise):
    assert_agree(make(device, (4, 2), 4, (2, 3)), tolerance=exactness(device), noise=noise)


def test_groups_that_look_like_a_normalized_shape(device):
    """(2, 3) parameters of a normalized shape (3,) are two groups, of (2, 3) they are one posterior."""
    tensors = make(device, (4,), 2, (3,))
    parameters = list(tensors.values())[1:]
    assert call(tensors)[1].shape == (2,)
    x = torch.randn(4, 2, 3, dtype=torch.float64, device=device)
    assert kl_layer_norm(x, (2, 3), *parameters)[1].shape == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_narrow_dtypes_compute_in_fp32(device, noise, dtype):
    tensors = make(device, dtype=dtype, parameter_dtype=torch.float32)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    # rounding once to the dtype costs half an eps; arithmetic in fp32 is far below that
    assert_agree(tensors, wide, tolerance=0.51 * torch.finfo(dtype).eps, noise=noise, prior_std=1.0)
    y, kl = call(tensors, noise=noise)
    assert (y.dtype, kl.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_gradcheck(noise, bias):
    tensors = make(leading=(4, 2), groups=2, bias=bias)

    def function(*present):
        values = iter(present)
        filled = {name: None if t is None else next(values) for name, t in tensors.items()}
        return call(filled, noise=noise, eps=0.1, prior_std=0.5)

    assert torch.autograd.gradcheck(function, tuple(t for t in tensors.values() if t is not None))


@pytest.mark.parametrize("noise", NOISES)
def test_gradcheck_of_rms_with_residual(noise):
    tensors = make(leading=(4, 2), groups=4)
    residual = torch.randn_like(tensors["x"], requires_grad=True)

    def function(x, residual, weight, rho):
        seed = torch.tensor([3])
        return kl_rms_norm(x, N, weight, rho, residual=residual, noise=noise, seed=seed, eps=0.1, prior_std=0.5)

    assert torch.autograd.gradcheck(function, (tensors["x"], residual, tensors["weight"], tensors["weight_rho"]))


# What groups mean


@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_equal_groups_are_the_static_posterior_bit_for_bit(device, noise):
    tensors = make(device, groups=1, dtype=torch.float32)
    static = {name: t if name == "x" else t[0] for name, t in tensors.items()}
    options = {"seed": torch.tensor([5], device=device), **mode(noise)}
    y, kl = kl_layer_norm(static["x"], N, *list(static.values())[1:], **options)
    for groups in 1, 2, 6:
        grouped = {name: t if name == "x" else t.expand(groups, N) for name, t in tensors.items()}
        y_grouped, kl_grouped = call(grouped, **options)
        assert torch.equal(y_grouped, y)
        assert torch.equal(kl_grouped, kl.expand(groups))


@pytest.mark.parametrize("noise", NOISES)
def test_a_group_depends_on_its_own_parameters_alone(device, noise):
    tensors = make(device, groups=3)
    y, kl = call(tensors, noise=noise)
    rows = y.reshape(3, -1, N)
    for group in range(3):
        own = [t for t in tensors.values() if t is not tensors["x"]]
        found = torch.autograd.grad((rows[group].sum(), kl[group]), own, retain_graph=True)
        for gradient in found:
            assert (gradient[group] != 0).all()
            assert not gradient[[g for g in range(3) if g != group]].any()


def test_no_rows_give_the_exact_kl_of_every_group(device):
    tensors = make(device, leading=(0, 4), groups=3)
    some = {**tensors, "x": torch.randn(6, 4, N, dtype=torch.float64, device=device)}
    (y, kl), expected = call(tensors), call(some, reference.kl_layer_norm)[1]
    assert y.shape == (0, 4, N)
    torch.testing.assert_close(kl, expected, rtol=1e-13, atol=0)
    cotangent = torch.randn_like(kl)
    parameters = list(tensors.values())[1:]
    for found, wanted in zip(
        torch.autograd.grad(kl, parameters, cotangent),
        torch.autograd.grad(expected, parameters, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)


# Memory, compilation


@pytest.mark.parametrize("noise", [*NOISES, "none"])
def test_backward_saves_the_inputs_and_eight_bytes_per_row(device, noise):
    tensors = make(device, leading=(6, 32), groups=6, dtype=torch.float32)
    seed, saved = torch.tensor([3], device=device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(tensors, seed=seed, **mode(noise))
    inputs = {t.untyped_storage().data_ptr() for t in (*tensors.values(), seed)}
    extra = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert set(extra) & inputs  # the hooks saw what the Function saves
    assert sum(size for pointer, size in extra.items() if pointer not in inputs) <= 8 * 6 * 32


@pytest.mark.parametrize("noise", ["sample", "token"])
def test_compiles_without_a_break_for_every_number_of_groups(device, noise, fresh_dynamo):
    seed = torch.tensor([3], device=device)
    compiled = torch.compile(lambda t: call(t, noise=noise, seed=seed), backend="aot_eager", fullgraph=True)
    for groups in 3, 6:
        tensors = make(device, groups=groups, dtype=torch.float32)
        outputs, expected = compiled(tensors), call(tensors, noise=noise, seed=seed)
        cotangents = [torch.randn_like(output) for output in outputs]
        found, wanted = gradients(tensors, outputs, cotangents), gradients(tensors, expected, cotangents)
        assert all(map(torch.equal, [*outputs, *found.values()], [*expected, *wanted.values()]))


# Bad input


def _groups(count, *shape):
    return torch.zeros(count, *(shape or (N,)))


BAD = [
    # changed arguments, exception, what the message must say
    ({"weight": _groups(5)}, ValueError, r"bias has shape \(3, 6\), expected \(5, 6\).*number of groups"),
    ({name: _groups(5) for name in NAMES}, ValueError, r"weight has 5 groups, expected a divisor of 24, the number"),
    ({name: _groups(0) for name in NAMES}, ValueError, r"weight has 0 groups, expected 1 to 65535"),
    ({name: _groups(65536) for name in NAMES}, ValueError, r"weight has 65536 groups, expected 1 to 65535"),
    ({name: _groups(8) for name in NAMES}, ValueError, r"8 groups of 3 rows, which cut samples of 4.*Remedy: noise="),
    ({name: _groups(48) for name in NAMES}, ValueError, r"weight has 48 groups, expected a divisor of 24"),
    ({name: _groups(3, 1, N) for name in NAMES}, ValueError, r"weight has shape \(3, 1, 6\), expected \(6,\)"),
    ({name: _groups(3, 7) for name in NAMES}, ValueError, r"weight has shape \(3, 7\), expected \(6,\)"),
    ({"bias": torch.zeros(N)}, ValueError, r"bias has shape \(6,\), expected \(3, 6\)"),
    ({"weight": torch.zeros(N)}, ValueError, r"bias has shape \(3, 6\), expected \(6,\)"),
    ({"weight_rho": _groups(2)}, ValueError, r"weight_rho has shape \(2, 6\), expected \(3, 6\)"),
    ({"bias_rho": _groups(3).double()}, TypeError, r"bias_rho has dtype torch.float64, expected weight's"),
    ({"bias": None}, ValueError, r"bias is None but bias_rho is not"),
    ({"weight_prior": _groups(3)}, ValueError, r"weight_prior has shape \(3, 6\), expected \(6,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_groups_are_refused_with_an_explanation(changed, error, message):
    arguments = {"normalized_shape": N, **make(dtype=torch.float32), **changed}
    with pytest.raises(error, match=message):
        kl_layer_norm(**arguments)


@pytest.mark.parametrize("options", [{"noise": "batch"}, {"noise": "token"}, {"noise": "sample", "sample": False}])
def test_groups_may_cut_samples_where_noise_has_none(options):
    y, _ = call(make(groups=8), **options)
    assert y.shape == (6, 4, N)


def test_a_divergence_that_is_not_finite_is_explained():
    tensors = {name: t.detach() for name, t in make().items()}
    tensors["weight_rho"][1, 2] = math.nan
    with pytest.raises(ValueError, match=r"weight_rho has 1 such value\(s\), the first at index 8"):
        call(tensors)
