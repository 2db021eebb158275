"""`KLLayerNorm` and `KLRMSNorm` with `heads`: training, evaluation, divergence, state, and what others make of them."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import klnorm
from klnorm import KLLayerNorm, KLRMSNorm
from klnorm.functional import kl_layer_norm, kl_rms_norm

H, D = 3, 7
BOTH = pytest.mark.parametrize("cls", [KLLayerNorm, KLRMSNorm])
POSTERIORS = pytest.mark.parametrize("posterior", ["sampled", "deterministic"])


def make(cls, **options):
    """A layer whose parameters and prior means differ between heads."""
    layer = cls(D, eps=1e-5, heads=H, **options)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.add_(0.3 * torch.randn_like(tensor))
    return layer


def x_of(dtype=torch.float32):
    return torch.randn(4, 6, H, D, dtype=dtype)


def functional(layer, x, **options):
    held = layer.posterior_and_prior()._asdict()
    priors = {name: held.pop(name) for name in ("weight_prior", "bias_prior")}
    options |= {name: prior for name, prior in priors.items() if prior is not None}
    options |= {"eps": 1e-5, "per_head": True, "posterior": layer.posterior, "prior_std": layer.prior_std}
    return (kl_layer_norm if isinstance(layer, KLLayerNorm) else kl_rms_norm)(x, D, **held, **options)


@BOTH
@POSTERIORS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("noise", ["batch", "sample", "token"])
def test_training_is_the_functional_form_and_the_sum_of_its_divergences(cls, posterior, noise, bias):
    layer, x = make(cls, noise=noise, posterior=posterior, bias=bias), x_of()
    assert {tuple(t.shape) for t in (*layer.parameters(), *layer.buffers())} == {(H, D)}
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    expected, kl = functional(layer, x, noise=noise)
    assert torch.equal(y, expected)
    total = layer.kl_divergence()
    assert total.shape == ()
    torch.testing.assert_close(total, kl.sum())
    dy, parameters = torch.randn_like(y), list(layer.parameters())
    found = torch.autograd.grad((y * dy).sum() + total, parameters)
    wanted = torch.autograd.grad((expected * dy).sum() + kl.sum(), parameters)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other)


@BOTH
@POSTERIORS
def test_evaluation_is_the_norm_of_every_head(cls, posterior):
    layer, x = make(cls, posterior=posterior).eval(), x_of()
    y = layer(x)
    for head in range(H):
        if cls is KLLayerNorm:
            expected = F.layer_norm(x[..., head, :], (D,), layer.weight[head], layer.bias[head], 1e-5)
        else:
            expected = F.rms_norm(x[..., head, :], (D,), layer.weight[head], 1e-5)
        torch.testing.assert_close(y[..., head, :], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer(x), y)
    if posterior == "sampled":
        with klnorm.sampling(layer):
            assert not torch.equal(layer(x), y)


@BOTH
def test_the_divergence_is_the_same_from_the_forward_and_from_the_parameters(cls):
    model = nn.Sequential(make(cls), make(cls, posterior="deterministic"), cls(D))
    computed = klnorm.kl_divergence(model)
    by_layer = [layer.kl_divergence() for layer in model]
    model(x_of())
    taken = klnorm.kl_divergence(model)
    assert model[0]._take_kl() is not None
    torch.testing.assert_close(taken, computed)
    torch.testing.assert_close(sum(by_layer), computed)
    again = klnorm.kl_divergence(model)
    assert torch.equal(again, taken)
    found = torch.autograd.grad(taken, list(model.parameters()))
    for gradient, other in zip(found, torch.autograd.grad(computed, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, other)


def test_one_head_and_several_normalized_dimensions():
    for heads, shape in (1, (D,)), (2, (2, 3)):
        layer, x = KLLayerNorm(shape, heads=heads), torch.randn(4, heads, *shape)
        layer(x).sum().backward()
        assert layer.weight.grad.shape == (heads, *shape)
        (layer(x).sum() + layer.kl_divergence()).backward()
        plain = KLLayerNorm(shape)
        torch.testing.assert_close(layer.kl_divergence(), heads * plain.kl_divergence())


@BOTH
def test_residual_in_training_and_evaluation(cls):
    layer, x, r = make(cls), x_of(), x_of()
    for training in True, False:
        layer.train(training)
        torch.manual_seed(5)
        y, total = layer(x, residual=r)
        torch.manual_seed(5)
        assert torch.equal(total, x + r)
        assert torch.equal(y, layer(total))


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_narrow_inputs_and_out_dtype(cls, training):
    x = x_of(torch.bfloat16)
    assert make(cls).train(training)(x).dtype == torch.bfloat16
    assert make(cls, out_dtype=torch.float32).train(training)(x).dtype == torch.float32


@BOTH
def test_the_state_comes_back(cls):
    layer, x = make(cls), x_of()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = cls(D, eps=1e-5, heads=H)
    loaded.load_state_dict(torch.load(file))
    for other in loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert torch.equal(other.kl_divergence(), layer.kl_divergence())
        assert torch.equal(other.eval()(x), layer.eval()(x))
        assert repr(other) == repr(layer)
    assert repr(layer).endswith("prior_std=0.1, heads=3)")


def test_the_state_of_plain_norms_becomes_the_prior():
    weight = torch.randn(H, D)
    layer = KLRMSNorm(D, heads=H)
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.weight_prior, weight)


@BOTH
def test_summary_and_param_groups(cls):
    model = nn.Sequential(make(cls, bias=True), nn.Linear(D, 2))
    part = klnorm.summary(model).layers["0"]
    assert part.scale.features == part.shift.features == H * D
    assert part.kl == pytest.approx(klnorm.kl_divergence(model).item(), rel=1e-5)
    groups = klnorm.param_groups(model, lr=0.1)
    assert sum(p.numel() for group in groups for p in group["params"]) == 4 * H * D + 2 * D + 2


def test_mc_predict_repeats_inputs_in_one_forward():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = make(KLRMSNorm), nn.Linear(H * D, 2)

        def forward(self, q):
            return self.out(self.norm(q).flatten(-2).mean(1))

    model, q = Attends(), x_of()
    together = klnorm.mc_predict(model, q, samples=3, max_batch=12)
    assert together.probabilities.shape == (4, 2)
    model.norm.noise = "batch"
    with pytest.raises(ValueError, match=r"1 draw\(s\) for 12 inputs"):
        klnorm.mc_predict(model, q, samples=3, max_batch=12)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_compiles(cls, training, fresh_dynamo):
    layer, x = make(cls).train(training), x_of()
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    compiled = torch.compile(lambda x: (layer(x), klnorm.kl_divergence(layer)), backend="aot_eager", fullgraph=True)
    y, kl = compiled(x)
    assert torch.equal(y, expected)
    torch.testing.assert_close(kl, layer.kl_divergence())


def test_training_moves_heads_apart():
    torch.manual_seed(0)
    layer, x = KLRMSNorm(D, heads=H, prior_std=1.0), torch.randn(64, H, D)
    target = x * torch.tensor([0.5, 1.0, 2.0])[:, None]
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(100):
        loss = F.mse_loss(layer(x), target) + layer.kl_divergence() / 10_000
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second, third = layer.weight.mean(1).tolist()
    assert first < 0.7 < second < 1.4 < third


# Errors


@BOTH
@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        (0, ValueError, "heads is 0, expected 1 or more"),
        (65536, ValueError, "heads is 65536, expected 1 to 65535"),
        (True, TypeError, "heads is a bool, expected an int"),
        (2.0, TypeError, "heads is a float, expected an int"),
    ],
)
def test_heads_that_are_no_count_are_refused(cls, heads, error, message):
    with pytest.raises(error, match=message):
        cls(D, heads=heads)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_inputs_without_the_heads_are_refused(cls, training):
    layer = make(cls).train(training)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 7\), expected \(6, 7\).*permute x so that its heads"):
        layer(x_of()[:, :, 0])
    with pytest.raises(ValueError, match=r"x has shape \(7,\), expected \(\.\.\., heads, 7\)"):
        layer(x_of()[0, 0, 0])


@pytest.mark.parametrize(
    ("cls", "restore"), [(KLLayerNorm, klnorm.restore_layer_norm), (KLRMSNorm, klnorm.restore_rms_norm)]
)
def test_restoring_is_refused_and_what_is_advised_helps(cls, restore):
    model, x = nn.Sequential(make(cls), cls(D)), x_of()
    with pytest.raises(ValueError, match=r"layer '0' has parameters of every head, which an nn\.\w+ cannot hold"):
        restore(model)
    assert type(model[1]) is cls
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("layer", "plain", "restore", "replace"),
    [
        (KLLayerNorm, torch.nn.LayerNorm, klnorm.restore_layer_norm, klnorm.replace_layer_norm),
        (KLRMSNorm, torch.nn.RMSNorm, klnorm.restore_rms_norm, klnorm.replace_rms_norm),
    ],
)
def test_restoring_a_layer_that_was_made_without_heads_leaves_no_trace(layer, plain, restore, replace):
    norm = restore(layer(D))
    assert vars(norm).keys() == vars(plain(D)).keys()
    assert type(replace(norm)) is layer
