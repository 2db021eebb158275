"""`klnorm.KLRMSNorm`: what it has of its own beside what tests/test_modules.py shows of every KL layer."""

import copy
import functools
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained_layers import DTYPES, N, assert_compiles, seeded
from trained_layers import trained as trained_layer

import klnorm
from klnorm import KLRMSNorm, reference
from klnorm.functional import kl_rms_norm
from klnorm.reference.kl_norm import kl_normal

trained = functools.partial(trained_layer, kind=KLRMSNorm)


def test_is_an_nn_rms_norm_with_its_signature_and_the_options_of_the_design():
    assert issubclass(KLRMSNorm, nn.RMSNorm)
    ours = list(inspect.signature(KLRMSNorm).parameters.values())
    theirs = list(inspect.signature(nn.RMSNorm).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    layer_norm = inspect.signature(klnorm.KLLayerNorm).parameters
    assert [(p.name, p.default) for p in ours[len(theirs) :]] == [
        ("bias", False), *((p.name, p.default) for p in layer_norm.values() if p.kind is p.KEYWORD_ONLY)
    ]  # fmt: skip


def test_initial_state(device):
    layer = KLRMSNorm((2, 3), init_std=0.2, device=device, dtype=torch.float64)
    assert layer.state_dict().keys() == {"weight", "weight_rho", "weight_prior"}
    assert [name for name, _ in layer.named_parameters()] == ["weight", "weight_rho"]
    assert torch.equal(layer.weight, layer.weight_prior)
    assert torch.equal(layer.weight, torch.ones(2, 3, device=device))
    torch.testing.assert_close(F.softplus(layer.weight_rho), torch.full_like(layer.weight, 0.2))
    assert layer.bias is None
    assert repr(layer) == (
        "KLRMSNorm((2, 3), eps=None, elementwise_affine=True, noise='sample', sample_dim=0, prior_std=0.1)"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elementwise_affine": False}, r"elementwise_affine is False, expected True.*Remedy: nn\.RMSNorm"),
        ({"eps": -1e-6}, r"eps is -1e-06, expected a finite number of 0 or more"),
        ({"normalized_shape": 0}, "normalized_shape is 0"),
        ({"noise": "rows"}, "noise is 'rows'"),
        ({"posterior": "none"}, "posterior is 'none', expected one of 'sampled', 'deterministic'"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KLRMSNorm(**{"normalized_shape": N, **options})


def test_only_an_rms_norm_has_a_default_eps():
    with pytest.raises(TypeError, match="eps is a NoneType, expected a float"):
        klnorm.KLLayerNorm(N, eps=None)


@pytest.mark.parametrize("eps", [None, 0.3])
@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_training_passes_every_setting_to_the_functional(device, noise, eps):
    layer = trained(device, (2, 3), eps=eps, noise=noise, sample_dim=1, prior_std=0.7)
    x = 1e-3 * torch.randn(3, 4, 2, 3, device=device)  # small, so that eps shows
    y = seeded(layer, x)
    torch.manual_seed(0)
    expected, kl = kl_rms_norm(
        x, (2, 3), layer.weight, layer.weight_rho, weight_prior=layer.weight_prior, prior_std=0.7, eps=eps,
        noise=noise, sample_dim=1,
    )  # fmt: skip
    assert torch.equal(y, expected)
    assert torch.equal(klnorm.kl_divergence(layer), kl)  # y is alive, so this is the KL of that forward


def test_divergence_and_its_gradient_are_the_same_from_the_forward_and_in_closed_form(device):
    layer = trained(device, dtype=torch.float64)
    y = layer(torch.randn(3, N, device=device, dtype=torch.float64))
    from_forward = layer._take_kl()
    assert from_forward.grad_fn is y.grad_fn, "the KL is no by-product of the forward"
    gradients = torch.autograd.grad(from_forward, list(layer.parameters()))
    del y
    closed = layer.kl_divergence()
    assert closed.grad_fn is not from_forward.grad_fn
    expected = kl_normal(layer.weight, layer.weight_rho, layer.weight_prior, 0.1).sum()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if device.type == "cpu" else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(closed, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(from_forward, closed, **tolerance)
    torch.testing.assert_close(gradients, torch.autograd.grad(closed, list(layer.parameters())), **tolerance)


@pytest.mark.parametrize("eps", [None, 0.01])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(N,), (2, 3)])
def test_evaluation_is_rms_norm_with_the_means_bit_for_bit(device, dtype, shape, eps):
    layer = trained(device, shape, dtype=dtype, eps=eps).eval()
    plain = nn.RMSNorm(shape, eps, device=device, dtype=dtype)
    plain.load_state_dict({"weight": layer.weight})
    x, dy = (1e-3 * torch.randn(5, 4, *shape, device=device, dtype=dtype) for _ in range(2))
    state = torch.get_rng_state()
    outputs = layer(x), plain(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*outputs)
    for output in outputs:
        output.backward(dy)
    assert torch.equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_the_dtype_of_the_input(device, dtype, parameter_dtype, autocast):
    layer = trained(device, dtype=parameter_dtype, eps=1e-6)
    x = torch.randn(5, 4, N, device=device, dtype=dtype)
    expected = F.rms_norm(x.double(), (N,), layer.weight.double(), 1e-6)
    with torch.no_grad():
        layer.weight_rho.fill_(-200)  # no noise to speak of
    for training in False, True:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = layer.train(training)(x)
        assert y.dtype == dtype
        # rounded once, from arithmetic in fp32 or fp64 on values below 10
        arithmetic = 100 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(y.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=arithmetic)


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_both_parameters_and_the_input_receive_gradients(device, noise):
    layer, x = trained(device, noise=noise), torch.randn(3, 4, N, device=device, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    for tensor in (*layer.parameters(), x):
        assert tensor.grad.isfinite().all()
        assert (tensor.grad != 0).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(device, duplicate):
    layer, x = trained(device, noise="token"), torch.randn(3, N, device=device)
    other = duplicate(layer)
    assert type(other) is KLRMSNorm
    assert torch.equal(seeded(layer, x), seeded(other, x))
    with torch.no_grad():
        other.weight.add_(1)
    assert klnorm.kl_divergence(other) > klnorm.kl_divergence(layer) + 1


def test_reset_and_meta(device):
    layer = KLRMSNorm(N, init_std=0.3, device="meta")
    assert layer(torch.zeros(3, N, device="meta")).shape == (3, N)
    layer.to_empty(device=device).reset_parameters()
    expected = KLRMSNorm(N, init_std=0.3, device=device).state_dict()
    assert layer.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_plain_checkpoint_becomes_mean_and_prior(device, assign):
    layer, checkpoint = trained(device), {"weight": torch.rand(N, device=device)}
    rho = layer.weight_rho.detach().clone()
    layer.load_state_dict(checkpoint, strict=True, assign=assign)
    assert torch.equal(layer.weight, checkpoint["weight"])
    assert torch.equal(layer.weight_prior, checkpoint["weight"])
    assert layer.weight_prior.data_ptr() != layer.weight.data_ptr()
    assert torch.equal(layer.weight_rho, rho)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        layer.load_state_dict({**checkpoint, "bias": torch.zeros(N)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_prior"'):
        layer.load_state_dict({**checkpoint, "weight_rho": rho})


def test_sampling_prediction_summary_and_optimizer_groups_know_it(device):
    model = nn.Sequential(trained(device, init_std=0.5), nn.Linear(N, 3, device=device)).eval()
    x = torch.randn(4, N, device=device)
    assert torch.equal(model(x), model(x))
    with klnorm.sampling(model):
        assert not torch.isclose(model(x), model(x)).any()
    assert (klnorm.mc_predict(model, x, samples=4).mutual_information > 0).all()
    row = klnorm.summary(model).layers["0"]
    assert row.shift is None
    assert row.scale.kl == pytest.approx(klnorm.kl_divergence(model).item(), rel=1e-5)
    groups = {group["name"]: group["params"] for group in klnorm.param_groups(model, lr=1e-3)}
    assert groups["rho"] == [model[0].weight_rho]
    assert any(p is model[0].weight for p in groups["no_decay"])
    assert klnorm.KLWeight(per_parameter=model).value == 1 / N


def test_a_diverged_layer_is_named():
    model = nn.Sequential(nn.Identity(), trained())
    with torch.no_grad():
        model[1].weight_rho[2] = math.nan
    with pytest.raises(ValueError, match=r"layer '1' is nan: weight_rho has 1 such value\(s\), the first at index 2"):
        klnorm.kl_divergence(model)


@pytest.mark.parametrize("bias", [False, True], ids=["no_shift", "shift"])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(device, training, bias, fresh_dynamo):
    layer = trained(device, eps=1e-6, bias=bias).train(training)
    assert_compiles(layer, torch.randn(3, 4, N, device=device))


# With a shift, which nn.RMSNorm has not


def shifted(device="cpu", shape=N, **options):
    return trained(device, shape, bias=True, **options)


def with_means(layer, x):
    """What evaluation is, from the specification in fp64."""
    means = layer.weight.double(), None
    return reference.kl_rms_norm(
        x.double(), layer.normalized_shape, *means, bias=layer.bias.double(), eps=layer.eps, posterior="deterministic"
    )[0]


def test_a_shift_has_the_state_that_a_layer_norm_has(device):
    layer = KLRMSNorm((2, 3), bias=True, init_std=0.2, device=device, dtype=torch.float64)
    expected = klnorm.KLLayerNorm((2, 3), init_std=0.2, device=device, dtype=torch.float64).state_dict()
    assert layer.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "weight_rho", "bias_rho"]
    assert repr(layer) == (
        "KLRMSNorm((2, 3), eps=None, elementwise_affine=True, noise='sample', sample_dim=0, prior_std=0.1, bias=True)"
    )
    layer.to_empty(device=device).reset_parameters()
    assert all(torch.equal(value, expected[key]) for key, value in layer.state_dict().items())
    deterministic = KLRMSNorm(N, bias=True, posterior="deterministic")
    assert deterministic.state_dict().keys() == {"weight", "bias", "bias_prior"}
    with pytest.raises(TypeError, match="bias is 'no', a str, expected True or False"):
        KLRMSNorm(N, bias="no")


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_training_with_a_shift_passes_it_to_the_functional(device, noise):
    layer = shifted(device, eps=0.3, noise=noise, sample_dim=1, prior_std=0.7)
    x = torch.randn(3, 4, N, device=device)
    y = seeded(layer, x)
    torch.manual_seed(0)
    expected, kl = kl_rms_norm(
        x, N, layer.weight, layer.weight_rho, bias=layer.bias, bias_rho=layer.bias_rho,
        weight_prior=layer.weight_prior, bias_prior=layer.bias_prior, prior_std=0.7, eps=0.3, noise=noise, sample_dim=1,
    )  # fmt: skip
    assert torch.equal(y, expected)
    assert torch.equal(klnorm.kl_divergence(layer), kl)
    y.backward(torch.randn_like(y))
    assert all((parameter.grad != 0).all() for parameter in layer.parameters())


@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_divergence_with_a_shift_is_that_of_its_layer_norm(device, posterior):
    layer = shifted(device, posterior=posterior, dtype=torch.float64)
    like = klnorm.KLLayerNorm(N, posterior=posterior, device=device, dtype=torch.float64)
    like.load_state_dict(layer.state_dict())
    y = layer(torch.randn(3, N, device=device, dtype=torch.float64))
    from_forward = layer._take_kl()
    assert from_forward.grad_fn is y.grad_fn, "the KL is no by-product of the forward"
    gradients = torch.autograd.grad(from_forward, list(layer.parameters()))
    del y
    closed, expected = layer.kl_divergence(), like.kl_divergence()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if device.type == "cpu" else {"rtol": 1e-6, "atol": 1e-6}
    assert torch.equal(closed, expected)
    torch.testing.assert_close(from_forward, expected, **tolerance)
    wanted = torch.autograd.grad(expected, list(like.parameters()))
    torch.testing.assert_close(gradients, wanted, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(closed, list(layer.parameters())), wanted, **tolerance)


@pytest.mark.parametrize("eps", [None, 0.01])
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=["alike", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_with_a_shift_is_the_norm_of_the_means(device, dtype, parameter_dtype, eps):
    layer = shifted(device, (2, 3), dtype=parameter_dtype or dtype, eps=eps).eval()
    x = torch.randn(5, 4, 2, 3, device=device, dtype=dtype, requires_grad=True)
    residual = torch.randn_like(x)
    state = torch.get_rng_state()
    y, again = layer(x), layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, again)
    assert y.dtype == dtype
    if eps is None:
        layer.eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # rounded once, from arithmetic in fp32 or fp64 on values below 10
    arithmetic = 100 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": arithmetic}
    torch.testing.assert_close(y.double(), with_means(layer, x), **tolerance)
    y, total = layer(x, residual=residual)
    torch.testing.assert_close(y.double(), with_means(layer, total), **tolerance)
    y.backward(torch.randn_like(y))
    assert all(t.grad is not None and (t.grad != 0).any() for t in (x, layer.weight, layer.bias))
    assert layer.weight_rho.grad is layer.bias_rho.grad is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_copies_and_checkpoints_keep_the_shift(device, posterior, duplicate):
    layer, x = shifted(device, posterior=posterior, noise="token"), torch.randn(3, N, device=device)
    loaded = KLRMSNorm(N, bias=True, posterior=posterior, noise="token", device=device)
    loaded.load_state_dict(layer.state_dict())
    for other in duplicate(layer), loaded:
        assert torch.equal(seeded(layer, x), seeded(other, x))
        assert torch.equal(layer.kl_divergence(), other.kl_divergence())
        with torch.no_grad():
            other.bias.add_(1)
        assert not torch.isclose(seeded(layer, x), seeded(other, x)).any()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_a_plain_checkpoint_has_a_shift_of_0(device, posterior, assign):
    model = nn.Sequential(shifted(device, posterior=posterior))
    plain = nn.Sequential(nn.RMSNorm(N, device=device))
    nn.init.uniform_(plain[0].weight)
    rhos = [rho.detach().clone() for name, rho in model.named_parameters() if name.endswith("_rho")]
    checkpoint = plain.state_dict()
    model.load_state_dict(checkpoint, strict=True, assign=assign)
    assert checkpoint.keys() == {"0.weight"}
    layer, x = model[0], torch.randn(4, N, device=device)
    assert torch.equal(layer.bias, torch.zeros_like(layer.bias))
    assert torch.equal(layer.bias_prior, torch.zeros_like(layer.bias))
    assert torch.equal(layer.weight, plain[0].weight)
    assert all(torch.equal(*pair) for pair in zip(rhos, layer.posterior_parameters()[1::2], strict=False))
    torch.testing.assert_close(model.eval()(x), plain(x))
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias_prior"'):
        layer.load_state_dict({"weight": layer.weight, "bias": layer.bias, "weight_prior": layer.weight})


def test_the_state_of_a_layer_with_a_shift_and_of_one_without_do_not_mix():
    with_shift, without = shifted(), trained()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias", "bias_rho", "bias_prior"'):
        without.load_state_dict(with_shift.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias", "bias_rho", "bias_prior"'):
        with_shift.load_state_dict(without.state_dict())


def test_a_norm_with_a_shift_cannot_be_restored_as_nn_rms_norm_has_none(device):
    model = nn.Sequential(klnorm.replace_rms_norm(nn.RMSNorm(N, device=device)), shifted(device)).eval()
    x = torch.randn(4, N, device=device)
    before, state = model(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"layer '1' has a shift, .*Remedy: layer\.bias = layer\.bias_rho = layer\.bias"
    ):
        klnorm.restore_rms_norm(model)
    assert [type(layer) for layer in model] == [KLRMSNorm, KLRMSNorm]
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), before)
    shift, layer = model[1].bias.detach(), model[1]
    layer.bias = layer.bias_rho = layer.bias_prior = None
    y = model(x)
    torch.testing.assert_close(y + shift, before)
    klnorm.restore_rms_norm(model)
    assert [type(layer) for layer in model] == [nn.RMSNorm, nn.RMSNorm]
    assert torch.equal(model(x), y)


def test_replacing_gives_no_shift_and_restoring_leaves_no_trace(device):
    model = nn.RMSNorm(N, device=device)
    entries = {key: set(value) for key, value in vars(model).items() if isinstance(value, dict)}
    names = vars(model).keys()
    klnorm.replace_rms_norm(model)
    assert model.bias is model.bias_rho is model.bias_prior is None
    klnorm.restore_rms_norm(model)
    assert vars(model).keys() == names
    assert {key: set(value) for key, value in vars(model).items() if isinstance(value, dict)} == entries


def test_an_nn_rms_norm_with_a_bias_of_none_is_replaced():
    norm = nn.RMSNorm(N)
    norm.bias = None
    klnorm.replace_rms_norm(norm)(torch.randn(3, N))
    assert norm.state_dict().keys() == {"weight", "weight_rho", "weight_prior"}
    klnorm.restore_rms_norm(norm)
    assert norm.bias is None


def test_an_nn_rms_norm_that_was_given_a_bias_is_refused():
    model = nn.Sequential(nn.RMSNorm(N))
    model[0].bias = nn.Parameter(torch.ones(N))
    with pytest.raises(ValueError, match=r"layer '0' is an nn\.RMSNorm with a bias.*Remedy: del layer\.bias"):
        klnorm.replace_rms_norm(model)
    assert type(model[0]) is nn.RMSNorm
    del model[0].bias
    assert list(klnorm.kl_layers(klnorm.replace_rms_norm(model))) == ["0"]


def test_sampling_summary_and_optimizer_groups_know_the_shift(device):
    model = nn.Sequential(shifted(device, init_std=0.5), nn.Linear(N, 3, device=device)).eval()
    x = torch.randn(4, N, device=device)
    assert torch.equal(model(x), model(x))
    with klnorm.sampling(model):
        assert not torch.isclose(model(x), model(x)).any()
    assert (klnorm.mc_predict(model, x, samples=4).mutual_information > 0).all()
    layer, row = model[0], klnorm.summary(model).layers["0"]
    expected = kl_normal(layer.bias, layer.bias_rho, layer.bias_prior, 0.1).sum().item()
    assert row.shift.kl == pytest.approx(expected, rel=1e-5)
    assert row.scale.kl + row.shift.kl == pytest.approx(klnorm.kl_divergence(model).item(), rel=1e-5)
    groups = {group["name"]: group["params"] for group in klnorm.param_groups(model, lr=1e-3)}
    assert groups["rho"] == [layer.weight_rho, layer.bias_rho]
    assert {id(layer.weight), id(layer.bias)} <= {id(p) for p in groups["no_decay"]}
    assert klnorm.KLWeight(per_parameter=model).value == 1 / (2 * N)


def test_a_shift_needs_a_mean_and_a_deviation():
    x, weight, rho = torch.randn(3, N), torch.ones(N), torch.zeros(N)
    for given, missing in ("bias", "bias_rho"), ("bias_rho", "bias"):
        with pytest.raises(ValueError, match=rf"^{missing} is None but {given} is not.*Remedy: pass {missing} as well"):
            kl_rms_norm(x, N, weight, rho, **{given: rho})
    kl_rms_norm(x, N, weight, rho, bias=rho, bias_rho=rho)
