"""`klnorm.KLLayerNorm`: the layer, its modes, its state and its copies."""

import copy
import inspect
import pickle
from fractions import Fraction

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from klnorm import KLLayerNorm
from klnorm.functional import kl_layer_norm

N = 6
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
PARAMETERS = "weight", "bias", "weight_rho", "bias_rho"
STATE = {*PARAMETERS, "weight_prior", "bias_prior"}


def trained(device="cpu", shape=N, **options):
    """A layer whose parameters and priors are all different from what a new one has."""
    layer = KLLayerNorm(shape, device=device, **options)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.add_(torch.randn_like(t) * 0.3)
    return layer


def same_state(layer, other):
    state, expected = layer.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def noise_of(layer, x, seed=0):
    torch.manual_seed(seed)
    return layer(x)


# Construction


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


def test_without_shift(device):
    layer = trained(device, bias=False, noise="batch")
    assert layer.bias is layer.bias_rho is layer.bias_prior is None
    assert layer.state_dict().keys() == {"weight", "weight_rho", "weight_prior"}
    x = torch.randn(4, N, device=device)
    y = noise_of(layer, x)
    xhat = F.layer_norm(x, (N,))
    gamma = (y * xhat).sum(0) / xhat.square().sum(0)  # of the line through 0 nearest to all rows
    # A few roundings of numbers of size 1, where a shift would be seen.
    torch.testing.assert_close(y, gamma * xhat, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.eval()(x), F.layer_norm(x, (N,), layer.weight))


def test_several_normalized_dimensions(device):
    layer, flat = trained(device, (2, 3)), KLLayerNorm(6, device=device)
    flat.load_state_dict({key: value.flatten() for key, value in layer.state_dict().items()})
    assert layer.weight_rho.shape == layer.bias_prior.shape == (2, 3)
    x = torch.randn(4, 5, 2, 3, device=device)
    assert torch.equal(noise_of(layer, x), noise_of(flat, x.flatten(2)).unflatten(2, (2, 3)))
    assert torch.equal(klnorm.kl_divergence(layer), klnorm.kl_divergence(flat))


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
    assert torch.equal(noise_of(made, x), noise_of(expected, x))
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


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("layer", [KLLayerNorm, klnorm.KLConditionalLayerNorm])
def test_a_plain_state_that_is_no_tensor_is_refused_as_by_torch(layer, name, assign):
    def error_of(module):
        with pytest.raises(RuntimeError) as raised:
            module.load_state_dict({"weight": torch.ones(N), "bias": torch.zeros(N), name: "abc"}, assign=assign)
        return str(raised.value).partition("\n")[2]

    assert error_of(layer(N)) == error_of(nn.LayerNorm(N))


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


def test_reset_parameters_restores_a_new_layer(device):
    options = {"init_std": 0.2, "bias": True}
    layer = trained(device, **options)
    parameters = list(layer.parameters())
    assert not same_state(layer, KLLayerNorm(N, device=device, **options))
    layer.reset_parameters()
    assert same_state(layer, KLLayerNorm(N, device=device, **options))
    assert all(p is q for p, q in zip(parameters, layer.parameters(), strict=True))


# Training


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_training_passes_every_setting_to_the_functional(device, noise):
    layer = trained(device, (2, 3), eps=0.3, noise=noise, sample_dim=1, prior_std=0.7)
    x = torch.randn(3, 4, 2, 3, device=device)
    y = noise_of(layer, x)
    torch.manual_seed(0)
    expected, kl = kl_layer_norm(
        x, (2, 3), layer.weight, layer.bias, layer.weight_rho, layer.bias_rho, weight_prior=layer.weight_prior,
        bias_prior=layer.bias_prior, prior_std=0.7, eps=0.3, noise=noise, sample_dim=1,
    )  # fmt: skip
    assert torch.equal(y, expected)
    assert torch.equal(klnorm.kl_divergence(layer), kl)  # y is alive, so this is the KL of that forward


def test_training_noise_is_fresh_and_reproducible(device):
    layer, x = trained(device), torch.randn(3, 4, N, device=device)
    first = noise_of(layer, x, 1)
    assert not torch.isclose(first, layer(x)).all()
    assert torch.equal(first, noise_of(layer, x, 1))
    assert not torch.isclose(first, noise_of(layer, x, 2)).all()


def test_own_generator_makes_the_noise_and_leaves_torchs_alone(device):
    layer, x = trained(device, generator=torch.Generator(device)), torch.randn(3, 4, N, device=device)

    def sampled(own_seed, global_seed):
        layer.generator.manual_seed(own_seed)
        torch.manual_seed(global_seed)
        y = layer(x)
        return y, torch.randn(3, device=device)

    torch.manual_seed(7)
    other = torch.randn(3, device=device)
    first, untouched = sampled(1, 7)
    assert torch.equal(untouched, other)
    assert torch.equal(first, sampled(1, 8)[0])
    assert not torch.equal(first, sampled(2, 7)[0])
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_all_four_parameters_and_the_input_receive_gradients(device, noise):
    layer, x = trained(device, noise=noise), torch.randn(3, 4, N, device=device, requires_grad=True)
    y = layer(x)
    y.backward(torch.randn_like(y))
    for name, tensor in (*layer.named_parameters(), ("x", x)):
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad != 0).all(), name
    assert all(not buffer.requires_grad for buffer in layer.buffers())


@pytest.mark.parametrize(
    "frozen", [("x",), ("weight",), ("weight_rho", "bias_rho"), PARAMETERS, ("x", "bias", "weight")]
)
def test_frozen_parts_get_no_gradient_and_the_others_the_same_one(device, frozen):
    layer, dy = trained(device), torch.randn(3, 4, N, device=device)
    x = torch.randn(3, 4, N, device=device, requires_grad=True)
    tensors = {**dict(layer.named_parameters()), "x": x}

    def gradients():
        for t in tensors.values():
            t.grad = None
        noise_of(layer, x).backward(dy)
        return {name: t.grad for name, t in tensors.items()}

    expected = gradients()
    for name in frozen:
        tensors[name].requires_grad_(False)
    for name, grad in gradients().items():
        assert grad is None if name in frozen else torch.equal(grad, expected[name])


def test_nothing_to_train_makes_no_graph(device):
    layer = trained(device).requires_grad_(False)
    y = layer(torch.randn(3, N, device=device))
    assert not y.requires_grad
    assert not klnorm.kl_divergence(layer).requires_grad


def test_bad_input_in_training_is_explained(device):
    layer = KLLayerNorm(N, device=device, sample_dim=1)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\), expected \(\.\.\., 6\)"):
        layer(torch.zeros(3, 7, device=device))
    with pytest.raises(ValueError, match="sample_dim is 1, expected 0 to 0"):
        layer(torch.zeros(3, N, device=device))


# Evaluation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(N,), (2, 3)])
def test_evaluation_is_layer_norm_with_the_means_bit_for_bit(device, dtype, shape):
    layer = trained(device, shape, dtype=dtype, eps=0.01).eval()
    x = torch.randn(5, 4, *shape, device=device, dtype=dtype)
    torch.manual_seed(3)
    expected_random = torch.rand(2, device=device)
    torch.manual_seed(3)
    y = layer(x)
    assert torch.equal(torch.rand(2, device=device), expected_random)  # evaluation draws nothing
    assert y.dtype == dtype
    assert torch.equal(y, F.layer_norm(x, shape, layer.weight, layer.bias, 0.01))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_the_dtype_of_the_input(device, dtype, parameter_dtype, autocast):
    layer = trained(device, dtype=parameter_dtype)
    x = torch.randn(5, 4, N, device=device, dtype=dtype)
    expected = F.layer_norm(x.double(), (N,), layer.weight.double(), layer.bias.double())
    arithmetic = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    with torch.no_grad():
        layer.weight_rho.fill_(-200)  # no noise to speak of
        layer.bias_rho.fill_(-200)
    for training in False, True:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            y = layer.train(training)(x)
        assert y.dtype == dtype
        # rounded once, from arithmetic in fp32 or fp64 on values below 10
        torch.testing.assert_close(
            y.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=100 * arithmetic, check_dtype=False
        )


def test_evaluation_gives_gradients_to_the_means(device):
    layer, x = trained(device).eval(), torch.randn(5, N, device=device)
    dy = torch.randn_like(x)
    layer(x).backward(dy)
    plain = nn.LayerNorm(N, device=device)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    plain(x).backward(dy)
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert torch.equal(layer.bias.grad, plain.bias.grad)


# Copies and moves


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("own_generator", [False, True])
def test_copies_are_equal_and_independent_even_while_a_graph_is_alive(device, duplicate, own_generator):
    generator = torch.Generator(device).manual_seed(5) if own_generator else None
    layer = trained(device, noise="token", prior_std=0.4, generator=generator)
    x = torch.randn(3, 4, N, device=device)
    y = layer(x)
    kl = klnorm.kl_divergence(layer)
    other = duplicate(layer)
    assert type(other) is KLLayerNorm
    assert same_state(layer, other)
    assert repr(other) == repr(layer)
    assert torch.equal(noise_of(layer, x), noise_of(other, x))
    assert torch.equal(noise_of(layer, x), noise_of(other, x))  # the copies' generators move on separately
    torch.testing.assert_close(klnorm.kl_divergence(other), kl)
    (kl.detach() + y.sum() + klnorm.kl_divergence(other)).backward()  # the copy's KL has a graph of its own
    torch.testing.assert_close(klnorm.kl_divergence(layer), kl)
    with torch.no_grad():
        other.weight.add_(1)
    assert klnorm.kl_divergence(other) > kl + 1
    torch.testing.assert_close(klnorm.kl_divergence(layer), kl)


def test_whole_module_survives_torch_save(device, tmp_path):
    layer, x = trained(device), torch.randn(3, N, device=device)
    y = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert y.requires_grad
    assert same_state(layer, loaded)
    assert torch.equal(noise_of(layer, x), noise_of(loaded, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_to_dtype_casts_parameters_and_priors(device, dtype):
    layer = trained(device)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.to(dtype)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key].to(dtype)), key
    assert layer(torch.randn(3, N, device=device, dtype=dtype)).dtype == dtype


def test_meta_construction_to_empty_and_reset(device):
    with torch.device("meta"):
        implicit = KLLayerNorm(N, init_std=0.3)
    for layer in implicit, KLLayerNorm(N, init_std=0.3, device="meta"), KLLayerNorm(N, init_std=0.3).to("meta"):
        assert all(t.is_meta for t in layer.state_dict().values())
        assert layer(torch.zeros(3, N, device="meta")).shape == (3, N)
        layer.to_empty(device=device)
        layer.reset_parameters()
        assert same_state(layer, KLLayerNorm(N, init_std=0.3, device=device))


# State


def plain_checkpoint(device="cpu", **options):
    plain = nn.LayerNorm(N, device=device, **options)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p))
    return plain.state_dict()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_a_plain_checkpoint_becomes_means_and_prior(device, bias, assign):
    layer, checkpoint = trained(device, bias=bias), plain_checkpoint(device, bias=bias)
    rho = layer.weight_rho.detach().clone()
    given = dict(checkpoint)
    result = layer.load_state_dict(checkpoint, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert checkpoint.keys() == given.keys()
    assert all(checkpoint[key] is given[key] for key in given)
    assert torch.equal(layer.weight, checkpoint["weight"])
    assert torch.equal(layer.weight_prior, checkpoint["weight"])
    assert torch.equal(layer.weight_rho, rho)
    assert layer.bias is None or torch.equal(layer.bias_prior, checkpoint["bias"])
    loaded = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(layer.weight_prior, loaded), "the prior is an alias of the mean"
    with torch.no_grad():
        checkpoint["weight"].add_(1)
    assert torch.equal(layer.weight_prior, loaded), "the prior is an alias of the checkpoint"
    assert layer.weight_rho.requires_grad


def test_a_plain_checkpoint_loads_into_a_nested_model(device):
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, device=device), 2, enable_nested_tensor=False)
    with torch.no_grad():
        for p in plain.parameters():
            p.copy_(torch.randn_like(p))
    model = klnorm.replace_layer_norm(copy.deepcopy(plain))
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(0.5)
    checkpoint = plain.state_dict()
    keys = list(checkpoint)
    model.load_state_dict(checkpoint, strict=True)
    assert list(checkpoint) == keys
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, KLLayerNorm)}
    assert len(layers) == 4
    for name, layer in layers.items():
        assert torch.equal(layer.weight, checkpoint[f"{name}.weight"])
        assert torch.equal(layer.bias_prior, checkpoint[f"{name}.bias"])
        assert (layer.bias_rho == 0.5).all()
    x = torch.randn(5, 3, 8, device=device)
    assert torch.equal(model.eval()(x), plain.eval()(x))


def test_a_plain_checkpoint_assigned_to_a_meta_layer_gives_a_layer_that_works(device):
    layer = KLLayerNorm(N, device="meta", init_std=0.2)
    layer.load_state_dict(plain_checkpoint(device), assign=True)
    y = layer(torch.randn(3, N, device=device))
    assert y.isfinite().all()
    torch.testing.assert_close(F.softplus(layer.weight_rho), torch.full_like(layer.weight, 0.2))


def test_a_plain_checkpoint_of_another_dtype_gives_a_layer_that_works_when_assigned(device):
    layer = KLLayerNorm(N, device=device, dtype=torch.bfloat16)
    layer.load_state_dict(plain_checkpoint(device), assign=True)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert layer(torch.randn(3, N, device=device)).isfinite().all()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_saved_layer_reloads_bit_for_bit(device, dtype, assign, tmp_path):
    layer = trained(device, dtype=dtype)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other = KLLayerNorm(N, device=device, dtype=dtype)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True, assign=assign)
    assert same_state(layer, other)
    assert other.state_dict().keys() == STATE


@pytest.mark.parametrize("missing", sorted(STATE))
def test_a_partly_missing_state_is_reported(device, missing):
    layer = trained(device)
    state = layer.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == [missing]


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (["weight"], {"bias", "bias_rho", "bias_prior"}),
        (["bias"], {"weight", "weight_rho", "bias_rho", "weight_prior", "bias_prior"}),
        (["weight", "bias", "weight_rho", "bias_rho"], {"weight_prior", "bias_prior"}),
        (["weight", "bias", "weight_prior", "bias_prior"], {"weight_rho", "bias_rho"}),
        (["weight", "bias", "bias_rho", "bias_prior"], {"weight_rho", "weight_prior"}),
    ],
)
def test_only_the_state_of_a_plain_layer_is_filled_in(device, kept, missing):
    layer = trained(device)
    state = {key: value for key, value in layer.state_dict().items() if key in kept}
    assert set(layer.load_state_dict(state, strict=False).missing_keys) == missing


def test_an_unexpected_key_is_reported(device):
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"bias"'):
        trained(device, bias=False).load_state_dict(plain_checkpoint(device))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"gamma"'):
        trained(device).load_state_dict({**plain_checkpoint(device), "gamma": torch.zeros(N)})


def test_a_checkpoint_of_another_shape_is_reported(device):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        KLLayerNorm(N + 1, device=device).load_state_dict(plain_checkpoint(device))


def test_rho_stays_when_a_bf16_checkpoint_is_copied_in(device):
    layer = KLLayerNorm(8).to(device)
    before = layer.weight_rho.detach().clone()
    layer.load_state_dict(nn.LayerNorm(8, dtype=torch.bfloat16, device=device).state_dict())
    assert torch.equal(layer.weight_rho, before)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 7), [0.0] * 8, torch.zeros(3, 8, dtype=torch.long)], ids=["shape", "list", "int"]
)
def test_evaluation_checks_its_input(wrong):
    with pytest.raises((TypeError, ValueError), match=r"^x "):
        KLLayerNorm(8).eval()(wrong)


def test_evaluation_does_not_look_at_sample_dim():
    layer = KLLayerNorm(8, sample_dim=1).eval()
    for dtype in torch.float32, torch.bfloat16:
        assert layer(torch.ones(3, 8, dtype=dtype)).dtype == dtype
