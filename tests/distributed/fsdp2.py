"""Cases of FSDP2, `fully_shard`. Each returns (found, expected); what is expected was computed without it."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as checkpoint
from common import alone, gradients, gradients_of, joined_batch, loss_of, make_model, mean, part
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import klnorm

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
WHOLE = checkpoint.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model, **options):
    """Two blocks sharded each, the norm and the linear layer after them with the root."""
    for block in model[:2]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def parallel(rank, seed=0, **options):
    """Gradients of the sharded model, whole."""
    return gradients_of(shard(make_model(**options)), part(rank), seed)


def divergence(model, x=None):
    """Its value, of the whole and of one layer, and its gradient; after a forward if there is an input."""
    y = torch.zeros(()) if x is None else model(x)
    kl, of_one_layer = klnorm.kl_divergence(model), model[0][1].kl_divergence()
    (0 * y.sum() + kl).backward()
    plain = torch.tensor([type(tensor) is torch.Tensor for tensor in (kl, of_one_layer)])
    return {"kl": kl.detach(), "of one layer": of_one_layer.detach(), "plain": plain, **gradients(model)}


def without_noise(rank):
    return parallel(rank, silent=True), alone(joined_batch(), silent=True)


def noise_of_its_own(rank):
    """Seeds 0 and 1: the mean of what the two halves give by themselves."""
    return parallel(rank, seed=rank), mean(alone(part(0), seed=0), alone(part(1), seed=1))


def kl_of_shards(rank):
    return divergence(shard(make_model())), divergence(make_model())


def kl_after_a_forward(rank):
    """The blocks are sharded again by then; the root's own parameters are not, and their gradient goes another way."""
    x, model = part(rank)[0], shard(make_model())
    y = model(x)
    sharded = [hasattr(layer.weight, "device_mesh") for layer in klnorm.kl_layers(model).values()]
    assert sharded == [True, True, False]
    y.sum().backward()
    model.zero_grad()
    return divergence(model, x), divergence(make_model(), x)


def training(rank):
    """Parameters after three steps with the noise silent, and the last loss, the mean over ranks."""
    results = []
    for model, batch in (shard(make_model(silent=True)), part(rank)), (make_model(silent=True), joined_batch()):
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model, *batch)
            loss.backward()
            optimizer.step()
        parameters = {name: klnorm.compat.whole(p).detach() for name, p in model.named_parameters()}
        results.append({**parameters, "loss": loss.detach()})
    dist.all_reduce(results[0]["loss"])
    results[0]["loss"] /= 2
    return tuple(results)


def posteriors_in_a_group_of_their_own(rank):
    model = make_model(silent=True)
    fully_shard(list(klnorm.kl_layers(model).values()))
    return gradients_of(shard(model), part(rank)), alone(joined_batch(), silent=True)


def half_precision(rank):
    """Divergence of each layer after a forward: the blocks' of fp32 parameters, the root's own of bf16 ones."""
    x, model, expected = part(rank, torch.float32)[0], make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    y = shard(model, mp_policy=HALF)(x)
    found = [layer.kl_divergence().detach() for layer in klnorm.kl_layers(model).values()]
    assert y.dtype == torch.bfloat16
    for parameter in expected[2].parameters():
        parameter.data = parameter.data.bfloat16()
    return found, [layer.kl_divergence().detach() for layer in klnorm.kl_layers(expected).values()]


def half_precision_but_for_the_posteriors(rank):
    """Divergence after a forward; and the dtypes of weight, input and output of every KL layer in that forward."""
    model, dtypes = make_model(dtype=torch.float32), []
    fully_shard(list(klnorm.kl_layers(model).values()))
    shard(model, mp_policy=HALF)
    for layer in klnorm.kl_layers(model).values():
        layer.register_forward_hook(lambda layer, args, y: dtypes.append([layer.weight.dtype, args[0].dtype, y.dtype]))
    y = model(part(rank, torch.float32)[0])
    found = klnorm.kl_divergence(model).detach()
    assert y.dtype == torch.bfloat16
    expected = klnorm.kl_divergence(make_model(dtype=torch.float32)).detach()
    return {"kl": found, "dtypes": dtypes}, {"kl": expected}


def state(rank):
    """The whole state, which rank 0 holds, loaded by one process; and loaded into shards that start without values."""
    whole = checkpoint.get_model_state_dict(shard(make_model()), options=WHOLE)
    one_process = make_model(seed=2)
    if rank == 0:
        one_process.load_state_dict(whole)
    with torch.device("meta"):
        again = shard(make_model())
    again.to_empty(device="cpu")
    back = checkpoint.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    checkpoint.set_model_state_dict(again, whole, options=back)
    found = {
        "one process": one_process.state_dict() if rank == 0 else None,
        "shards": {name: klnorm.compat.whole(tensor) for name, tensor in again.state_dict().items()},
    }
    return found, make_model().state_dict()


def not_finite(rank):
    """The error on this rank, where the value is on one of them."""
    model = make_model()
    with torch.no_grad():
        model[1][1].bias[4] = torch.nan  # the last rank's
    try:
        klnorm.kl_divergence(shard(model))
    except ValueError as error:
        return str(error), None
    return None, None


def summary(rank):
    """Of parameters that the ranks have unequal parts of; then the error where each has a bias that is not finite."""
    model = shard(make_model())
    bias = model[0][1].bias
    assert type(bias).__name__ == "DTensor"
    assert bias.to_local().numel() < bias.numel()
    found = klnorm.summary(model)
    bias.data.to_local()[0] = torch.nan
    try:
        klnorm.summary(model)
    except ValueError as error:
        return {"summary": found, "error": str(error)}, klnorm.summary(make_model())
    return {"summary": found, "error": None}, None


CASES = [
    without_noise, noise_of_its_own, kl_of_shards, kl_after_a_forward, training, state, not_finite,
    posteriors_in_a_group_of_their_own, half_precision, half_precision_but_for_the_posteriors, summary,
]  # fmt: skip
