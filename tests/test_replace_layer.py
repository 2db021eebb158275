"""`klnorm.replace_layer_norm` on LayerNorm classes that are not torch's: told by what they compute."""

import abc
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from rms_classes import N, model_of
from torch import nn
from trained_layers import assert_compiles, assert_same_layer
from unchanged import assert_unchanged, graph

import klnorm
from klnorm import kl_layers, last_norms, replace_layer_norm, replace_rms_norm, restore_layer_norm
from klnorm.functional import kl_layer_norm


class Deberta(nn.Module):
    """As DebertaLayerNorm in transformers."""

    offset = 0

    def __init__(self, n=N, eps=0.01):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n) - self.offset)
        self.bias = nn.Parameter(torch.zeros(n))
        self.variance_epsilon = eps

    def forward(self, x):
        x32 = x.float()
        centred = x32 - x32.mean(-1, keepdim=True)
        xhat = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.scaled(xhat).to(x.dtype)

    def scaled(self, xhat):
        return (self.offset + self.weight.float()) * xhat + self.bias.float()


class Cohere(Deberta):
    """As CohereLayerNorm: without shift, and without the name of one."""

    def __init__(self, n=N):
        super().__init__(n)
        del self.bias

    def scaled(self, xhat):
        return self.weight.float() * xhat


class CohereOnePlus(Cohere):
    offset = 1

    def scaled(self, xhat):
        return (1 + self.weight.float()) * xhat


class OnePlus(Deberta):
    offset = 1


class Nemotron(nn.LayerNorm):
    """As NemotronLayerNorm1P."""

    offset = 1

    def __init__(self, n=N, **options):
        super().__init__(n, eps=0.01, **options)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class Timm(nn.LayerNorm):
    """As LayerNorm of timm, whose constructor has arguments of its own."""

    offset = 0

    def __init__(self, num_channels=N, eps=0.01, affine=True, **options):
        super().__init__(num_channels, eps=eps, elementwise_affine=affine, **options)
        self._fast_norm = False

    def forward(self, x):
        assert not self._fast_norm
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class EpsOfAnInt(Deberta):
    def __init__(self):
        super().__init__(eps=1)


class Timm2d(Timm):
    """As LayerNorm2d of timm, over dimension 1."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PerHead(Cohere):
    """As CohereLayerNorm over queries: over the last of two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4))


class StdNorm(Deberta):
    """Divides by the deviation plus eps."""

    def forward(self, x):
        return self.scaled((x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 0.01))


class Rms(Cohere):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class RmsWithShift(Deberta):
    def forward(self, x):
        return self.scaled(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class RmsOfLayerNorm(nn.LayerNorm):
    """An RMSNorm that inherits from nn.LayerNorm."""

    def __init__(self):
        super().__init__(N, bias=False)

    def forward(self, x):
        return F.rms_norm(x, (N,), self.weight, self.eps)


class Conditioned(Timm):
    def forward(self, x, condition=None):
        return super().forward(x if condition is None else x * condition)


class AnyNumber(Timm):
    def forward(self, *inputs):
        return super().forward(sum(inputs))


class StdConv2d(nn.Conv2d):
    """As in timm: a convolution with an eps."""

    def __init__(self):
        super().__init__(N, N, 1)
        self.eps = 1e-6


class CosineHead(Deberta):
    """A classifier with an eps."""

    def forward(self, x):
        return F.normalize(x, eps=self.variance_epsilon) * self.weight + self.bias


class Slotted(Timm):
    __slots__ = ("note",)


class Abstract(Timm, abc.ABC):
    pass


FOREIGN = Deberta, Cohere, CohereOnePlus, OnePlus, Nemotron, Timm, EpsOfAnInt, Slotted, Abstract
SIMILAR = Timm2d, PerHead, StdNorm, RmsWithShift


def eps_of(layer):
    return layer.eps if isinstance(layer, nn.LayerNorm) else layer.variance_epsilon


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_foreign_class_is_found_and_keeps_its_evaluation_bit_for_bit(device, kind, dtype):
    model = model_of(kind()).to(device, dtype)
    before, keys = graph(copy.deepcopy(model))[1], vars(model[0]).keys()
    x, weight = torch.randn(3, N, device=device, dtype=dtype), model[0].weight
    y = model(x)
    assert replace_layer_norm(model) is model
    layer = model[0]
    assert type(layer).__name__ == f"KL{kind.__name__}"
    assert isinstance(layer, kind)
    assert layer.weight is weight
    assert torch.equal(model.eval()(x), y)
    assert not torch.isclose(model.train()(x), y).all()
    assert list(kl_layers(model)) == ["0"]
    restore_layer_norm(model)
    assert type(model[0]) is kind
    assert vars(model[0]).keys() == keys
    assert torch.equal(model(x), y)
    assert all(torch.equal(a, b) for a, b in zip(graph(model)[1], before, strict=True))


@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_training_is_the_functional_with_the_scale_that_the_class_means(device, kind, noise):
    plain = model_of(kind()).to(device)
    layer = replace_layer_norm(plain, noise=noise, sample_dim=1, prior_std=0.7, init_std=0.2)[0]
    shift = layer.bias is not None
    with torch.no_grad():
        for prior in (layer.weight_prior, layer.bias_prior) if shift else (layer.weight_prior,):
            prior.add_(torch.randn(N, device=device))
    x, dy = torch.randn(3, 4, N, device=device, requires_grad=True), torch.randn(3, 4, N, device=device)
    results = []
    for function in (
        lambda: (layer(x), klnorm.kl_divergence(layer)),
        lambda: kl_layer_norm(
            x, N, layer.weight, layer.bias, layer.weight_rho, layer.bias_rho,
            weight_prior=layer.weight_prior, weight_offset=kind.offset, bias_prior=layer.bias_prior if shift else 0.0,
            prior_std=0.7, eps=eps_of(layer), noise=noise, sample_dim=1,
        ),
    ):  # fmt: skip
        torch.manual_seed(0)
        y, kl = function()
        gradients = torch.autograd.grad([y, kl], [x, *layer.parameters()], [dy, kl.new_tensor(0.3)])
        results.append((y, kl, *gradients))
    assert len(list(layer.parameters())) == (4 if shift else 2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_divergence_is_the_same_from_the_forward_in_closed_form_and_in_the_summary(device, kind, posterior):
    layer = replace_layer_norm(model_of(kind()).to(device), posterior=posterior, prior_std=0.5)[0]
    y = layer(torch.randn(3, N, device=device))
    from_forward = klnorm.kl_divergence(layer)
    assert layer._take_kl() is not None
    del y
    closed = klnorm.kl_divergence(copy.deepcopy(layer))
    torch.testing.assert_close(from_forward, closed)
    assert klnorm.summary(layer).total.kl == pytest.approx(closed.item(), rel=1e-5)
    count = (1 if posterior == "deterministic" or layer.bias is None else 2) * N
    assert layer.count_posteriors() == count


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_standard_prior_is_around_scale_1_and_shift_0(kind):
    plain = model_of(kind())[0]
    layer = replace_layer_norm(copy.deepcopy(plain), prior="standard")
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_prior, torch.full((N,), 1.0 - kind.offset))
    assert layer.bias is None or torch.equal(layer.bias_prior, torch.zeros(N))
    layer.reset_parameters()
    x = torch.randn(3, N)
    # the classes that write the norm out round in another order
    torch.testing.assert_close(layer.eval()(x), F.layer_norm(x, (N,), None, None, eps_of(plain)))


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_of_replaced_and_of_plain_models(kind):
    model, other, plain = replace_layer_norm(model_of(kind())), replace_layer_norm(model_of(kind())), model_of(kind())
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(klnorm.kl_divergence(model), klnorm.kl_divergence(other))
    other.load_state_dict(plain.state_dict(), strict=True)
    for name, value in plain[0].named_parameters():
        assert torch.equal(getattr(other[0], f"{name}_prior"), value)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", FOREIGN)
def test_copies_are_of_the_same_class(kind, duplicate):
    layer, x = replace_layer_norm(model_of(kind())[0], noise="token"), torch.randn(3, N)
    other = duplicate(layer)
    assert_same_layer(other, layer, x)
    assert type(restore_layer_norm(other)) is kind


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(training, fresh_dynamo):
    model = replace_layer_norm(model_of(Cohere(), Nemotron(), Deberta())).train(training)
    assert_compiles(model, torch.randn(3, 4, N), atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 1000])
def test_every_width_is_told(n):
    model = nn.Sequential(Deberta(n), Cohere(n), OnePlus(n), CohereOnePlus(n), Rms(n), RmsWithShift(n), StdNorm(n))
    replace_layer_norm(model, filter_fn=lambda module, name: int(name) < 4)
    assert list(kl_layers(model)) == ["0", "1", "2", "3"]


def test_the_two_kinds_of_norm_do_not_meet():
    model = model_of(*(kind() for kind in (*FOREIGN, Rms, RmsOfLayerNorm)))
    before = graph(model)
    replace_layer_norm(model)
    assert list(kl_layers(model)) == [str(i) for i in range(len(FOREIGN))]
    replace_rms_norm(model)
    assert len(kl_layers(model)) == len(FOREIGN) + 2
    assert len(kl_layers(restore_layer_norm(model))) == 2
    assert_unchanged(klnorm.restore_rms_norm(model), before)


def test_filter_and_last_norms_see_what_is_built_like_a_layer_norm():
    kinds = [Deberta, Rms, Timm2d, Cohere, StdNorm, Conditioned, RmsOfLayerNorm, nn.Identity]
    model, asked = model_of(nn.RMSNorm(N), *(kind() for kind in kinds), nn.GroupNorm(2, N)), []
    with pytest.warns(UserWarning, match="filter_fn chose none of 1 Deberta, 1 Cohere"):
        replace_layer_norm(model, filter_fn=lambda module, name: bool(asked.append(type(module))))
    assert asked == [Deberta, Timm2d, Cohere, StdNorm, Conditioned]
    assert list(kl_layers(replace_layer_norm(model, filter_fn=last_norms(1)))) == ["4"]
    with pytest.raises(ValueError, match="k is 3, expected at most 2"):
        replace_layer_norm(model, filter_fn=last_norms(3))


@pytest.mark.parametrize("kind", [*SIMILAR, CosineHead, Conditioned, AnyNumber])
def test_what_only_looks_like_a_layer_norm_is_refused_where_a_filter_chooses_it(kind):
    model = model_of(Deberta(), kind())
    before = graph(model)
    why = (
        "takes more than x in its forward"
        if kind in (Conditioned, AnyNumber)
        else r"computes something else than nn\.LayerNorm"
    )
    with pytest.raises(ValueError, match=rf"layer '1' is a {kind.__name__}, which {why}.*leave it out with filter_fn"):
        replace_layer_norm(model, filter_fn=lambda module, name: True)
    assert_unchanged(model, before)
    assert list(kl_layers(replace_layer_norm(model, filter_fn=lambda module, name: name != "1"))) == ["0"]


# Warnings


def messages(record):
    return [str(warning.message) for warning in record]


def test_subclasses_and_classes_that_are_passed_over_are_counted():
    model = model_of(nn.LayerNorm(N), Timm2d(), Timm2d(), Conditioned(), StdNorm(), nn.GroupNorm(2, N), Rms())
    with pytest.warns(UserWarning, match="passed over") as record:
        replace_layer_norm(model)
    (text,) = messages(record)
    assert text.startswith(
        "klnorm passed over 2 Timm2d (which computes something else than nn.LayerNorm), 1 Conditioned (which takes "
        "more than x in its forward), 1 StdNorm (which computes something else than nn.LayerNorm). Remedy: "
    )
    assert record[0].filename == __file__
    assert list(kl_layers(model)) == ["0"]


@pytest.mark.filterwarnings("error")
def test_the_filter_of_the_warning_ends_it():
    model = model_of(nn.LayerNorm(N), Timm2d(), Deberta(), Conditioned())
    with pytest.warns(UserWarning, match="passed over") as record:
        replace_layer_norm(copy.deepcopy(model))
    source = messages(record)[0].split("filter_fn=")[1].split(" ends this warning")[0]
    assert list(kl_layers(replace_layer_norm(model, filter_fn=eval(source)))) == ["0", "2"]


@pytest.mark.filterwarnings("error")
def test_what_is_no_norm_is_not_spoken_of():
    model = nn.Sequential(nn.LayerNorm(N), StdConv2d(), CosineHead(), nn.GroupNorm(2, N), nn.BatchNorm1d(N))
    assert list(kl_layers(replace_layer_norm(model))) == ["0"]
    model = nn.Sequential(nn.RMSNorm(N), StdConv2d(), CosineHead(), nn.LayerNorm(N), Deberta())
    assert list(kl_layers(replace_rms_norm(model))) == ["0"]


def test_the_layer_of_the_warning_takes_the_place():
    model = model_of(Timm2d())
    with pytest.warns(UserWarning, match=r"found no LayerNorm .* passed over 1 Timm2d.*klnorm\.KLLayerNorm in their"):
        replace_layer_norm(model)

    class Norm2d(klnorm.KLLayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    own, x = Norm2d(N, eps=0.01).eval(), torch.randn(2, N, 3, 3)
    own.load_state_dict(model[0].state_dict())
    assert torch.equal(own(x), model[0](x))


def test_the_other_function_of_the_warning_takes_them():
    model = model_of(Rms(), Rms())
    with pytest.warns(UserWarning, match=r"found no LayerNorm to replace.* it has 2 Rms.*klnorm\.replace_rms_norm for"):
        replace_layer_norm(model)
    assert len(kl_layers(replace_rms_norm(model))) == 2
    model = model_of(Deberta(), nn.LayerNorm(N))
    with pytest.warns(UserWarning, match=r"found no RMSNorm .* it has 1 Deberta, 1 LayerNorm.*klnorm\.replace_layer_n"):
        replace_rms_norm(model)
    assert len(kl_layers(replace_layer_norm(model))) == 2


def test_no_filter_takes_what_a_filter_left():
    model = model_of(Deberta(), nn.LayerNorm(N))
    with pytest.warns(UserWarning, match=r"filter_fn chose none of 1 Deberta, 1 LayerNorm\. Remedy: no filter_fn"):
        replace_layer_norm(model, filter_fn=lambda module, name: "norm" in name)
    assert len(kl_layers(replace_layer_norm(model))) == 2


def test_a_model_without_norms_that_have_a_scale():
    with pytest.warns(UserWarning, match=r"found no LayerNorm to replace in the model\. Remedy: .*have a scale"):
        replace_layer_norm(model_of(nn.Linear(N, N), nn.LayerNorm(N, elementwise_affine=False)))
