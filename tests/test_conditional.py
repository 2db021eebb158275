"""`klnorm.KLConditionalLayerNorm`: a posterior for every sample, its KL divergence, padding, memory, state, errors."""

import copy
import gc
import pickle
import weakref

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import fsdp
from torch.utils.checkpoint import checkpoint

import klnorm
from klnorm import KLConditionalLayerNorm, KLLayerNorm, kl_divergence, reference

N, C = 6, 3
NOISES = "batch", "sample", "token"
CONDITIONS = "self", C


def trained(condition="self", device="cpu", dtype=torch.float64, shape=N, **options):
    """A layer in which nothing is as in a new one, the low-rank part least of all."""
    layer = KLConditionalLayerNorm(shape, condition, 2, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            t.add_(torch.randn_like(t) * 0.3)
    return layer


def inputs(condition, leading=(4, 5), device="cpu", dtype=torch.float64, sample_dim=0, shape=(N,)):
    """x, and the keyword arguments of a forward: a condition, or a mask that leaves each sample some rows."""
    x = torch.randn(*leading, *shape, device=device, dtype=dtype, requires_grad=True)
    if condition == "self":
        mask = torch.rand(leading, device=device) > 0.4
        by_row = mask.movedim(sample_dim, -1)
        if (
            mask.dim() > 1 and len(by_row) > 1
        ):  # whatever the generator gives, every sample has a real row and a padded one
            by_row[0] = True
            by_row[-1] = False
        else:
            mask.fill_(True)
        return x, {"mask": mask}
    return x, {"condition": torch.randn(leading[sample_dim], C, device=device, dtype=dtype, requires_grad=True)}


def seeded(function, *args, seed=0, **options):
    torch.manual_seed(seed)
    return function(*args, **options)


def conditions_of(layer, x, condition=None, mask=None):
    """The definition of c, sample by sample; `x` has the samples first."""
    if condition is not None:
        return condition
    found = []
    for i, sample in enumerate(x):
        rows = sample.reshape(-1, N)
        centred = rows - rows.mean(1, keepdim=True)
        xhat = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + layer.eps)
        found.append((xhat if mask is None else xhat[mask[i].reshape(-1)]).mean(0))
    return torch.stack(found)


def parameters_of(layer, c):
    """weight, bias, weight_rho, bias_rho of every sample, (samples, N) each, one product after the other."""
    static = [layer.weight, layer.weight_rho] + ([] if layer.bias is None else [layer.bias, layer.bias_rho])
    ours = [
        torch.stack([p.flatten() + (layer.condition_down @ c_g) @ up for c_g in c])
        for p, up in zip(static, layer.condition_up, strict=True)
    ]
    return ours[0], ours[2] if len(ours) > 2 else None, ours[1], ours[3] if len(ours) > 2 else None


def specified(layer, x, condition=None, mask=None, *, seed=0):
    """(y, kl): what the layer is to compute for that seed of torch's generator, by the reference."""
    samples = x.movedim(layer.sample_dim, 0)
    c = conditions_of(layer, samples, condition, None if mask is None else mask.movedim(layer.sample_dim, 0))
    torch.manual_seed(seed)
    y, kl = reference.kl_layer_norm(
        samples, (N,), *parameters_of(layer, c), weight_prior=layer.weight_prior,
        bias_prior=0.0 if layer.bias_prior is None else layer.bias_prior, prior_std=layer.prior_std, eps=layer.eps,
        noise=layer.noise, sample=layer.training, seed=torch.randint(2**63 - 1, (1,), device=x.device),
    )  # fmt: skip
    return y.movedim(0, layer.sample_dim), kl.mean()


def gradients(outputs, layer, *tensors, seed=9):
    """Of outputs with random cotangents, by name, None for what has no part."""
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    names = {**dict(layer.named_parameters()), **{f"input {i}": t for i, t in enumerate(tensors)}}
    found = torch.autograd.grad(outputs, list(names.values()), cotangents, allow_unused=True)
    return dict(zip(names, found, strict=True))


def differentiable(options):
    return [t for t in options.values() if t.is_floating_point()]


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def exactness(device):
    return 1e-12 if device.type == "cpu" else 2e-5  # rounding alone; on a GPU the noise is made in fp32


# What it computes


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", [*NOISES, "none"])
@pytest.mark.parametrize(("leading", "sample_dim"), [((4, 5), 0), ((5, 4), 1), ((1, 5), 0), ((4,), 0), ((2, 3, 2), 1)])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_agrees_with_its_definition(device, condition, leading, sample_dim, noise, bias):
    """Output, KL divergence, and all gradients: of x through the summary too, of conditions, U, V and the rest."""
    options = {"noise": "batch" if noise == "none" else noise, "sample_dim": sample_dim, "bias": bias}
    layer = trained(condition, device, eps=0.1, prior_std=0.4, **options).train(noise != "none")
    x, given = inputs(condition, leading, device, sample_dim=sample_dim)
    y = seeded(layer, x, **given)
    found = [y, kl_divergence(layer)] if layer.training else [y]
    expected = specified(layer, x, **given)[: len(found)]
    tolerance = 10 * exactness(device)
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), tolerance)
    tensors = x, *differentiable(given)
    found, expected = gradients(found, layer, *tensors), gradients(expected, layer, *tensors)
    for name, gradient in found.items():
        if expected[name] is None:  # deviations have no part in evaluation
            assert not gradient.any()
            assert name.endswith("_rho")
            assert not layer.training
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_gradcheck(condition):
    layer = trained(condition, prior_std=0.5)
    x, given = inputs(condition, (2, 2))
    tensors = [x, *differentiable(given), *layer.parameters()]

    def function(x, *rest):
        options = dict(given) if condition == "self" else {"condition": rest[0]}
        return seeded(layer, x, **options), kl_divergence(layer)

    assert torch.autograd.gradcheck(function, tensors)


def test_hand_worked_values(device):
    # mean 2, variance 1, and with eps = 3 rstd = 1/2: xhat = (-1/2, 1/2), (1/2, -1/2), and (0, 0) for the last row
    x = torch.tensor([[[1.0, 3.0], [3.0, 1.0], [5.0, 5.0]]], device=device)
    layer = KLConditionalLayerNorm(2, rank=1, eps=3.0, device=device).eval()
    with torch.no_grad():
        layer.condition_down.copy_(torch.tensor([[2.0, 0.0]]))
        layer.condition_up.copy_(torch.tensor([[[1.0, 10.0]], [[0.0, 0.0]], [[3.0, -3.0]], [[0.0, 0.0]]]))
    # c of the first row is xhat: V c = -1, weight (1 - 1, 1 - 10), bias (0 - 3, 0 + 3)
    y = layer(x, mask=torch.tensor([[1, 0, 0]], device=device))
    assert y.tolist() == [[[-3.0, -1.5], [-3.0, 7.5], [-3.0, 3.0]]]
    # over the first and the last row c = (-1/4, 1/4): V c = -1/2, weight (1/2, -4), bias (-3/2, 3/2)
    y = layer(x, mask=torch.tensor([[1, 0, 1]], device=device))
    assert y.tolist() == [[[-1.75, -0.5], [-1.25, 3.5], [-1.5, 1.5]]]
    # over all three c = 0, as over none
    for mask in None, torch.zeros(1, 3, dtype=torch.bool, device=device):
        assert layer(x, mask=mask).tolist() == [[[-0.5, 0.5], [0.5, -0.5], [0.0, 0.0]]]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(4, 5, N), (3, N), (1, 5, N), (N,), (5, 4, N)])
def test_a_new_layer_is_the_static_one_bit_for_bit(device, shape, condition, noise, bias):
    options = {"noise": noise, "bias": bias, "sample_dim": 1 if shape[0] == 5 and noise != "token" else 0}
    static, ours = (
        KLLayerNorm(N, device=device, **options),
        KLConditionalLayerNorm(N, condition, device=device, **options),
    )
    with torch.no_grad():
        for name, t in (*ours.named_parameters(), *ours.named_buffers()):
            if not name.startswith("condition"):
                getattr(static, name).copy_(t.add_(torch.randn_like(t) * 0.3))
    x = torch.randn(shape, device=device)
    samples = 1 if len(shape) == 1 else shape[ours.sample_dim]
    given = () if condition == "self" else (torch.randn(samples, C, device=device),)
    y = seeded(static, x)
    assert torch.equal(seeded(ours, x, *given), y)
    torch.testing.assert_close(kl_divergence(ours), kl_divergence(static), rtol=1e-6, atol=0)  # a mean of equals
    ours.eval(), static.eval()
    narrow = x.bfloat16()  # beside fp32 parameters: there a KLLayerNorm runs klnorm's own arithmetic as well
    assert torch.equal(ours(narrow, *given), static(narrow))
    assert not torch.equal(ours(x, *given), y)
    # torch's LayerNorm, which evaluates a KLLayerNorm here, rounds in another order: some roundings of values below 8
    torch.testing.assert_close(ours(x, *given), static(x), rtol=0, atol=16 * torch.finfo(torch.float32).eps)


def test_the_noise_is_that_of_its_generator(device):
    one, other = (trained(device=device, generator=torch.Generator(device).manual_seed(3)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x, given = inputs("self", device=device)
    assert torch.equal(seeded(one, x, seed=1, **given), y := seeded(other, x, seed=2, **given))
    assert not torch.isclose(one(x, **given), y).any()


def test_several_normalized_dimensions(device):
    layer, flat = trained(device=device, shape=(2, 3)), trained(device=device)
    state = layer.state_dict()
    flat.load_state_dict({k: v if k.startswith("condition") else v.flatten() for k, v in state.items()})
    x, given = inputs("self", device=device, shape=(2, 3))
    assert torch.equal(seeded(layer, x, **given), seeded(flat, x.flatten(2), **given).unflatten(2, (2, 3)))
    assert torch.equal(kl_divergence(layer), kl_divergence(flat))


@pytest.mark.parametrize("training", [True, False])
def test_a_sample_does_not_see_the_others(device, training):
    layer, (x, given) = trained(device=device).train(training), inputs("self", device=device)
    y = seeded(layer, x, **given)
    other = torch.cat([x[:1], torch.randn_like(x[1:])])
    changed = seeded(layer, other, **given)
    assert torch.equal(changed[0], y[0])
    assert not torch.isclose(changed[1:], y[1:]).all()


# Padding


@pytest.mark.parametrize("mode", ["batch", "sample", "eval"])
def test_padding_does_not_matter(device, mode):
    layer = trained(device=device, noise="batch" if mode == "eval" else mode).train(mode != "eval")
    alone = torch.randn(1, 3, N, dtype=torch.float64, device=device, requires_grad=True)
    padding = torch.full((1, 4, N), 1e3, dtype=torch.float64, device=device).add_(torch.randn_like(alone[:, :1]))
    padding.requires_grad_()
    others = torch.randn(2, 7, N, dtype=torch.float64, device=device)
    mask = torch.ones(3, 7, dtype=torch.int64, device=device)  # like an attention_mask
    mask[0, 3:] = 0
    batch = torch.cat([torch.cat([alone, padding], dim=1), others])
    y, expected = seeded(layer, batch, mask=mask)[:1, :3], seeded(layer, alone)
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, [alone, padding], cotangent)
    (wanted,) = torch.autograd.grad(expected, alone, cotangent)
    torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=1e-12)
    assert not found[1].any()
    assert not torch.isclose(seeded(layer, batch)[:1, :3], expected).any()  # without the mask it does


def test_padding_that_is_not_finite_stays_in_its_rows(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    real, broken = given["mask"], x.detach().clone()
    broken[~real] = float("nan")
    y = seeded(layer, broken, mask=real)
    assert torch.equal(y[real], seeded(layer, x, mask=real)[real])
    assert y[~real].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_masks_of_any_integer_dtype_mean_the_same(device, dtype):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    assert torch.equal(seeded(layer, x, mask=given["mask"].to(dtype)), seeded(layer, x, **given))
    assert not torch.isclose(seeded(layer, x), seeded(layer, x, **given)).any()


def test_a_sample_without_real_rows_has_the_static_posterior(device):
    layer = trained(device=device).eval()
    x = torch.randn(2, 3, N, dtype=torch.float64, device=device, requires_grad=True)
    y = layer(x, mask=torch.tensor([[True] * 3, [False] * 3], device=device))
    static = F.layer_norm(x, (N,), layer.weight, layer.bias)
    torch.testing.assert_close(y[1], static[1], rtol=1e-12, atol=1e-12)
    assert not torch.isclose(y[0], static[0]).any()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.isfinite().all()


# The KL divergence


def later(layer, x, given):
    """A training step, after which the graph of its forward is spent; the options without graphs of their own."""
    (seeded(layer, x, **given).sum() + kl_divergence(layer)).backward()
    return {name: t.detach() for name, t in given.items()}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_value_outlives_the_graph_and_follows_the_parameters(device, condition):
    layer, (x, given) = trained(condition, device), inputs(condition, device=device)
    given = later(layer, x, given)
    close = {"rtol": 1e-6 if device.type == "cuda" else 1e-13, "atol": 0}
    for _ in range(2):
        torch.manual_seed(1)
        value, after = kl_divergence(layer), torch.get_rng_state()
        assert torch.equal(after, torch.manual_seed(1).get_state())  # nothing is drawn for it
        torch.testing.assert_close(value, specified(layer, x, **given)[1], **close)
        with torch.no_grad():  # as an optimizer does
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    value = kl_divergence(layer)
    layer.eval()(torch.randn_like(x), **given)
    assert torch.equal(kl_divergence(layer), value)  # evaluation changes nothing


def test_conditions_that_the_caller_changes_later_are_kept_as_they_were(device):
    layer, (x, given) = trained(C, device), inputs(C, device=device)
    with torch.no_grad():
        layer(x, **given)
        value = kl_divergence(layer)
        given["condition"].zero_()
        assert torch.equal(kl_divergence(layer), value)


@pytest.mark.parametrize("samples", [4, 1])
@pytest.mark.parametrize("differentiate", ["backward", "grad"])
def test_a_gradient_that_would_be_incomplete_raises(device, differentiate, samples):
    layer, (x, given) = trained(device=device), inputs("self", (samples, 5), device)

    def attempt():
        kl = kl_divergence(layer)
        with pytest.raises(
            RuntimeError, match=r"cannot be differentiated any more.*Remedy: call every layer in the forward"
        ):
            kl.backward() if differentiate == "backward" else torch.autograd.grad(kl, layer.posterior_parameters())

    later(layer, x, given)
    attempt()
    with torch.no_grad():
        layer(x, **given)
    attempt()
    with torch.inference_mode():
        layer(x, **given)
    attempt()


def test_without_a_gradient_of_the_conditions_nothing_is_missing(device):
    """Then the value is differentiable later as well, with the whole gradient."""
    layer, (x, given) = trained(C, device), inputs(C, device=device)
    x, given = x.detach(), {"condition": given["condition"].detach()}
    later(layer, x, given)
    found = torch.autograd.grad(kl_divergence(layer), layer.posterior_parameters())
    expected = torch.autograd.grad(specified(layer, x, **given)[1], layer.posterior_parameters())
    assert len(found) == len(list(layer.parameters()))
    assert_same(dict(enumerate(found)), dict(enumerate(expected)), 10 * exactness(device))


def test_it_is_that_of_the_last_forward_and_can_be_had_twice(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    first = layer(x, **given)
    earlier = kl_divergence(layer)
    other = torch.randn_like(x)
    second = layer(other)
    expected = specified(layer, other)[1]
    for kl in kl_divergence(layer), layer.kl_divergence():
        torch.testing.assert_close(kl, expected, rtol=1e-6 if device.type == "cuda" else 1e-13, atol=0)
    assert not torch.isclose(earlier, expected)
    assert first.requires_grad
    assert second.requires_grad


def test_it_stays_in_the_graph_without_the_output(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    layer(x, **given)
    found = gradients([kl_divergence(layer)], layer, x)
    expected = gradients([specified(layer, x, **given)[1]], layer, x)
    assert (found["input 0"][given["mask"]] != 0).all()
    assert_same(found, expected, 10 * exactness(device))


def test_models_add_it_to_that_of_other_layers(device):
    model = nn.Sequential(trained(device=device), KLLayerNorm(N, device=device, dtype=torch.float64))
    model(torch.randn(4, 5, N, dtype=torch.float64, device=device))
    parts = [layer.kl_divergence() for layer in model]
    torch.testing.assert_close(kl_divergence(model), sum(parts), rtol=1e-14, atol=0)
    assert list(klnorm.kl_layers(model)) == ["0", "1"]
    assert klnorm.KLWeight(per_parameter=model).value == 1 / (4 * N)


def test_before_a_forward_there_is_none(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    message = r"has no KL divergence yet.*Remedy: call the model in training mode"
    with pytest.raises(ValueError, match=message):
        kl_divergence(layer)
    layer.eval()(x, **given)
    with pytest.raises(ValueError, match=message):
        kl_divergence(layer)
    with klnorm.sampling(layer):
        assert not torch.equal(layer(x, **given), layer(x, **given))
    expected = specified(layer, x, **given)[1]
    torch.testing.assert_close(kl_divergence(layer), expected, rtol=1e-6 if device.type == "cuda" else 1e-13, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_have_no_forward_behind_them(device, duplicate):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    y = seeded(layer, x, **given)
    other = duplicate(layer)
    with pytest.raises(ValueError, match="has no KL divergence yet"):
        kl_divergence(other)
    assert torch.equal(seeded(other, x, **given), y)
    assert torch.equal(kl_divergence(other), kl_divergence(layer))


def test_a_value_that_is_not_finite_is_explained(device):
    layer, (x, given) = trained(device=device), inputs("self", device=device)
    with torch.no_grad():
        layer.condition_up[1, 0, 2] = float("nan")
    layer(x, **given)
    with pytest.raises(ValueError, match=r"condition_up has 1 such value\(s\), the first at index 14"):
        kl_divergence(layer)


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("sample_dim", [0, 1])
def test_backward_saves_x_and_nothing_else_of_its_size(device, sample_dim, condition, dtype):
    leading = (4, 256) if sample_dim == 0 else (256, 4)
    layer = trained(condition, device, dtype=torch.float32, sample_dim=sample_dim)
    x, given = inputs(condition, leading, device, dtype, sample_dim)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x, **given)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert storages.pop(x.untyped_storage().data_ptr()) == x.numel() * x.element_size()
    # mean and rstd of the operator, 8 bytes a row; the summary's, at most as much, and its mask: 9 more
    assert sum(size for size in storages.values() if size >= 256 * 4) <= (17 if condition == "self" else 8) * 256 * 4


def test_backward_frees_the_graph_that_the_divergence_keeps(device):
    layer = trained(device=device)
    before = nn.Linear(N, N, device=device, dtype=torch.float64)
    hidden = before(torch.randn(4, 5, N, dtype=torch.float64, device=device)).tanh()
    alive = weakref.ref(hidden)
    loss = layer(hidden).sum() + kl_divergence(layer)
    del hidden
    assert alive() is not None
    loss.backward()
    del loss
    gc.collect()
    assert alive() is None


# The rest of the stack


class Model(nn.Module):
    """A layer with something to train before and after it."""

    def __init__(self, condition, device, dtype=torch.float64):
        super().__init__()
        self.first, self.last = (nn.Linear(N, N, device=device, dtype=dtype) for _ in range(2))
        self.norm = trained(condition, device, dtype)

    def forward(self, x, **given):
        return self.last(self.norm(self.first(x), **given))


def loss_of(model, x, **given):
    return (model(x, **given) ** 2).mean() + kl_divergence(model) / 7


@pytest.mark.parametrize("condition", CONDITIONS)
def test_checkpointing_keeps_the_gradients(device, condition):
    model, (x, given) = Model(condition, device), inputs(condition, device=device)
    tensors = x, *differentiable(given)

    def block(x):
        return model(x, **given)

    def found(function, **options):
        torch.manual_seed(0)
        y = function(x, **options)
        return torch.autograd.grad((y**2).mean() + kl_divergence(model) / 7, [*model.parameters(), *tensors])

    expected = found(block)
    for g, wanted in zip(found(lambda x: checkpoint(block, x, use_reentrant=False)), expected, strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
        (checkpoint(block, x, use_reentrant=True).sum() + kl_divergence(model)).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_whole_loss(device, reentrant):
    """The divergence is then computed in the repetition too, from another forward."""
    model, (x, given) = Model("self", device), inputs("self", device=device)
    expected = gradients([seeded(loss_of, model, x, **given)], model, x)
    torch.manual_seed(0)
    checkpoint(lambda x: loss_of(model, x, **given), x, use_reentrant=reentrant).backward()
    scale = torch.randn((), generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(device)  # `gradients`
    found = {name: scale * p.grad for name, p in model.named_parameters()}
    assert_same({**found, "input 0": scale * x.grad}, expected, 1e-12)


@pytest.mark.parametrize("sample_dim", [0, 1])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_repeats_is_freed_with_its_block(device, reentrant, sample_dim):
    """The divergence would keep its graph alive, of every block until the next forward."""
    layer, repeated = trained(device=device, sample_dim=sample_dim), []
    last = nn.Linear(N, N, device=device, dtype=torch.float64)
    first, second = (inputs("self", device=device)[0] for _ in range(2))

    def block(x):
        y = layer(x)
        if torch._C._current_graph_task_id() != -1:  # a backward runs
            repeated.append(weakref.ref(layer._last_kl._kl.grad_fn))
        return last(y)

    loss = sum(checkpoint(block, x, use_reentrant=reentrant).sum() for x in (first, second))
    value = kl_divergence(layer)
    loss.backward()
    assert len(repeated) == 2
    assert [graph() for graph in repeated] == [None, None]
    assert torch.equal(kl_divergence(layer), value)  # of the second forward, which backward repeated first


@pytest.mark.parametrize("condition", CONDITIONS)
def test_compiles_with_the_divergence_in_the_loss(device, condition, fresh_dynamo):
    model, graphs = Model(condition, device), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled, counts = torch.compile(loss_of, backend=backend, fullgraph=True, dynamic=True), []
    for leading in (4, 2), (7, 2), (5, 3):
        x, given = inputs(condition, leading, device)
        tensors = x, *differentiable(given)
        loss, expected = seeded(compiled, model, x, **given), seeded(loss_of, model, x, **given)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert_same(gradients([loss], model, *tensors), gradients([expected], model, *tensors), 1e-10)
        counts.append(len(graphs))
    assert len(set(counts)) == 1  # no compilation for other numbers of samples and rows


def test_a_compiled_divergence_of_an_eager_forward(device, fresh_dynamo):
    layer, (x, given) = trained(C, device), inputs(C, device=device)
    layer(x, condition=given["condition"].detach())
    compiled = torch.compile(kl_divergence, backend="aot_eager", fullgraph=True)
    found, expected = compiled(layer), kl_divergence(layer)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert_same(gradients([found], layer), gradients([expected], layer), 1e-10)


@pytest.mark.usefixtures("eager_seeds")
def test_compiles_around_a_checkpoint_where_dynamo_allows_it(device, fresh_dynamo):
    model, (x, given) = Model("self", device), inputs("self", device=device)

    def loss(x):
        return (checkpoint(model, x, use_reentrant=False, **given) ** 2).mean() + kl_divergence(model) / 7

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        found = gradients([seeded(compiled, x)], model, x)
    assert_same(found, gradients([seeded(loss_of, model, x, **given)], model, x), 1e-10)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_exports_for_any_number_of_samples(condition):
    layer = trained(condition).eval()
    samples, rows = torch.export.Dim("samples", min=2, max=64), torch.export.Dim("rows", min=2, max=64)
    dynamic = {"x": {0: samples, 1: rows}, "condition": {0: samples}, "mask": {0: samples, 1: rows}}
    x, given = inputs(condition)
    program = torch.export.export(layer, (x,), given, dynamic_shapes={k: dynamic[k] for k in ("x", *given)})
    x, given = inputs(condition, (7, 3))
    assert torch.equal(program.module()(x, **given), layer(x, **given))


def test_a_divergence_outside_of_the_compiled_model_is_that_of_its_forward(device, fresh_dynamo):
    model, (x, given) = Model("self", device), inputs("self", device=device)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    unused = loss_of(model, torch.randn_like(x))  # eager, and not backpropagated: must not be taken for the later one
    found = gradients([seeded(loss_of, compiled, x, **given)], model, x)
    value = kl_divergence(compiled)
    assert_same(found, gradients([seeded(loss_of, model, x, **given)], model, x), 1e-10)
    torch.testing.assert_close(value, kl_divergence(model), rtol=1e-12, atol=0)
    seeded(compiled, x, **given)
    copy.deepcopy(model)
    assert unused.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_autocast_changes_nothing(device, condition, dtype):
    layer, (x, given) = trained(condition, device, torch.float32), inputs(condition, device=device, dtype=dtype)
    y = seeded(layer, x, **given)
    expected = [y, kl_divergence(layer), *gradients([y, kl_divergence(layer)], layer, x).values()]
    with torch.autocast(device.type, torch.bfloat16):
        y = seeded(layer, x, **given)
        kl = kl_divergence(layer)
    assert y.dtype == dtype
    assert all(map(torch.equal, [y, kl, *gradients([y, kl], layer, x).values()], expected))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_bfloat16_computes_in_fp32(device, condition, noise, parameter_dtype):
    layer = trained(condition, device, parameter_dtype, noise=noise)
    x, given = inputs(condition, device=device, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    y = seeded(layer, x, **given)
    expected, kl = specified(wide, x.double(), **{k: t if k == "mask" else t.double() for k, t in given.items()})
    assert y.dtype == torch.bfloat16
    half = 0.51 * torch.finfo(torch.bfloat16).eps  # y is rounded once,
    # and the summary is a mean of xhat that is rounded: at most one such rounding of c, times V and U of size 1 or so
    through_c = 4 * half if condition == "self" else 1e-5
    torch.testing.assert_close(y.double(), expected, rtol=half, atol=through_c)
    torch.testing.assert_close(kl_divergence(layer).double(), kl, rtol=10 * through_c, atol=0)


def test_the_encoders_shortcut_does_not_bypass_it(device):
    encoder = nn.TransformerEncoderLayer(N, 2, 8, dropout=0.0, batch_first=True, device=device, dtype=torch.float64)
    encoder.norm1 = trained(device=device)
    x = torch.randn(2, 5, N, dtype=torch.float64, device=device)
    encoder.eval()
    with torch.no_grad():
        attended = encoder.norm1(x + encoder.self_attn(x, x, x, need_weights=False)[0])
        expected = encoder.norm2(attended + encoder.linear2(encoder.linear1(attended).relu()))
        torch.testing.assert_close(encoder(x), expected, rtol=1e-12, atol=1e-12)


def test_predictions_vary_with_the_draws(device):
    model, (x, given) = trained(device=device), inputs("self", device=device)
    prediction = klnorm.mc_predict(model, {"x": x, **given}, samples=3)
    assert (prediction.mutual_information > 0).all()
    assert model.training


def test_is_no_candidate_for_replacement_or_restoration(device):
    model = nn.Sequential(nn.LayerNorm(N), trained(device=device))
    klnorm.replace_layer_norm(model)
    klnorm.restore_layer_norm(model)
    assert [type(m) for m in model] == [nn.LayerNorm, KLConditionalLayerNorm]


def test_optimizer_groups(device):
    layer = trained(device=device)
    groups = {g["name"]: g["params"] for g in klnorm.param_groups(layer, lr=1e-3)}
    assert {id(p) for p in groups["rho"]} == {id(layer.weight_rho), id(layer.bias_rho)}
    assert {id(p) for p in groups["no_decay"]} == {id(p) for p in layer.parameters()} - {id(p) for p in groups["rho"]}


@pytest.mark.parametrize("reshard", [False, True])
def test_fsdp2_needs_the_parameters_whole(device, reshard):
    backend = "nccl" if device.type == "cuda" else "gloo"  # fully_shard moves parameters to a GPU that it sees
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, (x, given) = Model("self", device), inputs("self", device=device)
        expected = gradients([seeded(loss_of, model, x, **given)], model, x)
        fsdp.fully_shard(model.norm, reshard_after_forward=reshard)
        if reshard:
            with pytest.raises(ValueError, match=r"sharded.*Remedy: fully_shard\(layer, reshard_after_forward=False\)"):
                loss_of(model, x, **given)
            return
        (0.3 * seeded(loss_of, model, x, **given)).backward()
        found = {name: klnorm.compat.whole(p.grad) for name, p in model.named_parameters()}
        scale = torch.randn((), generator=torch.Generator().manual_seed(9), dtype=torch.float64) / 0.3
        assert_same({k: scale * g for k, g in found.items()}, {k: expected[k] for k in found}, 1e-12)
    finally:
        torch.distributed.destroy_process_group()


def test_functional_transforms_leave_nothing_behind(device):
    layer, (x, given) = trained(C, device), inputs(C, device=device)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return (torch.func.functional_call(layer, parameters, (x,), given) ** 2).sum()

    found = seeded(torch.func.grad(loss), parameters)
    y = specified(layer, x, **given)[0]
    expected = torch.autograd.grad((y**2).sum(), list(parameters.values()))
    assert_same(found, dict(zip(parameters, expected, strict=True)), 10 * exactness(device))
    with pytest.raises(ValueError, match="has no KL divergence yet"):
        kl_divergence(layer)


# State


@pytest.mark.parametrize("condition", CONDITIONS)
def test_state_goes_around(device, condition):
    layer, other = trained(condition, device), trained(condition, device)
    x, given = inputs(condition, device=device)
    assert not other.load_state_dict(layer.state_dict()).missing_keys
    assert torch.equal(seeded(layer, x, **given), seeded(other, x, **given))
    assert layer.state_dict().keys() == {
        "weight", "bias", "weight_rho", "bias_rho", "weight_prior", "bias_prior", "condition_down", "condition_up",
    }  # fmt: skip
    other.load_state_dict({}, strict=False)
    assert torch.equal(other.condition_up, layer.condition_up)
    broken = layer.state_dict()
    del broken["condition_up"]
    with pytest.raises(RuntimeError, match="condition_up"):
        other.load_state_dict(broken)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("static", [nn.LayerNorm, KLLayerNorm])
@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
def test_a_static_layers_state_makes_it_that_layer(device, static, assign, meta):
    plain = static(N, device=device, dtype=torch.float64)
    with torch.no_grad():
        for t in (*plain.parameters(), *plain.buffers()):
            t.add_(torch.randn_like(t) * 0.3)
    layer = trained(device=device)
    if meta:
        layer.to("meta") if assign else layer.to("meta").to_empty(device=device)
        if not assign:
            layer.reset_parameters()
    layer.load_state_dict(plain.state_dict(), assign=assign)
    assert not layer.condition_up.any()
    assert layer.condition_down.std() > 0.1
    assert layer.condition_up.requires_grad
    x = torch.randn(4, 5, N, dtype=torch.float64, device=device)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-14, atol=1e-14)
    assert torch.equal(layer.weight_prior, plain.weight if static is nn.LayerNorm else plain.weight_prior)


def test_reset_and_to_empty(device):
    meta = KLConditionalLayerNorm(N, C, rank=5, device="meta")
    assert meta(torch.zeros(2, 3, N, device="meta"), torch.zeros(2, C, device="meta")).shape == (2, 3, N)
    for layer in trained(C, device), meta.to_empty(device=device):
        layer.reset_parameters()
        assert not layer.condition_up.any()
        assert 0 < layer.condition_down.abs().max() <= C**-0.5  # uniform, as the weight of an nn.Linear
        assert layer.weight.tolist() == layer.weight_prior.tolist() == [1.0] * N
        torch.testing.assert_close(F.softplus(layer.bias_rho), torch.full_like(layer.bias_rho, 0.05))


def test_transformers_initializes_what_a_checkpoint_lacks(device):
    layer, state = trained(device=device), trained(device=device).state_dict()
    with torch.no_grad():
        for name, t in layer.state_dict(keep_vars=True).items():
            loaded = not name.endswith(("_rho", "_up"))
            t.copy_(state[name]) if loaded else t.fill_(float("nan"))
            t._is_hf_initialized = loaded
        layer._is_hf_initialized = True
    assert not layer.condition_up.any()
    assert layer.weight_rho.isfinite().all()
    assert torch.equal(layer.condition_down, state["condition_down"])


def test_representation_names_the_overhead():
    text = repr(KLConditionalLayerNorm(8, condition=3, rank=2))
    assert "condition=3, rank=2, parameters=102: 70 more than KLLayerNorm (+219%), 86 more than nn.LayerNorm" in text
    layer = KLConditionalLayerNorm(768, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 768 + 4 * 768 + 2 * 4 * 768
    assert "condition='self', rank=4, parameters=10752: 9216 more than KLLayerNorm (+600%), 9984 more than" in repr(
        layer
    )


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"condition": "x"}, ValueError, "condition is 'x', expected 'self' or an int"),
        ({"condition": 0}, ValueError, "condition is 0, expected 1 or more"),
        ({"condition": 2.0}, TypeError, "condition is a float, expected an int"),
        ({"condition": None}, TypeError, "condition is a NoneType, expected an int"),
        ({"rank": 0}, ValueError, "rank is 0, expected 1 or more"),
        ({"rank": True}, TypeError, "rank is a bool, expected an int"),
        ({"rank": 2**63}, ValueError, "rank is 9223372036854775808, expected an int of 64 bits"),
        ({"condition": 10**400}, ValueError, r"condition is 1000000\d*\.\.\., expected an int of 64 bits"),
        ({"condition": numpy.array(["self", "x"])}, TypeError, "condition is a ndarray, expected an int"),
        ({"condition": torch.zeros(2)}, TypeError, "condition is a Tensor, expected an int"),
        ({"normalized_shape": ()}, ValueError, r"normalized_shape is \(\)"),
        ({"noise": "rows"}, ValueError, "noise is 'rows'"),
        ({"prior_std": 0.0}, ValueError, "prior_std is 0.0"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        KLConditionalLayerNorm(**{"normalized_shape": N, **options})


def _mask(*shape, dtype=torch.bool, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("condition", "options", "error", "message"),
    [
        ("self", {"condition": torch.zeros(4, C)}, ValueError, "condition is a Tensor, expected None.*=an int"),
        ("self", {"mask": [[True]]}, TypeError, "mask is a list, expected a bool or integer tensor"),
        ("self", {"mask": _mask(4, 5).float()}, TypeError, "mask has dtype torch.float32, expected bool.*mask == 0"),
        ("self", {"mask": _mask(4, 5, dtype=torch.complex64)}, TypeError, "mask has dtype torch.complex64"),
        ("self", {"mask": _mask(4, 5, N)}, ValueError, r"mask has shape \(4, 5, 6\), expected \(4, 5\)"),
        ("self", {"mask": _mask(4, 5).to_sparse()}, TypeError, r"mask has layout torch.sparse_coo.*mask\.to_dense\(\)"),
        ("self", {"mask": _mask(4)}, ValueError, r"mask has shape \(4,\), expected \(4, 5\)"),
        ("self", {"mask": _mask(4, 5, device="meta")}, ValueError, "mask is on meta, expected cpu"),
        ("self", {"x": torch.zeros(4, 5, N, device="meta")}, ValueError, "weight is on cpu, expected meta"),
        ("self", {"x": torch.zeros(0, 5, N)}, ValueError, r"x has shape \(0, 5, 6\), expected one sample or more"),
        ("self", {"x": torch.zeros(65536, N)}, ValueError, "65536 groups, expected 1 to 65535"),
        ("self", {"x": torch.zeros(4, 5, 7)}, ValueError, r"x has shape \(4, 5, 7\), expected \(\.\.\., 6\)"),
        (C, {}, TypeError, r"condition is a NoneType, expected a tensor \(samples, C\), here \(4, 3\)"),
        (C, {"condition": torch.zeros(4, C).long()}, TypeError, "condition has dtype torch.int64.*condition.float"),
        (C, {"condition": torch.zeros(4, C).to_mkldnn()}, TypeError, r"condition has layout torch\._mkldnn.*to_dense"),
        (C, {"condition": torch.zeros(4, C).to_sparse()}, TypeError, "condition has layout torch.sparse_coo"),
        (C, {"condition": torch.zeros(5, C)}, ValueError, r"condition has shape \(5, 3\), expected \(4, 3\)"),
        (C, {"condition": torch.zeros(4, 1, C)}, ValueError, r"condition has shape \(4, 1, 3\), expected \(4, 3\)"),
        (C, {"condition": torch.zeros(4, C, device="meta")}, ValueError, "condition is on meta, expected cpu"),
        (C, {"mask": _mask(4, 5)}, ValueError, r"mask is a Tensor, expected None.*condition='self'"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(condition, options, error, message):
    layer = KLConditionalLayerNorm(N, condition)
    with pytest.raises(error, match=message):
        layer(**{"x": torch.zeros(4, 5, N), **options})


def test_the_remedies_for_layouts_work():
    x, condition, mask = torch.randn(4, 5, N), torch.randn(4, C), _mask(4, 5)
    for layer, options in (trained("self").eval(), {"mask": mask}), (trained(C).eval(), {"condition": condition}):
        dense = {name: t.to_sparse().to_dense() for name, t in options.items()}
        assert torch.equal(layer(x, **options), layer(x, **dense))


@pytest.mark.parametrize(
    ("attribute", "value", "error"),
    [
        ("normalized_shape", N, TypeError),
        ("eps", "abc", TypeError),
        ("noise", numpy.zeros(2), TypeError),
        ("prior_std", "abc", TypeError),
        ("sample_dim", 7, ValueError),
    ],
)
def test_an_attribute_set_to_nonsense_is_named(attribute, value, error):
    layer, x = KLConditionalLayerNorm(N), torch.ones(2, N)
    layer(x)
    setattr(layer, attribute, value)
    with pytest.raises(error, match=attribute):
        layer(x)


def test_no_rows_give_empty_output_and_the_static_divergence(device):
    layer = trained(device=device)
    y = layer(torch.zeros(3, 0, N, dtype=torch.float64, device=device))
    assert y.shape == (3, 0, N)
    static = KLLayerNorm(N, device=device, dtype=torch.float64)
    static.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("condition")})
    torch.testing.assert_close(kl_divergence(layer), kl_divergence(static), rtol=1e-6, atol=0)
