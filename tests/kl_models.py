"""Small models with a KL-Norm, and what their KL divergence and its gradient must be."""

import torch
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as divergence_of
from torch.utils.checkpoint import checkpoint
from trained_layers import N, perturbed

from klnorm import KLLayerNorm, kl_divergence


def small_model(device, dtype=torch.float64, following=nn.Linear, **options):
    """Linear, KL-Norm, and a layer that does (nn.Linear) or does not (nn.Dropout) save its input; random posteriors."""
    last = following(N, 3) if following is nn.Linear else following()
    model = nn.Sequential(nn.Linear(4, N), KLLayerNorm(N, prior_std=0.4, **options), last).to(device, dtype)
    perturbed(model[1])
    return model


def batch(device, dtype=torch.float64):
    return torch.randn(5, 4, device=device, dtype=dtype)


def by_distributions(*layers):
    """The KL divergence of layers according to torch.distributions, differentiable, in fp64."""
    total = 0
    for layer in layers:
        for name in "weight", "bias":
            mean, rho, prior = (getattr(layer, name + suffix) for suffix in ("", "_rho", "_prior"))
            if mean is not None:
                s = nn.functional.softplus(rho.double())
                prior = Normal(prior.double(), torch.full_like(s, layer.prior_std))
                total = total + divergence_of(Normal(mean.double(), s), prior).sum()
    return total


def gradients_of(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return {name: grad for (name, _), grad in zip(model.named_parameters(), found, strict=True)}


def assert_same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for name in found:
        if found[name] is None or expected[name] is None:
            assert not any(g is not None and g.any() for g in (found[name], expected[name])), name
        else:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def is_attached(kl):
    """Whether the graph of `kl` leads to a layer's forward."""
    nodes = [kl.grad_fn]
    while nodes:
        node = nodes.pop()
        if node.name() == "KLNormFunctionBackward":
            return True
        nodes += [child for child, _ in node.next_functions if child is not None]
    return False


class Twice(nn.Module):
    """One layer, used twice in a forward and registered under two names."""

    def __init__(self, device):
        super().__init__()
        self.first = KLLayerNorm(N, device=device, dtype=torch.float64, init_std=0.3)
        self.linear = nn.Linear(N, N, device=device, dtype=torch.float64)
        self.second = self.first
        self.head = nn.Linear(N, 3, device=device, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.second(self.linear(self.first(x))))


def closed_form(model):
    """(value, gradients) that `kl_divergence` must have, whatever happened before."""
    expected = by_distributions(*(m for m in model.modules() if isinstance(m, KLLayerNorm)))
    return expected.detach(), gradients_of(expected, model)


def assert_exact(model, attached):
    """`kl_divergence` has the right value and gradient, from where it should; what was attached is spent by that."""
    kl = kl_divergence(model)
    assert is_attached(kl) == attached
    value, grads = closed_form(model)
    torch.testing.assert_close(kl.detach(), value, rtol=1e-12, atol=1e-12)
    assert_same(gradients_of(kl, model), grads)


class Checkpointed(nn.Module):
    """Linear, then a block with a KL-Norm at its start, in its middle or at its end, checkpointed or not."""

    def __init__(self, device, place, reentrant):
        super().__init__()
        block = [nn.Linear(N, N), nn.GELU(), nn.Dropout(0.3)]
        block.insert(place, KLLayerNorm(N, init_std=0.3))
        self.stem, self.block, self.head = nn.Linear(4, N), nn.Sequential(*block), nn.Linear(N, 3)
        self.to(device, torch.float64)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.stem(x)
        if self.reentrant is None:
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))
