"""What works with static layers works with conditional ones: checkpointing, compiling, autocast, sharding, ..."""

import copy
import weakref

import pytest
import torch
from conditional_layers import (
    CONDITIONS,
    NOISES,
    C,
    Model,
    N,
    assert_same,
    differentiable,
    exactness,
    gradients,
    inputs,
    loss_of,
    specified,
    trained,
)
from torch import nn
from torch.distributed import fsdp
from torch.utils.checkpoint import checkpoint
from trained_layers import seeded

import klnorm
from klnorm import KLConditionalLayerNorm, kl_divergence


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
def test_fsdp2_needs_the_parameters_whole(device, process_group, reshard):
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
