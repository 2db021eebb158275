"""Trained conditional layers, their inputs, and what they must compute, by the definition."""

import torch
from torch import nn
from trained_layers import N, perturbed

from klnorm import KLConditionalLayerNorm, kl_divergence, reference

C = 3
NOISES = "batch", "sample", "token"
CONDITIONS = "self", C


def trained(condition="self", device="cpu", dtype=torch.float64, shape=N, **options):
    """A layer in which nothing is as in a new one, the low-rank part least of all."""
    return perturbed(KLConditionalLayerNorm(shape, condition, 2, device=device, dtype=dtype, **options))


def inputs(condition, leading=(4, 5), device="cpu", dtype=torch.float64, sample_dim=0, shape=(N,)):
    """x, and the keyword arguments of a forward: a condition, or a mask that leaves each sample some rows."""
    x = torch.randn(*leading, *shape, device=device, dtype=dtype, requires_grad=True)
    if condition == "self":
        mask = torch.rand(leading, device=device) > 0.4
        by_row = mask.movedim(sample_dim, -1)
        if mask.dim() > 1 and len(by_row) > 1:  # every sample has a real row and a padded one, whatever is drawn
            by_row[0] = True
            by_row[-1] = False
        else:
            mask.fill_(True)
        return x, {"mask": mask}
    return x, {"condition": torch.randn(leading[sample_dim], C, device=device, dtype=dtype, requires_grad=True)}


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
