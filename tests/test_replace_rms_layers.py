"""What `klnorm.replace_rms_norm` made goes where KL layers go, and `klnorm.restore_rms_norm` takes it back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from rms_classes import FOREIGN, N, OnePlus, Rms, model_of, new, with_own_forward
from torch import nn
from trained_layers import assert_compiles, assert_same_layer
from unchanged import snapshot

import klnorm
from klnorm import KLRMSNorm, kl_layers, replace_rms_norm, restore_rms_norm

# Replaced layers


@pytest.mark.parametrize("kind", [Rms, OnePlus])
def test_the_standard_prior_is_around_a_scale_of_1(kind):
    plain = new(kind)
    layer = replace_rms_norm(copy.deepcopy(plain), prior="standard")
    standard = torch.full((N,), 1.0 - kind.offset)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_prior, standard)
    layer.load_state_dict({"weight": torch.full((N,), 3.0)})
    assert torch.equal(layer.weight_prior, standard)
    layer.reset_parameters()
    assert torch.equal(layer.weight, standard)
    x = torch.randn(3, N)
    torch.testing.assert_close(layer.eval()(x), F.rms_norm(x, (N,), None, 0.01))


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints(kind, tmp_path):
    model = model_of(replace_rms_norm(new(kind)))
    with torch.no_grad():
        model[0].weight_prior.add_(1.0)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = replace_rms_norm(model_of(new(kind)))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(klnorm.kl_divergence(model), klnorm.kl_divergence(other))
    plain = model_of(new(kind))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other[0].weight, plain[0].weight)
    assert torch.equal(other[0].weight_prior, plain[0].weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("kind", FOREIGN)
def test_copies_are_of_the_same_class(kind, duplicate):
    layer, x = replace_rms_norm(new(kind), noise="token"), torch.randn(3, N)
    y = layer(x)
    other = duplicate(layer)
    assert y.requires_grad
    assert_same_layer(other, layer, x)
    assert torch.equal(klnorm.kl_divergence(other), klnorm.kl_divergence(layer))
    assert type(restore_rms_norm(other)) is kind


@pytest.mark.parametrize("posterior", ["sampled", "deterministic"])
def test_summary_has_the_divergence(posterior):
    model = replace_rms_norm(model_of(OnePlus()), posterior=posterior)
    row = klnorm.summary(model).layers["0"]
    assert row.scale.kl == pytest.approx(klnorm.kl_divergence(model).item(), rel=1e-5)
    deviation = F.softplus(model[0].weight_rho) if posterior == "sampled" else (1 + model[0].weight).abs()
    assert row.scale.deviation == pytest.approx(deviation.mean().item(), rel=1e-5)


def test_sampling_and_optimizer_groups_know_it():
    model = replace_rms_norm(model_of(Rms(), nn.Linear(N, 3)), init_std=0.5).eval()
    x = torch.randn(4, N)
    with klnorm.sampling(model):
        assert not torch.isclose(model(x), model(x)).any()
    assert torch.equal(model(x), model(x))
    groups = {group["name"]: group["params"] for group in klnorm.param_groups(model, lr=1e-3)}
    assert groups["rho"] == [model[0].weight_rho]
    assert any(p is model[0].weight for p in groups["no_decay"])


def test_a_name_by_which_a_library_would_put_in_its_kernel_is_hidden_while_replaced():
    layer = replace_rms_norm(OnePlus())
    assert type(layer).kernel_layer_name is None
    assert type(restore_rms_norm(layer)).kernel_layer_name == "RMSNorm"


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_break(device, training, fresh_dynamo):
    model = replace_rms_norm(model_of(new(OnePlus, device), new(Rms, device))).train(training)
    assert_compiles(model, torch.randn(3, 4, N, device=device), atol=1e-4)


# Restoration


@pytest.mark.parametrize("kind", [*FOREIGN, nn.RMSNorm])
def test_restoring_gives_back_the_class_and_the_evaluation_bit_for_bit(kind):
    model = nn.Sequential(new(kind))
    model[0].register_forward_hook(lambda *_: None)
    before, x = snapshot(model), torch.randn(3, N)
    replace_rms_norm(model)
    kept_alive = model(x)  # a restored layer must not depend on this graph
    with torch.no_grad():
        model[0].weight.add_(0.1)
        expected = model.eval()(x)
        model.train()
    assert restore_rms_norm(model) is model
    assert kept_alive.requires_grad
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [*FOREIGN, nn.RMSNorm])
def test_a_layer_with_a_forward_put_into_it_is_not_restored(kind):
    model = replace_rms_norm(nn.Sequential(nn.RMSNorm(N), with_own_forward(replace_rms_norm(new(kind)))))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '1' has a forward that accelerate .*restore first") as raised:
        restore_rms_norm(model)
    assert "filter_fn" not in str(raised.value)
    assert snapshot(model) == before
    del model[1].forward
    assert kl_layers(restore_rms_norm(model)) == {}


def test_restoring_leaves_a_users_subclass_and_refuses_a_parametrized_layer():
    class Own(KLRMSNorm):
        pass

    model = nn.Sequential(Own(N), replace_rms_norm(Rms()))
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    with pytest.raises(ValueError, match="layer '1' is parametrized"):
        restore_rms_norm(model)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert [type(module) for module in restore_rms_norm(model)] == [Own, Rms]
