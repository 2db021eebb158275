"""`klnorm.replace_rms_norm` and `klnorm.restore_rms_norm`: nn.RMSNorm, and classes told by what they compute."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import klnorm
from klnorm import KLRMSNorm, kl_layers, last_norms, replace_rms_norm, restore_rms_norm
from klnorm.functional import kl_rms_norm

N = 8


class Rms(nn.Module):
    """As in LlamaRMSNorm, but for its names."""

    offset = 0.0

    def __init__(self, n=N, eps=0.01, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), 1.0 - self.offset, **options))
        self.epsilon = eps

    def forward(self, x):
        x32 = x.float()
        xhat = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.scaled(xhat).to(x.dtype)

    def scaled(self, xhat):
        return (self.offset + self.weight.float()) * xhat


class OnePlus(Rms):
    """As in GemmaRMSNorm."""

    offset = 1.0
    kernel_layer_name = "RMSNorm"


class Subclass(nn.RMSNorm):
    pass


class TwoEps(Rms):
    """The eps that counts is the second number, the third attribute with these letters."""

    def __init__(self):
        super().__init__()
        self.steps, self.eps_of_another_use, self.epsilon = "many", 0.5, self.__dict__.pop("epsilon")


class Doubled(Rms):
    def scaled(self, xhat):
        return 2 * super().scaled(xhat)


class Centred(Rms):
    """LayerNorm without shift, as in CohereLayerNorm."""

    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Halves(Rms):
    def forward(self, x):
        return self.scaled(F.rms_norm(x.unflatten(-1, (2, -1)), (N // 2,), None, self.epsilon).flatten(-2))


class EpsOutside(Rms):
    def forward(self, x):
        return self.scaled(x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.epsilon))


class Clipped(Rms):
    def scaled(self, xhat):
        return super().scaled(xhat.clamp(-1, 1))


class ClippedFarOut(Rms):
    def scaled(self, xhat):
        return super().scaled(xhat.clamp(-2.7, 2.7))  # of at most 8 ** 0.5


class ClippedOutput(Rms):
    def scaled(self, xhat):
        return super().scaled(xhat).clamp(-40, 40)


class ClippedInput(Rms):
    def forward(self, x):
        return super().forward(x.clamp(-1e3, 1e3))


class Absolute(Rms):
    def scaled(self, xhat):
        return self.weight.abs() * xhat


class Dropping(Rms):
    """Another function in training mode."""

    def scaled(self, xhat):
        return super().scaled(F.dropout(xhat, 0.5, self.training))


class OnlyInTraining(Rms):
    def forward(self, x):
        return super().forward(x) if self.training else x


class OtherEps(Rms):
    def __init__(self):
        super().__init__(eps=1.001 * 0.01)
        self.epsilon, self.used = 0.01, self.epsilon

    def forward(self, x):
        return self.scaled(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.used))


class OtherEpsThanNone(Rms):
    """Where nn.RMSNorm takes that of fp32."""

    def __init__(self):
        super().__init__(eps=None)

    def forward(self, x):
        return self.scaled(F.rms_norm(x, (N,), None, 1e-6))


class OneMoreDimension(Rms):
    def forward(self, x):
        return super().forward(x)[None]


class Failing(Rms):
    def forward(self, x):
        raise KeyError("this class wants something else")


class OtherDtype(Rms):
    def forward(self, x):
        return super().forward(x).double()


class Gated(Rms):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate))


class NoEps(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, x):
        return F.rms_norm(x, (N,), self.weight, 1e-6)


class WithChild(Rms):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.1)


class WithBuffer(Rms):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


class WithBias(Rms):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(N))


class OneScale(Rms):
    """One number for all features."""

    def __init__(self):
        super().__init__(1)


class NoDimension(Rms):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))


class Unweighted(Rms):
    def __init__(self):
        super().__init__()
        self.weight = None


class Broadcast(Rms):
    """Features are the last dimension alone, and the one before has any size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, N))


class Empty(Rms):
    def __init__(self):
        super().__init__(0)


class IntegerScale(Rms):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N, dtype=torch.int64), requires_grad=False)


class Inner(Rms):
    """Its methods have names that come to mind, and what else it could use is None."""

    def __init__(self):
        super().__init__()
        self.bias = None
        self.register_parameter("gain", None)
        self.register_buffer("shift", None)
        self.register_module("gate", None)

    def _normalize(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)

    _rms = _normalize

    def forward(self, x):
        y = self.scaled(self._rms(x.float())).to(x.dtype)
        return y if self.bias is self.gain is self.shift is self.gate is None else y + 1


SIMILAR = (
    Doubled, Halves, EpsOutside, Clipped, ClippedFarOut, ClippedInput, ClippedOutput, Absolute, Dropping,
    OnlyInTraining, OtherEps, OtherEpsThanNone, OtherDtype, OneMoreDimension, Failing,
)  # fmt: skip
NO_NORMS = Centred, Gated, NoEps, WithChild, WithBuffer, WithBias, OneScale, NoDimension, Unweighted, Broadcast, Empty
FOREIGN = Rms, OnePlus, Subclass, TwoEps, Inner


def model_of(*layers):
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def new(kind, device="cpu"):
    return model_of(kind(N) if issubclass(kind, nn.RMSNorm) else kind()).to(device)[0]


def snapshot(model):
    """Everything about the modules of a model that a failed call must leave as it was."""
    return [
        (name, type(module), dict(vars(module)), list(module._parameters.items()), list(module._buffers.items()))
        for name, module in model.named_modules()
    ]


# What is replaced


def test_an_nn_rms_norm_becomes_a_kl_rms_norm(device):
    generator = torch.Generator(device)
    options = {"noise": "token", "sample_dim": 1, "init_std": 0.3, "prior_std": 0.7, "generator": generator}
    model = model_of(nn.RMSNorm(N, eps=0.25), nn.RMSNorm((2, 4)), nn.RMSNorm(N, elementwise_affine=False)).to(device)
    before, parameters = copy.deepcopy(model), list(model.parameters())
    assert replace_rms_norm(model, **options) is model
    assert [type(module) for module in model] == [KLRMSNorm, KLRMSNorm, nn.RMSNorm]
    for layer, plain, parameter in zip(model, before, parameters, strict=False):
        assert layer.weight is parameter
        assert torch.equal(layer.weight_prior, plain.weight)
        assert (layer.eps, layer.normalized_shape) == (plain.eps, plain.normalized_shape)
        assert {key: getattr(layer, key) for key in options} == options
        torch.testing.assert_close(F.softplus(layer.weight_rho), torch.full_like(layer.weight, 0.3))
        x = torch.randn(3, *layer.normalized_shape, device=device)
        assert torch.equal(layer.eval()(x), plain(x))


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_foreign_class_keeps_its_evaluation_bit_for_bit(device, kind, dtype):
    model = model_of(new(kind, device)).to(dtype)
    x = torch.randn(3, N, device=device, dtype=dtype)
    y = model(x)
    replace_rms_norm(model)
    layer = model[0]
    assert type(layer).__name__ == f"KL{kind.__name__}"
    assert isinstance(layer, kind)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    assert torch.equal(model.eval()(x), y)
    assert not torch.isclose(model.train()(x), y).all()
    assert list(kl_layers(model)) == ["0"]


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_training_is_the_functional_with_the_scale_that_the_class_means(device, kind, noise):
    layer = replace_rms_norm(new(kind, device), noise=noise, sample_dim=1, prior_std=0.7, init_std=0.2)
    with torch.no_grad():
        layer.weight_prior.add_(torch.randn(N, device=device))
    x, dy = torch.randn(3, 4, N, device=device, requires_grad=True), torch.randn(3, 4, N, device=device)
    offset, eps = (1, 0.01) if kind is OnePlus else (0, None if kind is Subclass else 0.01)
    results = []
    for function in (
        lambda: (layer(x), klnorm.kl_divergence(layer)),
        lambda: kl_rms_norm(
            x, N, layer.weight, layer.weight_rho, weight_prior=layer.weight_prior, weight_offset=offset, prior_std=0.7,
            eps=eps, noise=noise, sample_dim=1,
        ),
    ):  # fmt: skip
        torch.manual_seed(0)
        y, kl = function()
        gradients = torch.autograd.grad([y, kl], [x, layer.weight, layer.weight_rho], [dy, kl.new_tensor(0.3)])
        results.append((y, kl, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_plus_weight_is_not_rounded_to_the_dtype_of_the_weight(device):
    layer = replace_rms_norm(OnePlus().to(device, torch.bfloat16), prior_std=0.1)
    with torch.no_grad():
        layer.weight.fill_(2**-10)  # 1 + 2**-10 is 1 in bf16
        layer.weight_rho.fill_(-200.0)
    x = torch.randn(3, N, device=device)
    y = layer(x)
    # fp32 arithmetic on values below 4
    torch.testing.assert_close(y, (1 + 2**-10) * F.rms_norm(x, (N,), None, 0.01), rtol=1e-6, atol=1e-6)
    with_prior_at_0, layer.weight_prior[:] = layer.kl_divergence(), layer.weight.detach()
    distance = N * 2**-20 / (2 * 0.1**2)
    # a difference of two sums of about 1600 nats
    torch.testing.assert_close(with_prior_at_0 - layer.kl_divergence(), torch.tensor(distance).to(y), rtol=0, atol=5e-4)


def test_a_scale_that_is_the_weight_is_not_copied():
    layer = replace_rms_norm(new(Rms).bfloat16())
    posterior = layer.posterior_and_prior()
    assert posterior.weight is layer.weight
    assert posterior.weight_prior is layer.weight_prior


def test_divergence_of_one_plus_weight_is_the_same_from_the_forward_and_in_closed_form(device):
    for posterior in "sampled", "deterministic":
        layer = replace_rms_norm(new(OnePlus, device), posterior=posterior, prior_std=0.5)
        y = layer(torch.randn(3, N, device=device))
        from_forward = layer._take_kl()
        assert from_forward.grad_fn is y.grad_fn
        parameters = list(layer.parameters())
        assert len(parameters) == (2 if posterior == "sampled" else 1)
        gradients = torch.autograd.grad(from_forward, parameters)
        del y
        closed = layer.kl_divergence()
        torch.testing.assert_close(from_forward, closed)
        torch.testing.assert_close(gradients, torch.autograd.grad(closed, parameters))
        if posterior == "deterministic":
            expected = torch.distributions.Normal(torch.zeros_like(layer.weight), 1 + layer.weight)
            prior = torch.distributions.Normal(torch.zeros_like(layer.weight), 0.5)
            # the floor, 5e-4 in a deviation of about 1, takes 1e-7 nats
            torch.testing.assert_close(closed, torch.distributions.kl_divergence(expected, prior).sum())


@pytest.mark.parametrize("kind", [*SIMILAR, *NO_NORMS])
def test_what_computes_something_else_is_left_alone(kind):
    model = model_of(Rms(), kind())
    before = snapshot(model)[2]
    replace_rms_norm(model)
    assert list(kl_layers(model)) == ["0"]
    assert snapshot(model)[2] == before


@pytest.mark.parametrize("kind", SIMILAR)
def test_what_only_looks_like_an_rms_norm_is_refused_where_a_filter_chooses_it(kind):
    model = model_of(Rms(), kind())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"layer '1' is a {kind.__name__}, which computes something else.*filter_fn"):
        replace_rms_norm(model, filter_fn=lambda module, name: True)
    assert snapshot(model) == before


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_every_width_is_told(n):
    model = nn.Sequential(Rms(n), OnePlus(n), Centred(n), Absolute(n), Doubled(n))
    assert list(kl_layers(replace_rms_norm(model))) == ["0", "1"]


def test_the_widest_centred_norm_is_told():
    model = nn.Sequential(Rms(), Centred(2**20))
    assert list(kl_layers(replace_rms_norm(model))) == ["0"]


def test_a_class_for_inference_that_works_in_place_is_replaced():
    class InPlace(Rms):
        def forward(self, x):
            x *= torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)
            return torch.mul(x, self.weight, out=torch.empty_like(x))

    assert list(kl_layers(replace_rms_norm(nn.Sequential(InPlace())))) == ["0"]


def test_a_negative_eps_is_no_norms():
    assert list(kl_layers(replace_rms_norm(nn.Sequential(Rms(eps=-0.01), Rms())))) == ["1"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_norm_and_one_of_integers_are_left_alone():
    model = nn.Sequential(torch.jit.script(nn.RMSNorm(N)), IntegerScale(), Rms())
    assert list(kl_layers(replace_rms_norm(model))) == ["2"]


@pytest.mark.parametrize("name", ["noise", "posterior", "kl_divergence", "_evaluate"])
def test_a_class_that_uses_names_of_kl_layers_is_refused(name):
    of_class, of_instance = type("Own", (Rms,), {name: 0.0})(), Rms()
    vars(of_instance)[name] = 0.0
    for layer in of_class, of_instance:
        model = nn.Sequential(nn.RMSNorm(N), layer)
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"names of its own that KL layers use \({name}\).*filter_fn"):
            replace_rms_norm(model)
        assert snapshot(model) == before


def test_filter_is_asked_for_what_is_built_like_an_rms_norm():
    kinds = [nn.RMSNorm, Subclass, nn.LayerNorm, nn.Linear]
    model = model_of(*(kind(N) if kind is not nn.Linear else kind(N, N) for kind in kinds))
    model.extend([nn.LayerNorm(N, bias=False), *(kind() for kind in (*SIMILAR, *NO_NORMS, OnePlus))])
    asked = {}
    replace_rms_norm(model, filter_fn=lambda module, name: asked.setdefault(name, type(module)) is OnePlus)
    assert list(asked.values()) == [nn.RMSNorm, Subclass, *SIMILAR, OnePlus]
    assert [type(layer).__name__ for layer in kl_layers(model).values()] == ["KLOnePlus"]


def test_last_norms_count_rms_norms_and_those_replaced_already():
    model = model_of(nn.RMSNorm(N), Rms(), Doubled(), nn.LayerNorm(N), OnePlus(), Gated())
    for _ in range(2):
        assert list(kl_layers(replace_rms_norm(model, filter_fn=last_norms(2)))) == ["1", "4"]
    with pytest.raises(ValueError, match="k is 4, expected at most 3"):
        replace_rms_norm(model, filter_fn=last_norms(4))


def test_the_two_kinds_of_norm_do_not_meet():
    model = model_of(nn.LayerNorm(N), nn.RMSNorm(N), Rms())
    before = snapshot(model)
    assert list(kl_layers(klnorm.replace_layer_norm(model))) == ["0"]
    assert list(kl_layers(replace_rms_norm(model))) == ["0", "1", "2"]
    assert list(kl_layers(restore_rms_norm(model))) == ["0"]
    assert snapshot(klnorm.restore_layer_norm(model)) == before


def test_a_model_without_rms_norms_warns():
    with pytest.warns(UserWarning, match=r"found no RMSNorm to replace.*replace_layer_norm"):
        replace_rms_norm(model_of(nn.LayerNorm(N)))


@pytest.mark.filterwarnings("error")
def test_replacing_twice_changes_nothing_more():
    model = replace_rms_norm(model_of(nn.RMSNorm(N), OnePlus()))
    before = snapshot(model)
    assert snapshot(replace_rms_norm(model, noise="batch")) == before


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
def test_replacing_again_does_not_disturb_a_forward(kind):
    layer = replace_rms_norm(new(kind), posterior="deterministic")
    y = layer(torch.randn(3, N))
    replace_rms_norm(layer)
    assert layer._take_kl().grad_fn is y.grad_fn


def test_trying_out_leaves_no_trace(device):
    model, calls = model_of(new(OnePlus, device)), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    state, weight, training = torch.get_rng_state(), model[0].weight.clone(), model[0].training
    replace_rms_norm(model)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight, weight)
    assert model[0].weight.grad is None
    assert model[0].training == training
    model(torch.randn(2, N, device=device))
    assert calls == [1]


def test_on_the_meta_device(device):
    plain = model_of(new(OnePlus, device))
    with torch.device("meta"):
        model = replace_rms_norm(nn.Sequential(OnePlus(), Doubled(), nn.RMSNorm(N)))
        assert list(kl_layers(model)) == ["0", "2"]
    assert model[0].weight_rho.is_meta
    model[:1].load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(3, N, device=device)
    assert torch.equal(model[0].eval()(x), plain(x))
    assert torch.equal(model[0].weight_prior, plain[0].weight)
    torch.testing.assert_close(F.softplus(model[0].weight_rho), torch.full_like(plain[0].weight, 0.05))


def parametrized(layer):
    return parametrizations.weight_norm(layer, "weight", dim=0)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 2)


def with_own_forward(layer):
    """As accelerate's hooks leave a module."""
    layer.forward = lambda x: type(layer).forward(layer, x)
    return layer


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pruned, "computes its weight"),
        (parametrized, r"is parametrized.*remove_parametrizations"),
        (with_own_forward, "has a forward that accelerate or another library put into it.*replace or restore first"),
    ],
)
def test_a_norm_without_plain_parameters_is_refused_unless_left_out(kind, spoil, message):
    layer = kind((2, N) if spoil is parametrized and kind is nn.RMSNorm else N)
    if spoil is parametrized and kind is Rms:
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    else:
        spoil(layer)
    model = model_of(nn.RMSNorm(N), layer)
    types = [type(module) for module in model]
    with pytest.raises(ValueError, match=rf"layer '1' {message}.*leave it out with filter_fn"):
        replace_rms_norm(model)
    assert [type(module) for module in model] == types
    assert list(kl_layers(replace_rms_norm(model, filter_fn=lambda module, name: name == "0"))) == ["0"]


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
def test_a_weight_of_a_dtype_that_the_operator_cannot_read_is_refused(kind):
    with pytest.raises(ValueError, match=r"holds its weight as a Tensor of torch\.float8_e4m3fn"):
        replace_rms_norm(kind(N).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_parameter_that_was_shared_out_is_refused(kind):
    layer = kind(N)
    layer.weight.data = torch.empty(0)  # as DeepSpeed leaves it
    with pytest.raises(ValueError, match=r"holds its weight in shape \(0,\), not \(8,\)"):
        (replace_rms_norm if kind is nn.RMSNorm else klnorm.replace_layer_norm)(layer)


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_no_weight_and_no_features_are_refused(kind):
    replace, layer = replace_rms_norm if kind is nn.RMSNorm else klnorm.replace_layer_norm, kind(N)
    layer.weight = None
    with pytest.raises(ValueError, match="computes its weight"):
        replace(layer)
    with pytest.raises(ValueError, match=r"normalized_shape is \(0,\), expected a positive int"):
        replace(kind(0))


def test_a_layer_norm_with_a_forward_of_its_own_is_refused_too():
    with pytest.raises(ValueError, match="has a forward that accelerate or another library put into it"):
        klnorm.replace_layer_norm(model_of(with_own_forward(nn.LayerNorm(N))))


def test_a_bad_eps_is_refused():
    model = model_of(nn.RMSNorm(N, eps=-1e-6))
    with pytest.raises(ValueError, match=r"eps is -1e-06, expected a finite number of 0 or more"):
        replace_rms_norm(model)
    assert type(model[0]) is nn.RMSNorm


@pytest.mark.parametrize("kind", [nn.RMSNorm, Rms])
def test_an_eps_of_0_is_replaced_and_zeros_stay_zeros(kind):
    model = replace_rms_norm(model_of(kind(N, eps=0.0)))
    x = torch.zeros(3, N, requires_grad=True)
    y = model[0](x)
    y.sum().backward()
    assert list(kl_layers(model).values()) == [model[0]]
    assert not y.any()
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("option", "value"), [("noise", "nope"), ("init_std", 0.0), ("prior_std", -1.0), ("prior", "x"), ("posterior", "x")]
)
def test_a_bad_argument_leaves_the_model_unchanged(option, value):
    model = model_of(nn.RMSNorm(N), Rms())
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{option} is "):
        replace_rms_norm(model, **{option: value})
    assert snapshot(model) == before


# Replaced layers


@pytest.mark.parametrize("kind", [Rms, OnePlus])
def test_the_standard_prior_is_around_a_scale_of_1(kind):
    plain = new(kind)
    layer = replace_rms_norm(copy.deepcopy(plain), prior="standard")
    standard = torch.full((N,), 1.0 - kind.offset)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_prior, standard)
    layer.load_state_dict({"weight": torch.full((N,), 3.0)})
    assert torch.equal(layer.weight_prior, standard)
    layer.reset_parameters()
    assert torch.equal(layer.weight, standard)
    x = torch.randn(3, N)
    torch.testing.assert_close(layer.eval()(x), F.rms_norm(x, (N,), None, 0.01))


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints(kind, tmp_path):
    model = model_of(replace_rms_norm(new(kind)))
    with torch.no_grad():
        model[0].weight_prior.add_(1.0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = replace_rms_norm(model_of(new(kind)))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(klnorm.kl_divergence(model), klnorm.kl_divergence(other))
    plain = model_of(new(kind))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other[0].weight, plain[0].weight)
    assert torch.equal(other[0].weight_prior, plain[0].weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", FOREIGN)
def test_copies_are_of_the_same_class(kind, duplicate):
    layer, x = replace_rms_norm(new(kind), noise="token"), torch.randn(3, N)
    y = layer(x)
    other = duplicate(layer)
    assert y.requires_grad
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    for mode in True, False:
        torch.manual_seed(0)
        y = layer.train(mode)(x)
        torch.manual_seed(0)
        assert torch.equal(other.train(mode)(x), y)
    assert torch.equal(klnorm.kl_divergence(other), klnorm.kl_divergence(layer))
    assert type(restore_rms_norm(other)) is kind


@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_summary_has_the_divergence(posterior):
    model = replace_rms_norm(model_of(OnePlus()), posterior=posterior)
    row = klnorm.summary(model).layers["0"]
    assert row.scale.kl == pytest.approx(klnorm.kl_divergence(model).item(), rel=1e-5)
    deviation = F.softplus(model[0].weight_rho) if posterior == "sampled" else (1 + model[0].weight).abs()
    assert row.scale.deviation == pytest.approx(deviation.mean().item(), rel=1e-5)


def test_sampling_and_optimizer_groups_know_it():
    model = replace_rms_norm(model_of(Rms(), nn.Linear(N, 3)), init_std=0.5).eval()
    x = torch.randn(4, N)
    with klnorm.sampling(model):
        assert not torch.isclose(model(x), model(x)).any()
    assert torch.equal(model(x), model(x))
    groups = {group["name"]: group["params"] for group in klnorm.param_groups(model, lr=1e-3)}
    assert groups["rho"] == [model[0].weight_rho]
    assert any(p is model[0].weight for p in groups["no_decay"])


def test_a_name_by_which_a_library_would_put_in_its_kernel_is_hidden_while_replaced():
    layer = replace_rms_norm(OnePlus())
    assert type(layer).kernel_layer_name is None
    assert type(restore_rms_norm(layer)).kernel_layer_name == "RMSNorm"


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_layers_have_the_same_divergence(process_group):
    from torch.distributed.fsdp import fully_shard

    layer = replace_rms_norm(new(OnePlus))
    with torch.no_grad():
        layer.weight.add_(0.2)
    expected = klnorm.kl_divergence(layer)
    gradient = torch.autograd.grad(expected, layer.weight)[0]
    kl = klnorm.kl_divergence(fully_shard(layer))
    torch.testing.assert_close(kl, expected)
    kl.backward()
    torch.testing.assert_close(klnorm.compat.whole(layer.weight.grad), gradient)


def sharded(model, part):
    """`model` under FSDP2, as a whole or in its layers."""
    from torch.distributed.fsdp import fully_shard

    for module in [model] if part == "model" else model:
        fully_shard(module)
    return model


KINDS = {
    nn.RMSNorm: (replace_rms_norm, restore_rms_norm),
    Rms: (replace_rms_norm, restore_rms_norm),
    nn.LayerNorm: (klnorm.replace_layer_norm, klnorm.restore_layer_norm),
}


@pytest.mark.parametrize("part", ["model", "layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_not_replaced(process_group, kind, part):
    model = sharded(nn.Sequential(kind(N), nn.Linear(N, N)), part)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"wrapped by FSDPModule.*replace the norms first"):
            KINDS[kind][0](model)
        model(torch.randn(2, N))  # after which the parameters of the root are plain ones
    assert kl_layers(model) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_under_fsdp1_is_neither_replaced_nor_restored(kind):
    replace, restore = KINDS[kind]
    stand_in = type("FullyShardedDataParallel", (nn.Sequential,), {})  # the real one needs a GPU
    with pytest.raises(ValueError, match="wrapped by FullyShardedDataParallel"):
        replace(stand_in(kind(N)))
    with pytest.raises(ValueError, match="sharded by FSDP"):
        restore(stand_in(replace(kind(N))))


@pytest.mark.parametrize("part", ["model", "layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_is_not_restored_but_one_with_its_state_is(process_group, kind, part):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    replace, restore = KINDS[kind]
    plain = replace(nn.Sequential(kind(N), nn.Linear(N, N)))
    model = sharded(copy.deepcopy(plain), part)
    with torch.no_grad():
        model[0].weight.add_(0.3)
    for layer in model, model[0]:
        with pytest.raises(ValueError, match=r"sharded by FSDP.*Remedy: load its full state dict"):
            restore(layer)
    x = torch.randn(2, N)
    y = model.eval()(x)
    with pytest.raises(ValueError, match="sharded by FSDP"):
        restore(model)
    assert list(kl_layers(model)) == ["0"]
    plain.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    assert torch.equal(restore(plain).eval()(x), y)
    other = klnorm.restore_layer_norm if kind is not nn.LayerNorm else restore_rms_norm
    assert other(model) is model  # has no layer to restore


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(device, training, fresh_dynamo):
    model = replace_rms_norm(model_of(new(OnePlus, device), new(Rms, device))).train(training)
    x, dy = torch.randn(3, 4, N, device=device), torch.randn(3, 4, N, device=device)

    def loss(x):
        return (model(x) * dy).sum() + klnorm.kl_divergence(model)

    results = []
    for function in loss, torch.compile(loss, backend="aot_eager", fullgraph=True):
        torch.manual_seed(0)
        value = function(x)
        results.append((value, *torch.autograd.grad(value, list(model.parameters()))))
    # The KL is a by-product of the forward in eager and in closed form where it is traced.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


# Restoration


@pytest.mark.parametrize("kind", [*FOREIGN, nn.RMSNorm])
def test_restoring_gives_back_the_class_and_the_evaluation_bit_for_bit(kind):
    model = nn.Sequential(new(kind))
    model[0].register_forward_hook(lambda *_: None)
    before, x = snapshot(model), torch.randn(3, N)
    replace_rms_norm(model)
    kept_alive = model(x)  # a restored layer must not depend on this graph
    with torch.no_grad():
        model[0].weight.add_(0.1)
        expected = model.eval()(x)
        model.train()
    assert restore_rms_norm(model) is model
    assert kept_alive.requires_grad
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [*FOREIGN, nn.RMSNorm])
def test_a_layer_with_a_forward_put_into_it_is_not_restored(kind):
    model = replace_rms_norm(nn.Sequential(nn.RMSNorm(N), with_own_forward(replace_rms_norm(new(kind)))))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '1' has a forward that accelerate .*restore first") as raised:
        restore_rms_norm(model)
    assert "filter_fn" not in str(raised.value)
    assert snapshot(model) == before
    del model[1].forward
    assert kl_layers(restore_rms_norm(model)) == {}


def test_restoring_leaves_a_users_subclass_and_refuses_a_parametrized_layer():
    class Own(KLRMSNorm):
        pass

    model = nn.Sequential(Own(N), replace_rms_norm(Rms()))
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match="layer '1' is parametrized"):
        restore_rms_norm(model)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert [type(module) for module in restore_rms_norm(model)] == [Own, Rms]
