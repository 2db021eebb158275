"""What the cases in this folder share: a model, a batch, and the gradients of a training step."""

import torch
import torch.nn.functional as F
from torch import nn

import klnorm

WIDTH, EXAMPLES = 5, 8  # two ranks get three and two features of every parameter that FSDP2 shards
SILENT_RHO = -40.0  # a deviation of 4e-18, which fp64 does not see beside a scale of 1


def make_model(seed=1, noise="sample", silent=False, conditional=False, dtype=torch.float64):
    """The same on every rank: two blocks and a norm after them, KL layers all three, posteriors off their priors."""
    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)).to(dtype)
    klnorm.replace_layer_norm(model, noise=noise)
    if conditional:
        model[2] = klnorm.KLConditionalLayerNorm(WIDTH, rank=2, noise=noise, dtype=dtype)
    with torch.no_grad():
        for layer in klnorm.kl_layers(model).values():
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.add_(0.1 * torch.randn_like(tensor))
            for rho in (layer.weight_rho, layer.bias_rho) if silent else ():
                rho.fill_(SILENT_RHO)
    return model


def joined_batch(dtype=torch.float64):
    """(x, target) of all ranks."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(EXAMPLES, 4, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (EXAMPLES, 4), generator=generator)


def part(rank, dtype=torch.float64):
    """(x, target) of one rank: its half of the joined batch."""
    return tuple(tensor.chunk(2)[rank] for tensor in joined_batch(dtype))


def loss_of(model, x, target):
    """Cross-entropy and KL / EXAMPLES, as a training step on one rank has it."""
    return F.cross_entropy(model(x).flatten(0, 1), target.flatten()) + klnorm.kl_divergence(model) / EXAMPLES


def gradients(model):
    """{name as without a wrapper: gradient, whole and on its own}, of the parameters that have one."""
    named = [(name.removeprefix("module."), p.grad) for name, p in model.named_parameters()]
    return {name: klnorm.compat.whole(grad).clone() for name, grad in named if grad is not None}


def gradients_of(model, batch, seed=0):
    """Those of one training step."""
    torch.manual_seed(seed)
    loss_of(model, *batch).backward()
    return gradients(model)


def alone(batch, seed=0, **options):
    """Gradients of a model of one process."""
    return gradients_of(make_model(**options), batch, seed)


def mean(*gradients):
    """Of dicts of tensors."""
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}
