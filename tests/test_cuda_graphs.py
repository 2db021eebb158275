"""CUDA graphs: a captured step draws fresh noise at every replay. Runs on a GPU alone (`--device cuda`)."""

import pytest
import torch
from bert_training import assert_close, gradients_of
from torch import nn

import klnorm

pytestmark = pytest.mark.own_process
N = 64
# of fp64: the noise is the same to the last bit, sums may be in another order
ROUNDING = 1e-10


@pytest.fixture(autouse=True)
def _gpu(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs are a feature of GPUs: --device cuda")


def small_model(device, **options):
    norms = klnorm.KLLayerNorm(N, noise="sample", **options), klnorm.KLLayerNorm(N, noise="token", **options)
    model = nn.Sequential(nn.Linear(8, N), norms[0], nn.GELU(), nn.Linear(N, N), norms[1], nn.Linear(N, 2))
    return model.to(device, torch.float64)


def loss_of(model, x):
    return model(x).square().mean() + klnorm.kl_divergence(model) / 100


def random_input(device):
    return torch.randn(4, 5, 8, device=device, dtype=torch.float64)


def captured_step(model, x, generator=None, loss_of=loss_of):
    """(graph, loss) of forward and backward, captured after a warm-up on another stream, as torch's notes tell."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            loss_of(model, x).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        loss = loss_of(model, x)
        loss.backward()
    return graph, loss


@pytest.mark.parametrize("own_generator", [False, True], ids=["torchs_generator", "own_generator"])
def test_every_replay_draws_fresh_noise_and_is_right(device, own_generator):
    generator = torch.Generator(device) if own_generator else None
    model, x = small_model(device, generator=generator), random_input(device)
    seeds = torch.cuda if generator is None else generator

    def eager(model, x):
        seeds.manual_seed(5)
        return loss_of(model, x)

    expected = gradients_of(eager, model, x)
    expected = {name: t.clone() for name, t in expected.items()}
    graph, loss = captured_step(model, x, generator)
    replays = []
    seeds.manual_seed(5)
    for _ in range(3):
        graph.replay()
        replays.append({"loss": loss.detach().clone(), **{n: p.grad.clone() for n, p in model.named_parameters()}})
    assert_close(replays[0], expected, ROUNDING)
    for name in "1.weight_rho", "4.bias_rho", "0.weight":
        assert all(not torch.isclose(replays[i][name], replays[j][name]).all() for i in range(3) for j in range(i))
    seeds.manual_seed(5)
    graph.replay()
    assert torch.equal(loss, replays[0]["loss"])


def test_the_kl_beside_a_graphed_model_is_exact(device):
    model, x = small_model(device), random_input(device)
    expected = klnorm.kl_divergence(model)
    gradients = torch.autograd.grad(expected, list(model[1].parameters()))
    expected = expected.detach()  # a graph that lives on ties the parameters' gradients to the default stream
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    outputs = [graphed(x).detach().clone() for _ in range(3)]
    assert all(not torch.isclose(outputs[i], outputs[j]).all() for i in range(3) for j in range(i))
    graphed(x).square().mean().backward()
    kl = klnorm.kl_divergence(model)
    torch.testing.assert_close(kl, expected, rtol=ROUNDING, atol=ROUNDING)
    for found, right in zip(torch.autograd.grad(kl, list(model[1].parameters())), gradients, strict=True):
        torch.testing.assert_close(found, right, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.usefixtures("inductor")
def test_compiled_into_graphs(device):
    """mode="reduce-overhead" runs, records, then replays: three calls are one of each."""
    model, x = small_model(device), random_input(device)
    compiled = torch.compile(loss_of, mode="reduce-overhead")
    for seed in range(4):
        expected = gradients_of(loss_of, model, x, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        found = {name: t.clone() for name, t in gradients_of(compiled, model, x, seed=seed).items()}
        assert_close(found, expected, ROUNDING)


def test_a_captured_step_sees_the_warm_up_of_the_weight(device):
    model, x = small_model(device), random_input(device)
    kl_weight = klnorm.KLWeight(num_examples=10, warmup_steps=2, device=device)

    def weighted_kl(model, x):
        return 0 * model(x).square().mean() + kl_weight(model)

    graph, loss = captured_step(model, x, loss_of=weighted_kl)
    found, kl = [], klnorm.kl_divergence(model).item()
    for _ in range(4):
        graph.replay()
        found.append(loss.item() / kl)
        kl_weight.step()
    assert found == pytest.approx([0.0, 0.05, 0.1, 0.1], rel=ROUNDING)
