"""Layers that another library has put something over: parameters offloaded by accelerate, a forward of its own."""

import contextlib
import copy
import functools
import types

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device
from rms_classes import N, Rms
from torch import nn

import klnorm
from klnorm import KLConditionalLayerNorm, kl_divergence, kl_layers, replace_layer_norm, replace_rms_norm, summary


def replaced():
    layers = nn.Linear(4, N), nn.LayerNorm(N), nn.RMSNorm(N), Rms(), nn.Linear(N, 2)
    return replace_rms_norm(replace_layer_norm(nn.Sequential(*layers)))


def dispatched(model, folder):
    """The first norm on the CPU, the second on disk, the third offloaded to CPU memory."""
    device_map = {"0": "cpu", "1": "cpu", "2": "disk", "3": "disk", "4": "cpu"}
    accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "cpu_with_buffers": lambda model, folder: accelerate.cpu_offload(model, "cpu", offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, "cpu", offload_buffers=True),
    "dispatched": dispatched,
}


@contextlib.contextmanager
def aligned(model):
    """As the message says."""
    with contextlib.ExitStack() as stack:
        for layer in kl_layers(model).values():
            stack.enter_context(align_module_device(layer))
        yield


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
def test_the_kl_of_offloaded_layers_is_refused_with_the_way_that_works(offload, training, tmp_path):
    model, x = replaced().train(training), torch.randn(3, 4)
    kl, report = kl_divergence(model), summary(model)
    offload(model, str(tmp_path))
    model(x)
    first = next(name for name, layer in kl_layers(model).items() if layer.weight.is_meta)
    named = rf"(weight|bias) of layer '{first}' is on the meta device.* accelerate.*Remedy: .*align_module_device"
    for ask in kl_divergence, summary:
        with pytest.raises(ValueError, match=named):
            ask(model)
    with pytest.raises(ValueError, match=r"layer '\(the model itself\)' .* accelerate.*Remedy: .*align_module_device"):
        model[int(first)].kl_divergence()
    with aligned(model):
        torch.testing.assert_close(kl_divergence(model), kl)
        assert summary(model) == report
    assert klnorm.mc_predict(model, x, samples=2).mutual_information.sum() > 0
    assert kl_layers(model)[first].weight.is_meta


def test_the_kl_of_an_offloaded_conditional_layer_is_refused_with_the_way_that_works():
    model, x = nn.Sequential(nn.Linear(4, N), KLConditionalLayerNorm(N)), torch.randn(3, 4)
    accelerate.cpu_offload(model, execution_device="cpu")
    model(x)
    with pytest.raises(ValueError, match=r"layer '1' .* accelerate.*Remedy: .*align_module_device"):
        kl_divergence(model)
    with aligned(model):
        assert kl_divergence(model).item() > 0


def test_hooks_that_offload_nothing_leave_the_kl():
    model, x = replaced(), torch.randn(3, 4)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "_hf_hook" in vars(model)
    for layer in kl_layers(model).values():
        add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu"))
    model(x).sum().backward()
    torch.testing.assert_close(kl_divergence(model), kl_divergence(replaced()))


def test_a_model_on_the_meta_device_has_a_kl_there():
    with torch.device("meta"):
        model = replaced()
    assert kl_divergence(model).is_meta
    model(torch.zeros(3, 4, device="meta"))
    assert kl_divergence(model).is_meta


@pytest.mark.parametrize("absent", [lambda m: m[1].to("meta"), lambda m: m[3].to("meta"), None], ids="13p")
def test_a_model_that_is_on_the_meta_device_in_part_is_refused(absent):
    model = replaced()
    if absent is None:
        model[1].weight = nn.Parameter(model[1].weight.to("meta"))
    else:
        absent(model)
    with pytest.raises(ValueError, match=r"weight of layer '[13]' is on the meta device.*Remedy: .*to_empty"):
        kl_divergence(model)
    model.to_empty(device="cpu").load_state_dict(replaced().state_dict())
    assert kl_divergence(model).item() > 0


def fast_forward(self, x):
    """As Liger and unsloth bind one."""
    return F.layer_norm(x, (N,), self.weight, getattr(self, "bias", None))


def lambda_around(layer):
    own = layer.forward
    return lambda *args: own(*args)


def wraps(layer):
    own = layer.forward

    @functools.wraps(own)
    def timed(*args):
        return own(*args)

    return timed


BAD_FORWARD = r"layer '{}' is in training mode with a forward that .*nothing is sampled.*Remedy: del layer.forward"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("index", [1, 2, 3])
def test_a_forward_bound_over_a_layers_own_is_refused_when_the_kl_is_taken(index, hooked, compiled):
    model, x = replaced(), torch.randn(3, 4)
    layer = model[index]
    layer.forward = types.MethodType(fast_forward, layer)
    if hooked:
        add_hook_to_module(layer, accelerate.hooks.ModelHook())
    ask = torch.compile(kl_divergence, backend="eager") if compiled else kl_divergence
    model(x)
    with pytest.raises(ValueError, match=BAD_FORWARD.format(index)):
        ask(model)
    torch.testing.assert_close(kl_divergence(model.eval()), kl_divergence(replaced()))  # nothing is charged
    del layer.forward
    y = model.train()(x)
    ask(model).backward()
    assert layer.weight_rho.grad.abs().sum() > 0
    assert not torch.equal(y, model(x))


def test_a_forward_bound_over_one_that_does_not_sample_is_fine():
    model = replace_layer_norm(nn.Sequential(nn.LayerNorm(N)), posterior="deterministic")
    model[0].forward = types.MethodType(fast_forward, model[0])
    model(torch.randn(3, N))
    assert kl_divergence(model).isfinite()


@pytest.mark.parametrize("after", [copy.deepcopy, lambda model: model], ids=["copied", ""])
@pytest.mark.parametrize("removed", [False, True], ids=["hooked", "removed"])
def test_accelerates_own_forward_goes_on_working(removed, after):
    model, x = replaced(), torch.randn(3, 4)
    for layer in kl_layers(model).values():
        for _ in range(2):
            add_hook_to_module(layer, accelerate.hooks.ModelHook(), append=True)
        if removed:
            remove_hook_from_module(layer)
        assert "forward" in vars(layer)
    model = after(model)
    for _ in range(2):  # from the forward, then in closed form
        assert kl_divergence(model).item() > 0
        (model(x).sum() + kl_divergence(model)).backward()


def test_a_wrapper_that_calls_the_layers_forward_is_fine():
    model, x = replaced(), torch.randn(3, 4)
    model[1].forward = lambda_around(model[1])
    model(x)
    kl_divergence(model).backward()
    with pytest.raises(ValueError, match=r"Remedy: .*functools\.wraps\(layer\.forward\)"):
        kl_divergence(model)  # its graph is spent, so nothing tells any more that the layer's forward ran
    del model[1].forward
    model[1].forward = wraps(model[1])
    model(x)
    for _ in range(2):
        kl_divergence(model).backward()


def test_a_decorated_forward_of_a_subclass_is_its_own():
    class Timed(klnorm.KLLayerNorm):
        @functools.wraps(klnorm.KLLayerNorm.forward)
        def forward(self, x):
            return super().forward(x)

    layer = Timed(N)
    add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert kl_divergence(layer).item() > 0


class LeafTracer(torch.fx.Tracer):
    """Does not look into KL layers."""

    def is_leaf_module(self, module, name):
        return isinstance(module, klnorm.layers.KLNorm) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_torch_fx_is_told_to_restore_first(norm, training):
    model, x = nn.Sequential(nn.Linear(4, N), norm(N), nn.Linear(N, 2)), torch.randn(3, 4)
    replace_rms_norm(model) if norm is nn.RMSNorm else replace_layer_norm(model)
    expected = model.eval()(x)
    with pytest.raises(TypeError, match=r"x is a Proxy of torch\.fx.*Remedy: klnorm\.restore_layer_norm\(model\)"):
        torch.fx.symbolic_trace(model.train(training))
    traced = torch.fx.GraphModule(model, LeafTracer().trace(model))
    assert torch.equal(traced(x), traced(x)) != training
    assert torch.equal(traced.eval()(x), expected)
    (klnorm.restore_rms_norm if norm is nn.RMSNorm else klnorm.restore_layer_norm)(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)


def test_torch_fx_looks_into_an_rms_norm_of_another_library_in_evaluation():
    model, x = replace_rms_norm(nn.Sequential(nn.Linear(4, N), Rms())).eval(), torch.randn(3, 4)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(TypeError, match=r"x is a Proxy of torch\.fx.*restore_rms_norm"):
        torch.fx.symbolic_trace(model.train())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_torch_fx_takes_a_conditional_layer_as_a_leaf(training):
    model, x = nn.Sequential(nn.Linear(4, N), KLConditionalLayerNorm(N)).train(training), torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"x is a Proxy of torch\.fx.*is_leaf_module"):
        torch.fx.symbolic_trace(model)
    assert torch.fx.GraphModule(model, LeafTracer().trace(model))(x).shape == (3, N)
