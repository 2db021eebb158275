"""Cases of DistributedDataParallel. Each returns (found, expected); what is expected was computed without it."""

import torch
from common import EXAMPLES, alone, gradients, gradients_of, joined_batch, loss_of, make_model, mean, part
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import klnorm


def parallel(rank, seed=0, find_unused_parameters=False, **options):
    """Gradients of DistributedDataParallel, on this rank."""
    model = DistributedDataParallel(make_model(**options), find_unused_parameters=find_unused_parameters)
    return gradients_of(model, part(rank), seed)


def without_noise(rank):
    return parallel(rank, silent=True), alone(joined_batch(), silent=True)


def finding_unused_parameters(rank):
    return parallel(rank, find_unused_parameters=True, silent=True), alone(joined_batch(), silent=True)


def noise_of_its_own(rank):
    """Seeds 0 and 1: the mean of what the two halves give by themselves."""
    return parallel(rank, seed=rank), mean(alone(part(0), seed=0), alone(part(1), seed=1))


def one_draw_for_all(rank):
    """One seed on all ranks and one draw in a forward: the draw of the joined batch."""
    return parallel(rank, noise="batch"), alone(joined_batch(), noise="batch")


def conditional(rank):
    """A KL divergence that is a mean over samples: over those of all ranks."""
    options = {"silent": True, "conditional": True}
    return parallel(rank, **options), alone(joined_batch(), **options)


def noise_on_one_input(rank):
    """Output for the same input on every rank, and that of one process with the seed of this rank."""
    outputs = []
    for model in DistributedDataParallel(make_model()), make_model():
        torch.manual_seed(rank)
        outputs.append(model(joined_batch()[0]).detach())
    return tuple(outputs)


def divergence(rank):
    """Before the forward and after it."""
    model = DistributedDataParallel(make_model())
    before = klnorm.kl_divergence(model).detach()
    y = model(part(rank)[0])
    found = torch.stack([before, klnorm.kl_divergence(model).detach()])
    assert y.requires_grad
    return found, klnorm.kl_divergence(make_model()).detach().expand(2)


def accumulation(rank):
    """Two parts of a rank's half, the first without synchronization, half the loss each."""
    model = DistributedDataParallel(make_model(silent=True))
    x, target = part(rank)
    with model.no_sync():
        (loss_of(model, x[:2], target[:2]) / 2).backward()
    (loss_of(model, x[2:], target[2:]) / 2).backward()
    return gradients(model), alone(joined_batch(), silent=True)


def two_forwards(rank):
    """Before one backward, as losses that compare two draws have it."""

    def gradients_between(model, rank):
        x = part(rank)[0]
        torch.manual_seed(rank)
        ((model(x) - model(x)).square().mean() + klnorm.kl_divergence(model) / EXAMPLES).backward()
        return gradients(model)

    found = gradients_between(DistributedDataParallel(make_model()), rank)
    return found, mean(*(gradients_between(make_model(), other) for other in range(2)))


def training(rank):
    """Parameters after three steps with noise, on this rank."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, *part(rank)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach(), None


CASES = [
    without_noise, finding_unused_parameters, noise_of_its_own, one_draw_for_all, conditional, noise_on_one_input,
    divergence, accumulation, two_forwards, training,
]  # fmt: skip
