"""KL layers are made with the settings of nn.LayerNorm and their own, and bad ones are named."""

import inspect
from fractions import Fraction

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from trained_layers import DTYPES, STATE, N, seeded

import klnorm
from klnorm import KLLayerNorm


def test_is_an_nn_layer_norm_with_its_signature_and_the_options_of_the_design():
    assert issubclass(KLLayerNorm, nn.LayerNorm)
    ours = list(inspect.signature(KLLayerNorm).parameters.values())
    theirs = list(inspect.signature(nn.LayerNorm).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    options = {p.name: p.default for p in ours[len(theirs) :]}
    assert options == {
        "noise": "sample",
        "sample_dim": 0,
        "init_std": 0.05,
        "prior_std": 0.1,
        "generator": None,
        "posterior": "sampled",
        "out_dtype": None,
        "heads": None,
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init_std", [1e-4, 0.05, 1.0, 30.0])
def test_initial_values(device, init_std, dtype):
    layer = KLLayerNorm(N, device=device, dtype=dtype, init_std=init_std)
    ones, zeros = [1.0] * N, [0.0] * N
    assert layer.weight.tolist() == layer.weight_prior.tolist() == ones
    assert layer.bias.tolist() == layer.bias_prior.tolist() == zeros
    for rho in layer.weight_rho, layer.bias_rho:
        assert isinstance(rho, nn.Parameter)
        # rho, of size up to 30, is rounded to its dtype; softplus passes on at most that absolute error, relative to s
        relative = torch.finfo(dtype).eps * rho.abs().max().item()
        torch.testing.assert_close(
            F.softplus(rho.double()), torch.full_like(rho, init_std, dtype=torch.float64), rtol=relative, atol=0
        )
    assert {t.dtype for t in layer.state_dict().values()} == {dtype}
    assert dict(layer.named_buffers()).keys() == {"weight_prior", "bias_prior"}
    assert layer.state_dict().keys() == STATE


def test_layer_without_affine_parameters_is_refused():
    with pytest.raises(ValueError, match=r"elementwise_affine is False, expected True.*Remedy: nn\.LayerNorm"):
        KLLayerNorm(N, elementwise_affine=False)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("normalized_shape", 0, ValueError),
        ("normalized_shape", (), ValueError),
        ("eps", -1e-5, ValueError),
        ("noise", "rows", ValueError),
        ("init_std", 0.0, ValueError),
        ("init_std", float("nan"), ValueError),
        ("init_std", "0.1", TypeError),
        ("init_std", 10**400, ValueError),
        ("init_std", 1e39, ValueError),
        ("prior_std", -1.0, ValueError),
        ("prior_std", 10**400, ValueError),
        ("prior_std", 1e308, ValueError),
        ("eps", 10**400, ValueError),
        ("eps", "abc", TypeError),
        ("normalized_shape", {8: 8}, TypeError),
        ("normalized_shape", numpy.array(8), TypeError),
        ("normalized_shape", 2**63, ValueError),
        ("noise", numpy.array(["batch", "token"]), TypeError),
        ("posterior", None, TypeError),
        ("sample_dim", "abc", TypeError),
        ("sample_dim", True, TypeError),
        ("sample_dim", 0.0, TypeError),
        ("sample_dim", 10**400, ValueError),
        ("generator", "abc", TypeError),
        ("generator", 7, TypeError),
        ("elementwise_affine", "no", TypeError),
        ("elementwise_affine", torch.zeros(2), TypeError),
        ("bias", "no", TypeError),
        ("bias", numpy.zeros(2), TypeError),
        ("dtype", torch.complex64, TypeError),
        ("dtype", torch.int64, TypeError),
        ("dtype", torch.float8_e5m2, TypeError),
    ],
)
@pytest.mark.parametrize("layer", [KLLayerNorm, klnorm.KLRMSNorm, klnorm.KLConditionalLayerNorm])
@pytest.mark.parametrize("options", [{}, {"noise": "token"}], ids=["sample", "token"])
def test_bad_settings_are_refused_when_the_layer_is_made(layer, options, option, value, error):
    if option not in inspect.signature(layer).parameters:
        error, message = TypeError, f"unexpected keyword argument '{option}'"
    else:
        message = f"{option} is "
    with pytest.raises(error, match=message):
        layer(**{"normalized_shape": N, **options, option: value})


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float64, 1e300)])
def test_init_std_has_the_range_of_the_parameters(dtype, largest):
    layer = KLLayerNorm(N, dtype=dtype, init_std=largest)
    assert layer.weight_rho.isfinite().all()
    with pytest.raises(
        ValueError, match=r"init_std is 1e\+30., expected a finite number above 0, 1.18e-38 to|2.23e-308"
    ):
        KLLayerNorm(N, dtype=dtype, init_std=1e308 if dtype != torch.float64 else 10**309)


def test_a_deviation_that_a_narrower_dtype_cannot_hold_is_named_at_reset():
    layer = KLLayerNorm(N, init_std=7e4)
    with pytest.raises(ValueError, match=r"init_std is 70000.0, expected .* 6.55e\+04 in torch.float16"):
        layer.half().reset_parameters()


@pytest.mark.parametrize(
    ("option", "value", "plain"),
    [
        ("init_std", Fraction(1, 4), 0.25),
        ("init_std", numpy.float32(0.25), 0.25),
        ("prior_std", Fraction(1, 4), 0.25),
        ("prior_std", 2, 2.0),
        ("eps", Fraction(1, 4), 0.25),
        ("eps", 10**30, 1e30),
        ("eps", numpy.float16(0.25), 0.25),
        ("sample_dim", numpy.int64(1), 1),
    ],
)
@pytest.mark.parametrize("layer", [KLLayerNorm, klnorm.KLRMSNorm, klnorm.KLConditionalLayerNorm])
def test_numbers_of_any_type_mean_the_same(layer, option, value, plain):
    x = torch.randn(3, 4, N)
    torch.manual_seed(0)
    made = layer(N, **{option: value})
    torch.manual_seed(0)
    expected = layer(N, **{option: plain})
    assert type(getattr(made, option)) is type(plain)
    assert torch.equal(seeded(made, x), seeded(expected, x))
    assert torch.equal(klnorm.kl_divergence(made), klnorm.kl_divergence(expected))
    assert torch.equal(made.eval()(x), expected.eval()(x))


NONSENSE = [
    ("normalized_shape", N, TypeError),
    ("normalized_shape", [N], TypeError),
    ("normalized_shape", None, TypeError),
    ("eps", "abc", TypeError),
    ("noise", "rows", ValueError),
    ("noise", numpy.zeros(2), TypeError),
    ("posterior", 3, TypeError),
    ("sample_dim", "abc", TypeError),
    ("prior_std", "abc", TypeError),
    ("prior_std", 1e308, ValueError),
    ("prior_std", numpy.zeros(2), TypeError),
    ("generator", "abc", TypeError),
    ("weight", None, TypeError),
    ("weight_rho", None, TypeError),
]
IN_EVALUATION = "normalized_shape", "eps", "weight"


@pytest.mark.parametrize(("attribute", "value", "error"), NONSENSE)
def test_an_attribute_set_to_nonsense_is_named(attribute, value, error):
    layer, x = KLLayerNorm(N), torch.ones(2, N)
    layer(x)
    setattr(layer, attribute, value)
    with pytest.raises(error, match=attribute):
        layer(x)
    if attribute in IN_EVALUATION:
        with pytest.raises(error, match=attribute):
            layer.eval()(x)
    if attribute == "prior_std":
        with pytest.raises(error, match=attribute):
            klnorm.kl_divergence(layer.eval())


def test_the_remedy_for_a_changed_shape_works():
    layer, x = KLLayerNorm(N), torch.randn(2, N)
    layer.normalized_shape = N
    for training in True, False:
        with pytest.raises(TypeError, match=r"Remedy: layer\.normalized_shape = tuple\(layer\.weight\.shape\)"):
            layer.train(training)(x)
    layer.normalized_shape = tuple(layer.weight.shape)
    assert torch.equal(layer(x), F.layer_norm(x, (N,)))


@pytest.mark.parametrize("layer", [KLLayerNorm, klnorm.KLRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("here", ["cpu", "meta"])
def test_parameters_on_another_device_are_named(layer, dtype, training, here):
    there = "cpu" if here == "meta" else "meta"
    x, layer = torch.zeros(2, N, dtype=dtype, device=here), layer(N, device=there).train(training)
    with pytest.raises(ValueError, match=rf"weight is on {there}, expected {here}.*Remedy: weight\.to\(x\.device\)"):
        layer(x)
    assert layer.to_empty(device=here)(x).shape == x.shape


@pytest.mark.parametrize(
    "shape",
    [torch.tensor([2, 3]).numpy()[0], [2, 3], torch.Size([2, 3]), torch.tensor([2, 3]).numpy(), range(2, 4)],
    ids=repr,
)
def test_takes_every_shape_that_nn_layer_norm_takes(shape):
    assert KLLayerNorm(shape).weight.shape == nn.LayerNorm(shape).weight.shape


def test_representation_names_the_settings():
    text = repr(KLLayerNorm((2, 3), eps=0.5, bias=False, noise="token", sample_dim=1, prior_std=0.25))
    for part in "noise='token'", "sample_dim=1", "prior_std=0.25":
        assert part in text
    assert text.startswith("KL" + repr(nn.LayerNorm((2, 3), eps=0.5, bias=False))[:-1])  # versions of torch differ
