"""`klnorm.replace_layer_norm` and `klnorm.restore_layer_norm`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from unchanged import snapshot

from klnorm import KLLayerNorm, kl_divergence, replace_layer_norm, restore_layer_norm

N = 8


def scrambled(model):
    """`model` with random values in every parameter."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + 0.5)
    return model


def norms(model, kind=nn.LayerNorm):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def small_model(device="cpu", **options):
    model = nn.Sequential(
        nn.Linear(4, N), nn.LayerNorm(N, **options), nn.ModuleDict({"norm": nn.LayerNorm((2, 4), **options)})
    )
    return scrambled(model.to(device))


def encoder(device="cpu", **options):
    options = {"batch_first": True, "norm_first": False, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(N, 2, 16, **options)
    nested = options["batch_first"] and not options["norm_first"]  # torch warns where it cannot
    return scrambled(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(N), enable_nested_tensor=nested).to(device))


class OwnLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


# Replacement


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_values_dtype_device_and_eps_are_kept_and_become_the_prior(device, dtype, bias):
    model = small_model(device, dtype=dtype, bias=bias, eps=0.25)
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    assert replace_layer_norm(model) is model
    layers = norms(model)
    assert layers.keys() == {"1", "2.norm"}
    for name, layer in layers.items():
        assert type(layer) is KLLayerNorm
        plain = before.get_submodule(name)
        assert (layer.eps, layer.normalized_shape) == (plain.eps, plain.normalized_shape)
        for key, value in plain.named_parameters():
            assert getattr(layer, key) is parameters[f"{name}.{key}"]
            assert torch.equal(getattr(layer, key), value)
            assert torch.equal(getattr(layer, f"{key}_prior"), value)
            assert getattr(layer, f"{key}_prior").data_ptr() != getattr(layer, key).data_ptr()
        assert (layer.bias is None, layer.bias_rho is None, layer.bias_prior is None) == (not bias,) * 3
        for tensor in layer.state_dict().values():
            assert (tensor.dtype, tensor.device) == (plain.weight.dtype, plain.weight.device)
    # centred prior, deviations 0.05 against 0.1: only the deviations differ
    count = (2 if bias else 1) * 2 * N
    each = torch.tensor(2.0).log().item() + 0.25 / 2 - 0.5
    assert kl_divergence(model).item() == pytest.approx(count * each, rel=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_options_reach_every_layer(device):
    generator = torch.Generator(device)
    model = replace_layer_norm(
        small_model(device), noise="token", sample_dim=1, init_std=0.3, prior_std=0.7, generator=generator
    )
    for layer in norms(model).values():
        assert (layer.noise, layer.sample_dim, layer.prior_std) == ("token", 1, 0.7)
        assert layer.generator is generator
        torch.testing.assert_close(F.softplus(layer.weight_rho), torch.full_like(layer.weight, 0.3))
    layer.reset_parameters()
    torch.testing.assert_close(F.softplus(layer.bias_rho), torch.full_like(layer.weight, 0.3))


def test_training_flag_requires_grad_hooks_and_identity_are_kept(device):
    model = small_model(device)
    first, second = model[1], model[2]["norm"]
    first.eval()
    first.weight.requires_grad_(False)
    second.bias.requires_grad_(False)
    calls = []
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    second.weight.register_hook(lambda grad: calls.append("grad"))
    second.note = "mine"
    replace_layer_norm(model)
    assert model[1] is first
    assert model[2]["norm"] is second
    assert (first.training, second.training, model.training) == (False, True, True)
    grads = {f"{i}.{name}": p.requires_grad for i, m in enumerate((first, second)) for name, p in m.named_parameters()}
    assert grads == {
        "0.weight": False, "0.weight_rho": False, "0.bias": True, "0.bias_rho": True,
        "1.weight": True, "1.weight_rho": True, "1.bias": False, "1.bias_rho": False,
    }  # fmt: skip
    second(first(torch.randn(3, N, device=device)).unflatten(1, (2, 4))).sum().backward()
    assert calls == ["pre", "forward", "grad"]
    assert second.note == "mine"


def test_a_model_that_is_itself_a_norm(device):
    layer = scrambled(nn.LayerNorm(N, device=device))
    expected = copy.deepcopy(layer)
    assert replace_layer_norm(layer) is layer
    assert type(layer) is KLLayerNorm
    assert torch.equal(layer.weight_prior, expected.weight)
    assert restore_layer_norm(layer) is layer
    assert type(layer) is nn.LayerNorm


def test_a_shared_norm_stays_shared_and_counts_once(device):
    norm = nn.LayerNorm(N, device=device)
    model = nn.Sequential(norm, nn.ModuleList([norm]), norm)
    replace_layer_norm(model)
    assert model[0] is model[1][0] is model[2] is norm
    once = kl_divergence(norm)
    assert once > 1
    torch.testing.assert_close(kl_divergence(model), once)


def test_replacing_twice_changes_nothing_more(device):
    model = replace_layer_norm(small_model(device), noise="token", prior_std=0.5)
    with torch.no_grad():
        for layer in norms(model).values():
            layer.weight_rho.add_(1.0)
            layer.weight.add_(1.0)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    replace_layer_norm(model, noise="batch", prior_std=0.1)
    assert snapshot(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_other_norms_are_left_alone(device):
    model = nn.ModuleDict(
        {
            "plain": nn.LayerNorm(N),
            "affine_less": nn.LayerNorm(N, elementwise_affine=False),
            "own": OwnLayerNorm(N),
            "affine_less_own": OwnLayerNorm(N, elementwise_affine=False),
            "group": nn.GroupNorm(2, N),
            "batch": nn.BatchNorm1d(N),
        }
    ).to(device)
    types = {name: type(module) for name, module in model.items()}
    others = {name: copy.deepcopy(module) for name, module in model.items()}
    with pytest.warns(UserWarning, match="passed over 1 OwnLayerNorm"):
        replace_layer_norm(model)
    assert {name: type(module) for name, module in model.items()} == {**types, "plain": KLLayerNorm}
    x = torch.randn(5, N, device=device)
    for name in "affine_less", "own", "affine_less_own", "group":
        assert torch.equal(model[name](x), others[name](x))
        assert model[name].state_dict().keys() == others[name].state_dict().keys()
    restore_layer_norm(model)
    assert {name: type(module) for name, module in model.items()} == types


def test_subclasses_of_kl_layer_norm_are_left_alone_by_both(device):
    class Own(KLLayerNorm):
        pass

    model = nn.Sequential(Own(N, device=device))
    before = snapshot(model)
    assert snapshot(restore_layer_norm(replace_layer_norm(model))) == before


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("noise", "nope", ValueError),
        ("noise", None, TypeError),
        ("init_std", 0.0, ValueError),
        ("init_std", float("nan"), ValueError),
        ("init_std", None, TypeError),
        ("prior_std", -1.0, ValueError),
        ("prior_std", "0.1", TypeError),
    ],
)
def test_a_bad_argument_leaves_the_model_unchanged(option, value, error):
    model = small_model()
    before, x = snapshot(model), torch.randn(3, 4)
    y = model[:2](x)
    with pytest.raises(error, match=f"{option} is "):
        replace_layer_norm(model, **{option: value})
    assert snapshot(model) == before
    assert torch.equal(model[:2](x), y)
    replace_layer_norm(model)  # and it can still be converted
    assert len(norms(model, KLLayerNorm)) == 2


def test_a_layer_that_cannot_be_converted_leaves_the_whole_model_unchanged():
    model = small_model()
    model[2]["norm"].eps = -1e-5
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"eps is -1e-05"):
        replace_layer_norm(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("function", [replace_layer_norm, restore_layer_norm])
@pytest.mark.parametrize("model", [None, [nn.LayerNorm(N)], nn.LayerNorm], ids=["None", "list", "class"])
def test_a_model_that_is_no_module_is_refused(function, model):
    with pytest.raises(TypeError, match=rf"model is a {type(model).__name__}, expected an nn\.Module"):
        function(model)


def test_the_replaced_model_trains_and_its_deviations_learn(device):
    model = replace_layer_norm(small_model(device), init_std=0.3)
    x = torch.randn(6, 4, device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    y = model[2]["norm"](model[:2](x).unflatten(1, (2, 4)))
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p != start[name]).any(), name


def test_a_copy_and_a_checkpoint_of_a_replaced_model(device):
    model = scrambled(replace_layer_norm(small_model(device)))
    other = replace_layer_norm(small_model(device))
    other.load_state_dict(model.state_dict())
    for m in other, copy.deepcopy(model):
        assert all(torch.equal(value, m.state_dict()[key]) for key, value in model.state_dict().items())
        torch.testing.assert_close(kl_divergence(m), kl_divergence(model))


# A model of torch's own, whose evaluation may take a fast path around the modules


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_evaluation_of_a_transformer_encoder_is_unchanged_bit_for_bit(device, grad, masked, norm_first, monkeypatch):
    fast, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    model = encoder(device, norm_first=norm_first, activation="gelu").eval()
    x = torch.randn(3, 5, N, device=device)
    padding = (
        torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3], device=device) if masked else None
    )
    with torch.set_grad_enabled(grad):
        before = model(x, src_key_padding_mask=padding)
        after = replace_layer_norm(model)(x, src_key_padding_mask=padding)
        restored = restore_layer_norm(copy.deepcopy(model))(x, src_key_padding_mask=padding)
    assert len(norms(model, KLLayerNorm)) == 5
    assert len(calls) == (0 if grad else 6)  # two layers, three times: the fast path is taken as before
    assert torch.equal(before, after)
    assert torch.equal(before, restored)


def test_training_of_a_transformer_encoder_uses_the_noise(device):
    model = replace_layer_norm(encoder(device), init_std=0.2).train()
    x = torch.randn(3, 5, N, device=device)
    torch.manual_seed(1)
    y = model(x)
    assert not torch.isclose(y, model(x)).any()
    torch.manual_seed(1)
    assert torch.equal(y, model(x))
    (y * torch.randn_like(y)).sum().backward()
    for name, layer in norms(model, KLLayerNorm).items():
        for p in layer.parameters():
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


def test_sample_dim_of_a_time_first_model(device):
    """The last norm's draws belong to samples: equal rows stay equal along time and differ between samples."""
    model = replace_layer_norm(encoder(device, batch_first=False), sample_dim=1, init_std=0.2)
    y = model.norm(torch.randn(N, device=device).expand(5, 3, N))
    assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.isclose(y[0, 0], y[0, 1]).any()


# Restoration


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_restored_layers_are_plain_and_equal_evaluation_exactly(device, dtype, bias):
    model = scrambled(replace_layer_norm(small_model(device, dtype=dtype, bias=bias)))
    model[1].eval()
    norm = model[2]["norm"]
    means = {name: p for name, p in model.named_parameters() if not name.endswith("_rho")}
    x = torch.randn(3, 2, 4, device=device, dtype=dtype)
    expected = copy.deepcopy(norm).eval()(x)
    kept_alive = norm(x)  # a restored layer must not depend on this graph
    assert restore_layer_norm(model) is model
    vanilla = small_model(device, dtype=dtype, bias=bias)
    assert model[2]["norm"] is norm
    assert (model[1].training, norm.training) == (False, True)
    for name, layer in norms(model).items():
        plain = vanilla.get_submodule(name)
        assert type(layer) is nn.LayerNorm
        assert vars(layer).keys() == vars(plain).keys()
        assert repr(layer) == repr(plain)
        assert layer._parameters.keys() == plain._parameters.keys()
        assert not layer._buffers
        assert not layer._non_persistent_buffers_set
    assert torch.equal(norm(x), expected)  # in training mode too: no noise any more
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in means.items()}
    vanilla.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(vanilla[2]["norm"](x), expected)
    assert kept_alive.requires_grad
    assert kl_divergence(model).item() == 0


def test_hooks_and_requires_grad_survive_there_and_back(device):
    model = small_model(device)
    model[1].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    restore_layer_norm(replace_layer_norm(model))
    assert snapshot(model) == before
    model[:2](torch.randn(3, 4, device=device))
    assert calls == [1]
    assert not model[1].weight.requires_grad


def test_restoring_a_layer_that_was_never_plain(device):
    layer = KLLayerNorm(N, eps=0.5, bias=False, noise="token", device=device)
    restore_layer_norm(layer)
    assert repr(layer) == repr(nn.LayerNorm(N, eps=0.5, bias=False))
    layer.reset_parameters()
    x = torch.randn(3, N, device=device)
    assert torch.equal(layer(x), F.layer_norm(x, (N,), layer.weight, None, 0.5))


def test_restoring_a_model_without_kl_layers_changes_nothing():
    model = small_model()
    before = snapshot(model)
    assert restore_layer_norm(model) is model
    assert snapshot(model) == before


def test_there_and_back_again_centres_the_prior_on_the_new_means(device):
    model = replace_layer_norm(small_model(device))
    with torch.no_grad():
        model[1].weight.add_(1.0)
    replace_layer_norm(restore_layer_norm(model))
    assert torch.equal(model[1].weight_prior, model[1].weight)
