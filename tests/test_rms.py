"""`klnorm.KLRMSNorm`: what it has of its own beside what tests/test_modules.py shows of every KL layer."""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from klnorm import KLRMSNorm
from klnorm.functional import kl_rms_norm
from klnorm.reference.kl_norm import kl_normal

N = 6
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def trained(device="cpu", shape=N, **options):
    """A layer whose parameters and prior are all different from what a new one has."""
    layer = KLRMSNorm(shape, device=device, **options)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.add_(torch.randn_like(t) * 0.3)
    return layer


def noise_of(layer, x, seed=0):
    torch.manual_seed(seed)
    return layer(x)


def test_is_an_nn_rms_norm_with_its_signature_and_the_options_of_the_design():
    assert issubclass(KLRMSNorm, nn.RMSNorm)
    ours = list(inspect.signature(KLRMSNorm).parameters.values())
    theirs = list(inspect.signature(nn.RMSNorm).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    layer_norm = inspect.signature(klnorm.KLLayerNorm).parameters
    assert [(p.name, p.default) for p in ours[len(theirs) :]] == [
        (p.name, p.default) for p in layer_norm.values() if p.kind is p.KEYWORD_ONLY
    ]


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
        ({"eps": 0.0}, r"eps is 0\.0, expected"),
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
    y = noise_of(layer, x)
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
    assert torch.equal(noise_of(layer, x), noise_of(other, x))
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


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(device, training, fresh_dynamo):
    layer = trained(device, eps=1e-6).train(training)
    x, dy = torch.randn(3, 4, N, device=device), torch.randn(3, 4, N, device=device)

    def loss(x):
        return (layer(x) * dy).sum() + klnorm.kl_divergence(layer)

    results = []
    for function in loss, torch.compile(loss, backend="aot_eager", fullgraph=True):
        torch.manual_seed(0)
        value = function(x)
        results.append((value, *torch.autograd.grad(value, list(layer.parameters()))))
    # The KL is a by-product of the forward in eager and in closed form where it is traced.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
