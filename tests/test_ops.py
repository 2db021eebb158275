"""The operators: their registration, their gradients one by one, and what torch.compile makes of them."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from klnorm import KLLayerNorm, kl_divergence
from klnorm.functional import kl_layer_norm
from klnorm.reference import kl_layer_norm as reference

N = 6
NOISES = "batch", "sample", "token"
MODES = *NOISES, "none"
# torch's own warning, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")

NAMES = "x", "weight", "bias", "weight_rho", "bias_rho"


def make(device, leading=(3, 4), n=N, bias=True, dtype=torch.float64):
    """x and the parameters by name, random and requiring gradients."""
    sizes = {name: (*leading, n) if name == "x" else (n,) for name in NAMES if bias or "bias" not in name}
    return {name: torch.randn(size, device=device, dtype=dtype, requires_grad=True) for name, size in sizes.items()}


def call(tensors, function=kl_layer_norm, noise="sample", seed=5, **options):
    if not isinstance(seed, torch.Tensor):
        seed = torch.tensor([seed], device=tensors["x"].device)
    mode = {"noise": "batch", "sample": False} if noise == "none" else {"noise": noise}
    posterior = [tensors.get(name) for name in NAMES[1:]]
    return function(tensors["x"], tensors["weight"].shape, *posterior, seed=seed, **mode, **options)


def close(device):
    """Tolerance in fp64: rounding alone on the CPU, where op and reference share the normals; the kernels' are fp32."""
    tolerance = 1e-12 if device.type == "cpu" else 2e-5
    return {"rtol": tolerance, "atol": tolerance}


# Registration


def layouts(mode):
    """(draws, inner) of an x of shape (3, 4, N)."""
    return {"batch": (1, 12), "sample": (3, 4), "token": (12, 1), "none": (1, 12)}[mode]


def forward_arguments(device, mode, bias=True, tensor_prior=False, dtype=torch.float32, x=None, leading=(3, 4)):
    tensors = {name: t.detach() for name, t in make(device, leading, bias=bias, dtype=dtype).items()}
    prior = torch.randn(N, device=device, dtype=dtype) if tensor_prior else None
    return (
        tensors["x"] if x is None else x, None, *(tensors.get(name) for name in NAMES[1:]), prior,
        prior if bias else None, None if mode == "none" else torch.tensor([7], device=device),
        1.0, 0.0, 0.1, 1e-5, 0.0, *layouts(mode), 1, False, False, None,
    )  # fmt: skip


def backward_arguments(forward, with_dy=True, with_dkl=True, dy=None):
    y, total, kl, statistics = torch.ops.klnorm.norm_forward.default(*forward)
    dy = torch.randn_like(y) if dy is None else dy
    (x, residual, *tensors), numbers = forward[:9], forward[9:]
    z, dsum = (x, None) if residual is None else (total, torch.randn_like(total))
    cotangents = dy if with_dy else None, dsum, torch.randn_like(kl) if with_dkl else None
    return *cotangents, z, *tensors, statistics, *numbers[:-1], x.dtype


def opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.klnorm, name).default, arguments)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(device, mode, bias):
    forward = forward_arguments(device, mode, bias, tensor_prior=bias)
    opcheck("norm_forward", forward)
    opcheck("norm_backward", backward_arguments(forward))


@pytest.mark.parametrize("variant", ["rms", "residual", "deterministic", "groups", "heads", "all"])
def test_opcheck_of_the_family(device, variant):
    x, residual, *tensors = forward_arguments(device, "none" if variant == "deterministic" else "sample")
    *numbers, draws, inner, groups, per_head, _, dtype = tensors[7:]
    weight, bias, weight_rho, bias_rho, *priors_and_seed = tensors[:7]
    if variant == "deterministic":
        weight_rho = bias_rho = None
    if variant in ("rms", "all"):
        bias = bias_rho = None
    if variant in ("residual", "all"):
        residual = torch.randn(
            x.shape, device=device, dtype=torch.float64 if x.dtype == torch.float64 else torch.bfloat16
        )
    if variant in ("groups", "all"):
        parameters = (
            None if p is None else torch.randn(3, N, device=device) for p in (weight, bias, weight_rho, bias_rho)
        )
        (weight, bias, weight_rho, bias_rho), groups = parameters, 3
    if variant == "heads":  # of an x (3, 4, N)
        weight, bias, weight_rho, bias_rho = (torch.randn(4, N, device=device) for _ in range(4))
        inner, groups, per_head = 1, 4, True
    parameters, layout = (weight, bias, weight_rho, bias_rho), (draws, inner, groups, per_head)
    forward = x, residual, *parameters, *priors_and_seed, *numbers, *layout, variant in ("rms", "all"), dtype
    opcheck("norm_forward", forward)
    opcheck("norm_backward", backward_arguments(forward))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_other_dtypes(device, dtype):
    forward = forward_arguments(
        device, "sample", dtype=torch.float32, x=torch.randn(3, 4, N, device=device, dtype=dtype)
    )
    opcheck("norm_forward", forward)
    opcheck("norm_backward", backward_arguments(forward))


@pytest.mark.parametrize(("with_dy", "with_dkl"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("mode", ["sample", "token"])
def test_opcheck_with_gradients_missing(device, mode, with_dy, with_dkl):
    opcheck("norm_backward", backward_arguments(forward_arguments(device, mode), with_dy, with_dkl))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_strided_tensors(device, mode):
    """Traced outputs are contiguous, and so must the real ones be."""
    x = torch.randn(N, 12, device=device).t()
    dy = torch.randn(N, 12, device=device).t()
    forward = forward_arguments(device, mode, x=x)
    opcheck("norm_forward", forward)
    opcheck("norm_backward", backward_arguments(forward, dy=dy))
    wide = torch.randn(3, 4, 2 * N, device=device)[..., 1 : N + 1]
    forward = forward_arguments(device, mode, x=wide)
    opcheck("norm_forward", forward)
    opcheck("norm_backward", backward_arguments(forward, dy=torch.ones((), device=device).expand(3, 4, N)))


def test_opcheck_of_no_rows(device):
    forward = forward_arguments(device, "sample", leading=(0, 4))
    opcheck("norm_forward", (*forward[:-6], 0, 4, 1, False, False, None))
    backward = backward_arguments((*forward[:-6], 0, 4, 1, False, False, None))
    opcheck("norm_backward", backward)


# Where autograd's Functions call the implementations without the dispatcher


class Operators(TorchDispatchMode):
    """The names of klnorm's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == "klnorm" else []
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators(device):
    tensors = make(device)
    plain = torch.autograd.grad(call(tensors)[0].square().sum(), list(tensors.values()))
    with Operators() as seen:
        y, _ = call(tensors)
    with Operators() as seen_backward:
        found = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    assert (seen.names, seen_backward.names) == (["klnorm::norm_forward"], ["klnorm::norm_backward"])
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_fake_tensors_reach_no_implementation(device):
    with FakeTensorMode():
        tensors = make(device)
        y, kl = call(tensors)
        gradients = torch.autograd.grad((y.sum(), kl), list(tensors.values()))
    assert y.shape == (3, 4, N)
    assert [g.shape for g in gradients] == [t.shape for t in tensors.values()]


def test_meta_tensors_reach_no_implementation():
    tensors = make(torch.device("meta"))
    y, kl = call(tensors)
    assert (y.is_meta, kl.is_meta, y.shape) == (True, True, (3, 4, N))
    assert all(g.is_meta for g in torch.autograd.grad((y.sum(), kl), list(tensors.values())))


class Named(torch.Tensor):
    """A subclass of tensors, which are to see every operator."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"Named saw {func.name()}")


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_of_tensors_sees_the_operators(device, name):
    tensors = {key: t.detach() for key, t in make(device).items()}
    tensors[name] = torch.Tensor._make_subclass(Named, tensors[name])
    with pytest.raises(NotImplementedError, match="Named saw klnorm::norm_forward"):
        call(tensors)


# Gradients one by one


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("through", ["y", "kl"])
def test_gradient_through_one_output_alone(device, through, mode, bias):
    tensors = make(device, bias=bias)
    inputs = list(tensors.values())
    cotangent = (
        torch.randn(3, 4, N, dtype=torch.float64, device=device) if through == "y" else inputs[0].new_tensor(-1.3)
    )
    index = 0 if through == "y" else 1
    found = torch.autograd.grad(call(tensors, noise=mode)[index], inputs, cotangent, allow_unused=True)
    expected = torch.autograd.grad(
        call(tensors, reference, noise=mode)[index], inputs, cotangent, allow_unused=True, materialize_grads=True
    )
    for name, grad, right in zip(tensors, found, expected, strict=True):
        if through == "kl" and name == "x":
            assert grad is None  # no gradient of the size of x is made
        else:
            torch.testing.assert_close(grad, right, **close(device), msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [*NAMES, ("x", "weight_rho")], ids=str)
def test_gradient_of_some_inputs_alone(device, wanted, mode):
    tensors = make(device)
    dy = torch.randn(3, 4, N, dtype=torch.float64, device=device)
    every = torch.autograd.grad(call(tensors, noise=mode)[0], list(tensors.values()), dy)
    every = dict(zip(tensors, every, strict=True))
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    for name, t in tensors.items():
        t.requires_grad_(name in wanted)
    some = torch.autograd.grad(call(tensors, noise=mode)[0], [tensors[name] for name in wanted], dy)
    assert all(torch.equal(grad, every[name]) for name, grad in zip(wanted, some, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_results_are_repeatable_bit_for_bit(device, mode):
    tensors = make(device, (5, 13), n=257, dtype=torch.float32)
    dy, one = torch.randn(5, 13, 257, device=device), torch.ones((), device=device)

    def once():
        y, kl = call(tensors, noise=mode)
        first = torch.autograd.grad((y, kl), list(tensors.values()), (dy, one), retain_graph=True)
        again = torch.autograd.grad((y, kl), list(tensors.values()), (dy, one))
        return y, kl, *first, *again

    expected = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(once(), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected[2:7], expected[7:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_a_saved_input_is_noticed(device, name):
    tensors = make(device)
    y, _ = call(tensors)
    with torch.no_grad():
        tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# No second derivatives

NO_SECOND = "klnorm has no second derivatives.*klnorm.reference.kl_layer_norm"


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", [*NAMES, "dy"])
@pytest.mark.parametrize("mode", ["sample", "token", "none"])
def test_a_second_derivative_is_refused(device, mode, first, second):
    tensors = make(device)
    tensors["dy"] = torch.randn(3, 4, N, dtype=torch.float64, device=device, requires_grad=True)
    y, kl = call(tensors, noise=mode)
    (grad,) = torch.autograd.grad((y, kl), tensors[first], (tensors["dy"], kl.new_ones(())), create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        torch.autograd.grad(grad.square().sum(), tensors[second], allow_unused=True)


def test_a_gradient_penalty_is_refused(device):
    tensors = make(device)
    model = nn.Linear(N, 1, dtype=torch.float64, device=device)
    loss = model(call(tensors)[0]).tanh().sum()
    (dx,) = torch.autograd.grad(loss, tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        (loss + dx.square().sum()).backward()


def test_a_second_derivative_of_the_kl_alone_is_refused(device):
    tensors = make(device)
    (grad,) = torch.autograd.grad(call(tensors)[1], tensors["weight_rho"], create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        grad.sum().backward()


def test_create_graph_alone_gives_the_first_derivatives(device):
    tensors = make(device)
    dy = torch.randn(3, 4, N, dtype=torch.float64, device=device)
    kept = torch.autograd.grad(call(tensors)[0], list(tensors.values()), dy, create_graph=True)
    plain = torch.autograd.grad(call(tensors)[0], list(tensors.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(kept, plain, strict=True))


def test_a_second_derivative_around_the_op_works(device):
    """d/dx of d/dz (z^2 y . v) differentiates the op once."""
    tensors, z = make(device), torch.tensor(1.5, dtype=torch.float64, device=device, requires_grad=True)
    y, _ = call(tensors)
    v = torch.randn_like(y)
    (dz,) = torch.autograd.grad(z**2 * (y * v).sum(), z, create_graph=True)
    (mixed,) = torch.autograd.grad(dz, tensors["x"], retain_graph=True)
    (dx,) = torch.autograd.grad(y, tensors["x"], v)
    torch.testing.assert_close(mixed, 2 * 1.5 * dx, rtol=1e-12, atol=1e-12)


# torch.compile


def assert_compiled_equals_eager(function, tensors, device, backend="aot_eager"):
    """Outputs and gradients of `function`, compiled into one graph, are those of eager for the same seed."""
    cotangents = None

    def run(function):
        nonlocal cotangents
        torch.manual_seed(3)
        outputs = function()
        if cotangents is None:
            cotangents = [torch.randn_like(output) for output in outputs]
        return *outputs, *torch.autograd.grad(outputs, tensors, cotangents)

    expected = run(function)
    found = run(torch.compile(function, fullgraph=True, backend=backend))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **close(device))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("own_seed", [True, False], ids=["seed", "no_seed"])
@pytest.mark.parametrize("mode", NOISES)
def test_compiled_functional_equals_eager(device, mode, own_seed):
    tensors = make(device, bias=mode != "batch")
    seed = torch.tensor([9], device=device) if own_seed else None

    def function():
        return kl_layer_norm(
            tensors["x"], (N,), *(tensors.get(name) for name in NAMES[1:]), noise=mode, seed=seed,
            weight_prior=tensors["weight"].detach() if own_seed else 1.0,
        )  # fmt: skip

    assert_compiled_equals_eager(function, list(tensors.values()), device)


def small_model(device, noise="sample", **options):
    model = nn.Sequential(
        nn.Linear(4, N), KLLayerNorm(N, noise=noise, **options), nn.GELU(), KLLayerNorm(N), nn.Linear(N, 2)
    )
    return model.to(device, torch.float64)


def training_step(model, x):
    return lambda: (model(x).square().mean() + kl_divergence(model) / 100,)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_model_with_the_kl_in_its_loss_equals_eager(device, training):
    model, x = small_model(device).train(training), torch.randn(5, 4, dtype=torch.float64, device=device)
    assert_compiled_equals_eager(training_step(model, x), list(model.parameters()), device)


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("mode", ["sample", "token"])
def test_inductor_equals_eager(device, mode):
    """On a strided x, as inductor relies on the strides seen in tracing. The loss stays outside: its C++ takes long."""
    tensors = make(device)
    tensors["x"] = torch.randn(N, 12, dtype=torch.float64, device=device).t().requires_grad_()
    parameters = list(tensors.values())[1:]
    assert_compiled_equals_eager(
        lambda: kl_layer_norm(tensors["x"], (N,), *parameters, noise=mode), list(tensors.values()), device, "inductor"
    )


@pytest.mark.usefixtures("inductor")
def test_inductor_draws_fresh_noise_for_every_layer_and_call(device):
    layers = nn.ModuleList([KLLayerNorm(N), KLLayerNorm(N)]).to(device)
    function = torch.compile(lambda x: (layers[0](x), layers[1](x)), fullgraph=True, backend="inductor")
    x = torch.randn(3, 4, N, device=device)
    outputs = *function(x), *function(x)
    assert all(not torch.isclose(outputs[i], outputs[j]).all() for i in range(4) for j in range(i))
    torch.manual_seed(3)
    first = function(x)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, function(x), strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_layers_draw_different_seeds(device):
    layers = nn.ModuleList([KLLayerNorm(N), KLLayerNorm(N)]).to(device)
    function = torch.compile(lambda x: (layers[0](x), layers[1](x)), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, N, device=device)
    torch.manual_seed(3)
    outputs = *function(x), *function(x)
    assert all(not torch.isclose(outputs[i], outputs[j]).all() for i in range(4) for j in range(i))
    torch.manual_seed(3)
    eager = layers[0](x), layers[1](x), layers[0](x), layers[1](x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, eager, strict=True))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", NOISES)
def test_a_dynamic_graph_serves_every_batch_size(device, mode):
    counter = CompileCounterWithBackend("aot_eager")
    model, compilations = small_model(device, mode), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in 3, 5, 13:
        x = torch.randn(size, 7, 4, dtype=torch.float64, device=device)
        torch.manual_seed(size)
        y = compiled(x)
        found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        torch.manual_seed(size)
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **close(device))
        compilations.append(counter.frame_count)
    assert compilations == [compilations[0]] * 3  # none after the first call
    assert compilations[0] > 0


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_kl_outside_a_compiled_forward_is_exact(device):
    model, x = small_model(device), torch.randn(5, 4, dtype=torch.float64, device=device)
    expected = kl_divergence(model)
    gradients = torch.autograd.grad(expected, list(model[1].parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(x).square().sum() + kl_divergence(compiled)
    loss.backward(retain_graph=True)
    model.zero_grad()
    kl_divergence(model).backward()
    torch.testing.assert_close(kl_divergence(compiled), expected, **close(device))
    for p, gradient in zip(model[1].parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, **close(device))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("after_forward", [False, True])
def test_a_compiled_kl_alone(device, after_forward):
    model = small_model(device)
    y = model(torch.randn(5, 4, dtype=torch.float64, device=device)) if after_forward else None
    assert_compiled_equals_eager(lambda: (kl_divergence(model),), list(model[1].parameters()), device)
    y = model(torch.randn(5, 4, dtype=torch.float64, device=device)) if after_forward else y  # an unspent graph
    kl = torch.compile(lambda: kl_divergence(model), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(kl, kl_divergence(model), **close(device))
    assert y is None or y.requires_grad


@pytest.mark.usefixtures("fresh_dynamo")
def test_bad_input_is_explained_while_tracing_too(device):
    layer = torch.compile(KLLayerNorm(N, device=device), backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError), match=r"x has shape \(3, 7\), expected \(\.\.\., 6\)"):
        layer(torch.zeros(3, 7, device=device))
